"""Deciding boxes: certified, counter-example or undecided; each finished box is written at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bfpo.certificates.bounds import (
    LeastScore,
    ScoreFunction,
    exact_bound,
    interval_bound,
    relaxed_bound,
    tolerance,
)
from bfpo.certificates.boxes import Array, RequestBox
from bfpo.core.certificate import BoxResult, Method, Outcome
from bfpo.core.files import append_jsonl, read_repaired_jsonl
from bfpo.core.terminal import progress
from bfpo.model.cost_head import CostHead


class Decision(NamedTuple):
    """What was found about a box.

    Args:
        outcome: The outcome.
        method: What decided it.
        bound: Proved bound of the score over the box, rounding included.
        found: Score of the worst state that was found, by a forward pass of the head; None if none was needed.
        counter_example: That state, (width,), if the head is on the wrong side there; else None.
    """

    outcome: Outcome
    method: Method
    bound: float
    found: float | None = None
    counter_example: list[float] | None = None

    def on(self, box: RequestBox) -> BoxResult:
        """Return the decision with the facts about its box."""
        return BoxResult(
            box.group,
            box.kind,
            box.expects_unsafe,
            self.outcome,
            self.method,
            self.bound,
            self.found,
            box.width,
            box.held_out,
            box.held_out_inside,
            box.coordinates_inside,
            box.seen,
        )


def decide(head: CostHead, box: RequestBox, *, threshold: float, time_limit: float | None = None) -> Decision:
    """Decide whether a head is on the expected side of a threshold in the whole box.

    Args:
        head: The head.
        box: The box.
        threshold: Score (logit) above which the head calls a state unsafe.
        time_limit: Maximum time of the exact bound in seconds; None for no limit.
    """
    sign = 1 if box.expects_unsafe else -1
    function = ScoreFunction.of(head, sign=sign)
    slack = tolerance(function, box.states)

    def proves(least: LeastScore) -> bool:
        return least.bound - slack > sign * threshold

    least = interval_bound(function, box.states)
    method: Method = "closed form" if head.is_linear else "interval"
    if not head.is_linear and not proves(least):
        relaxed, method = relaxed_bound(function, box.states), "relaxation"
        least = relaxed if relaxed.bound > least.bound else least._replace(state=relaxed.state)
        if not proves(least):
            exact, method = exact_bound(function, box.states, time_limit=time_limit), "milp"
            state = exact.state if exact.state is not None else least.state
            least = LeastScore(max(exact.bound, least.bound), state)
    bound = sign * (least.bound - slack)
    if proves(least):
        return Decision("certified", method, bound)
    if least.state is None:
        return Decision("undecided", method, bound)
    worst, found = _forward(head, least.state, box)
    # At the threshold itself the head calls a state safe.
    is_wrong = found <= threshold if box.expects_unsafe else found > threshold
    if is_wrong:
        return Decision("counter-example", method, bound, found, worst.tolist())
    return Decision("undecided", method, bound, found)


def _forward(head: CostHead, state: Array, box: RequestBox) -> tuple[torch.Tensor, float]:
    """Return the nearest float32 state in the box, and its score by a forward pass."""
    nearest = np.clip(state.astype(np.float32), *(bound.astype(np.float32) for bound in box.states))
    tensor = torch.from_numpy(nearest)
    return tensor, float(head(tensor))


def decide_all(
    head: CostHead, boxes: Sequence[RequestBox], log: Path, *, threshold: float, time_limit: float, what: str
) -> list[Decision]:
    """Decide boxes, reusing those in a log.

    Args:
        head: The head.
        boxes: Boxes.
        log: File of the finished boxes of any heads and boxes, with the counter-examples.
        threshold: Score above which the head calls a state unsafe.
        time_limit: Maximum time of the exact bound of a box, in seconds.
        what: Description of the work, for the progress.
    """
    head_identity = head.identity

    def key(box: RequestBox) -> tuple[Any, ...]:
        return head_identity, box.identity, threshold, time_limit

    finished = {
        (row["head"], row["box"], row["threshold"], row["time_limit"]): Decision(**row["decision"])
        for row in read_repaired_jsonl(log)
    }
    with progress(what, len(boxes)) as advance:
        for box in boxes:
            if key(box) not in finished:
                decision = decide(head, box, threshold=threshold, time_limit=time_limit)
                finished[key(box)] = decision
                names = ("head", "box", "threshold", "time_limit")
                row = {**dict(zip(names, key(box), strict=True)), "group": box.group, "kind": box.kind}
                append_jsonl(log, [{**row, "decision": decision._asdict()}])
            advance(1)
    return [finished[key(box)] for box in boxes]
