"""Repair of a head: retraining on counter-examples and clean data, with a rollback where accuracy is lost.

The loop is that of Yang et al. (2021, arXiv 2108.04214), Veritex, whose counter-examples are exact vertices of unsafe
regions; here they are the worst states of boxes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from bfpo.certificates.boxes import RequestBox
from bfpo.certificates.recipe import RepairSection
from bfpo.certificates.verify import Decision
from bfpo.core.certificate import RepairRound
from bfpo.core.files import content_hash
from bfpo.core.samples import Completion, Verdict
from bfpo.core.terminal import say
from bfpo.data.stages import verdicts_on
from bfpo.errors import DataError
from bfpo.model.cost_head import CostHead

# Share of the prompts whose clean states measure the accuracy.
_HELD_OUT = 0.2
_STEPS, _BATCH, _RATE = 600, 2048, 1e-2
# Counter-examples are trained to be this far beyond the threshold, in logits.
_MARGIN = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class CleanStates:
    """Hidden states of answers with verdicts; those of some prompts are held out.

    Args:
        states: States to train on, (tokens, width).
        targets: Whether the answer is unsafe, 0 or 1, (tokens,).
        held_out: Held-out states, (tokens, width).
        held_out_targets: Their targets, (tokens,).
    """

    states: Tensor
    targets: Tensor
    held_out: Tensor
    held_out_targets: Tensor

    def accuracy(self, head: CostHead, threshold: float) -> float:
        """Return the share of held-out states whose score is on the side of their target."""
        return float(((head(self.held_out) > threshold) == (self.held_out_targets > 0.5)).double().mean())

    def loss(self, head: CostHead) -> float:
        """Return the mean binary cross-entropy on held-out states, in nats."""
        return float(binary_cross_entropy_with_logits(head(self.held_out), self.held_out_targets))


def clean_states(
    completions: Sequence[Completion], verdicts: Sequence[Verdict], states: Sequence[Tensor], *, where: str
) -> CleanStates:
    """Return the states of answers with the targets that their verdicts give; undecided ones count as unsafe.

    Args:
        completions: Answers.
        verdicts: Verdicts on them by one judge, in any order.
        states: States after each token of each answer.
        where: Name of the file of verdicts, for errors.

    Raises:
        DataError: If an answer has no verdict, two, or one on another text, or too few prompts have answers.
    """
    judged = verdicts_on(completions, verdicts, where)
    order = sorted({completion.prompt_id for completion in completions}, key=content_hash)
    held_out = set(order[: max(1, round(_HELD_OUT * len(order)))])
    parts: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
    for completion, verdict, rows in zip(completions, judged, states, strict=True):
        target = torch.full((len(rows),), float(verdict.safe is not True))
        parts[completion.prompt_id in held_out].append((rows, target))
    if not all(parts.values()):
        raise DataError(f"repair.completions: answers to {len(order)} prompt; expected several, a fifth is held out")
    train, measure = ([torch.cat(column) for column in zip(*parts[name], strict=True)] for name in (False, True))
    return CleanStates(train[0], train[1], measure[0], measure[1])


class Repair(NamedTuple):
    """A repaired head.

    Args:
        head: The head of the round with the most certified boxes; the original one if no other has more.
        decisions: What was found about each box with it.
        rounds: All rounds, the head before the repair first.
    """

    head: CostHead
    decisions: list[Decision]
    rounds: list[RepairRound]


def repair(
    head: CostHead,
    boxes: Sequence[RequestBox],
    decisions: list[Decision],
    clean: CleanStates,
    section: RepairSection,
    *,
    threshold: float,
    decide_boxes: Callable[[CostHead, int], list[Decision]],
) -> Repair:
    """Retrain a head on counter-examples until none is left, accuracy is lost, or the rounds are over.

    Args:
        head: The head.
        boxes: The boxes.
        decisions: What was found about each with the head.
        clean: Clean data.
        section: Settings.
        threshold: Score above which the head calls a state unsafe.
        decide_boxes: Function that decides all boxes with the head of a round.
    """
    accuracy = clean.accuracy(head, threshold)
    least_accuracy = section.keep_accuracy * accuracy
    num_seen = sum(box.seen for box in boxes)
    best, most = (head, decisions), _count_certified(boxes, decisions)
    rounds = [RepairRound(0, 0, accuracy, clean.loss(head), True, most, num_seen)]
    states: list[list[float]] = []
    signs: list[float] = []
    for number in range(1, section.rounds + 1):
        failures = [
            (decision.counter_example, 1.0 if box.expects_unsafe else -1.0)
            for box, decision in zip(boxes, decisions, strict=True)
            if box.seen and decision.counter_example is not None
        ]
        if not failures:
            break
        for state, sign in failures:
            states.append(state)
            signs.append(sign)
        found = CounterExamples(torch.tensor(states), torch.tensor(signs), threshold)
        head = retrain(head, clean, found, clean_weight=section.clean_weight, seed=section.seed + number)
        accuracy, loss = clean.accuracy(head, threshold), clean.loss(head)
        if accuracy < least_accuracy:
            rounds.append(RepairRound(number, len(states), accuracy, loss, False, None, num_seen))
            say(f"round {number}: accuracy {accuracy:.3f} is below {least_accuracy:.3f}; rolled back")
            break
        decisions = decide_boxes(head, number)
        certified = _count_certified(boxes, decisions)
        rounds.append(RepairRound(number, len(states), accuracy, loss, True, certified, num_seen))
        say(f"round {number}: {certified:,} of {num_seen:,} boxes certified, accuracy {accuracy:.3f}")
        if certified > most:
            best, most = (head, decisions), certified
    return Repair(*best, rounds)


class CounterExamples(NamedTuple):
    """Counter-examples: states, the sides of the threshold where they belong (1 above, -1 below), the threshold."""

    states: Tensor
    signs: Tensor
    threshold: float


def retrain(
    head: CostHead, clean: CleanStates, found: CounterExamples, *, clean_weight: float, seed: int
) -> CostHead:
    """Return a head trained further on counter-examples and clean data; see `repair`."""
    mean, scale = clean.states.mean(0), clean.states.std(0).clamp_min(1e-6)
    # Coordinates of very different sizes would make one learning rate too large or too small.
    normalized = head.after_affine(scale, mean)
    hidden = (normalized.hidden_weight, normalized.hidden_bias)
    weights = [
        tensor.detach().float().clone().requires_grad_(True)
        for tensor in (normalized.weight, normalized.bias, *hidden)
        if tensor is not None
    ]
    trained = CostHead(head.layers, *weights)
    optimizer = torch.optim.Adam(weights, lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    wrong = (found.states - mean) / scale
    for _ in range(_STEPS):
        rows = torch.randint(len(clean.targets), (_BATCH,), generator=generator)
        scores = trained((clean.states[rows] - mean) / scale)
        loss = clean_weight * binary_cross_entropy_with_logits(scores, clean.targets[rows])
        loss = loss + softplus(_MARGIN - found.signs * (trained(wrong) - found.threshold)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        final = CostHead(head.layers, *(weight.detach() for weight in weights)).after_affine(1 / scale, -mean / scale)
    return final


def _count_certified(boxes: Sequence[RequestBox], decisions: Sequence[Decision]) -> int:
    return sum(box.seen and decision.outcome == "certified" for box, decision in zip(boxes, decisions, strict=True))
