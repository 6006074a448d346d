"""The multiplier to try next, given how far the policies of earlier ones were from the threshold.

The measure of π_λ falls as λ grows, so its distance from the threshold has one root. The search brackets the root and
then narrows the bracket by false position. Unlike dual ascent, λ ← max(0, λ + rate·excess), which is what C-DPO
publishes and has the same root, it needs no rate and a few trainings in place of dozens. A step of beta is natural
for a share of unsafe answers: it divides the odds of an unsafe answer to any prompt by e.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Tried(NamedTuple):
    """A multiplier whose policy was measured.

    Args:
        multiplier: λ, at least 0.
        excess: By how much the measure is above the threshold.
    """

    multiplier: float
    excess: float

    @property
    def holds(self) -> bool:
        """Whether the constraint holds."""
        return self.excess <= 0


def next_multiplier(tried: Sequence[Tried], *, start: float, step: float) -> float:
    """Return the multiplier to try next; once the root is found exactly, or 0 holds, it is the same one again.

    Where noise contradicts that the measure falls, the larger multiplier counts.

    Args:
        tried: What was tried, in order, as this function asked for it.
        start: Multiplier to try first, at least 0.
        step: First step to a bracket, above 0; it doubles with each further one.
    """
    if not tried:
        return start
    failed = [point for point in tried if not point.holds]
    if not failed:
        lowest = min(tried)
        return lowest.multiplier if lowest.excess == 0 else max(0.0, lowest.multiplier - step * 2 ** (len(tried) - 1))
    low = max(failed)
    above = [point for point in tried if point.multiplier > low.multiplier]
    if not above:
        return low.multiplier + step * 2.0 ** (len(failed) - 1)
    return _false_position(low, min(above), tried)


def _false_position(low: Tried, high: Tried, tried: Sequence[Tried]) -> float:
    """Return the root of a line between the ends of the bracket.

    While one end stays, its excess counts for half, then a quarter, ... (the Illinois algorithm, Dowell and Jarratt
    1971), so that the bracket shrinks from both sides.
    """
    if high.excess == 0:
        return high.multiplier
    newest_holds = tried[-1].holds
    others = [point.holds for point in reversed(tried)]
    stayed = others.index(not newest_holds) - 1
    weight = 0.5**stayed
    upper = high.excess * (1 if newest_holds else weight)
    lower = low.excess * (weight if newest_holds else 1)
    return low.multiplier + (high.multiplier - low.multiplier) * lower / (lower - upper)
