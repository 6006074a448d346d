"""Boxes of hidden states, their width, and which held-out paraphrases they contain."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bfpo.certificates.bounds import StateBox
from bfpo.core.certificate import BoxKind
from bfpo.errors import DataError

Array: TypeAlias = NDArray[np.float64]


class GroupStates(NamedTuple):
    """Hidden states of the paraphrases of a request; all are float32 numbers.

    Args:
        name: `group` of the paraphrases.
        expects_unsafe: Whether the head should call them unsafe.
        inside: States of those that boxes are made of, (at least 2, width).
        held_out: States of the others, (at least 1, width).
        in_precisions: States of the first paraphrase in several precisions, (precisions, width).
    """

    name: str
    expects_unsafe: bool
    inside: Array
    held_out: Array
    in_precisions: Array


@dataclass(frozen=True, slots=True, eq=False)
class RequestBox:
    """Box of hidden states about a request; its bounds are float32 numbers.

    Args:
        group: Group of the request.
        kind: Kind of the box.
        expects_unsafe: Whether the head should call its states unsafe.
        states: The box.
        width: Mean width over the coordinates, in standard deviations of the paraphrases of a request.
        held_out: Number of held-out paraphrases.
        held_out_inside: How many of them are in the box.
        coordinates_inside: Share of their coordinates that are.
        seen: Whether a repair may use its counter-examples.
    """

    group: str
    kind: BoxKind
    expects_unsafe: bool
    states: StateBox
    width: float
    held_out: int
    held_out_inside: int
    coordinates_inside: float
    seen: bool

    @property
    def identity(self) -> str:
        """Hash of the bounds, and of what is expected."""
        parts = (self.states.low.tobytes(), self.states.high.tobytes(), bytes([self.expects_unsafe]))
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def spread(groups: Sequence[GroupStates]) -> Array:
    """Return the standard deviation of each coordinate over the paraphrases of a request, pooled, (width,).

    Raises:
        DataError: If all paraphrases of each request have the same state.
    """
    squares, freedom = np.zeros(groups[0].inside.shape[1]), 0
    for group in groups:
        states = np.concatenate([group.inside, group.held_out])
        squares += np.square(states - states.mean(axis=0)).sum(axis=0)
        freedom += len(states) - 1
    deviation: Array = np.sqrt(squares / freedom)
    if not deviation.any():
        raise DataError(
            "all paraphrases of each request have the same hidden state, so no box says anything about wordings; is "
            "`answer` so long that the model forgets the prompt, or the layer below the first attention?"
        )
    return deviation


def make_boxes(
    groups: Sequence[GroupStates], *, hull: bool, radius: float | None, unseen: Sequence[str] = ()
) -> list[RequestBox]:
    """Return the boxes of all groups: hulls, then boxes of a radius, then those of precisions.

    Args:
        groups: Hidden states of the paraphrases of each request.
        hull: Whether to make hulls of paraphrases.
        radius: Half the width of boxes around the first paraphrase, in standard deviations; None for none.
        unseen: Groups whose boxes a repair doesn't see.
    """
    deviation = spread(groups)
    kinds: Mapping[BoxKind, bool] = {
        "hull": hull,
        "radius": radius is not None,
        "precisions": groups[0].in_precisions.size > 0,
    }
    boxes = []
    for kind in (kind for kind, is_made in kinds.items() if is_made):
        for group in groups:
            states = _state_box(kind, group, (radius or 0.0) * deviation)
            boxes.append(_with_meaning(kind, group, states, deviation, seen=group.name not in unseen))
    return boxes


def _state_box(kind: BoxKind, group: GroupStates, reach: Array) -> StateBox:
    if kind == "radius":
        # Bounds that are float32 numbers let a counter-example be one without leaving the box.
        first = group.inside[0]
        return StateBox(*((first + side * reach).astype(np.float32).astype(np.float64) for side in (-1, 1)))
    states = group.inside if kind == "hull" else group.in_precisions
    return StateBox(states.min(axis=0), states.max(axis=0))


def _with_meaning(kind: BoxKind, group: GroupStates, box: StateBox, deviation: Array, *, seen: bool) -> RequestBox:
    is_inside = (box.low <= group.held_out) & (group.held_out <= box.high)
    varies = deviation > 0
    return RequestBox(
        group.name,
        kind,
        group.expects_unsafe,
        box,
        width=float(np.mean((box.high - box.low)[varies] / deviation[varies])),
        held_out=len(group.held_out),
        held_out_inside=int(is_inside.all(axis=1).sum()),
        coordinates_inside=float(is_inside.mean()),
        seen=seen,
    )
