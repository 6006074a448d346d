"""The rounds of C-DPO's outer loop: what each policy achieves, in files and as a table."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bfpo.core.files import write_json
from bfpo.core.terminal import show_table
from bfpo.core.typed_json import read_if_written
from bfpo.losses.dual import Constraint
from bfpo.stats.intervals import Interval

_FILE_NAME = "round.json"


@dataclass(frozen=True, slots=True)
class Round:
    """A trained policy and what it achieves.

    Args:
        multiplier: λ that it was trained with.
        achieved: Measure of the constraint over fresh answers, with an interval that holds for all rounds together.
        helpfulness: Mean reward of the answers to all prompts, with its 95 % interval; None without a judge of it.
        samples: Number of answers that were sampled.
        judge_calls: Number of answers that judges read; an answer that two of them read counts twice.
    """

    multiplier: float
    achieved: Interval
    helpfulness: Interval | None
    samples: int
    judge_calls: int

    def holds(self, threshold: float) -> bool:
        """Whether the constraint holds, with the interval."""
        return self.achieved.high <= threshold

    def settles(self, threshold: float) -> bool:
        """Whether it holds, and a smaller multiplier couldn't be told apart: the search can end here."""
        width = self.achieved.high - self.achieved.low
        return self.holds(threshold) and (self.multiplier == 0 or threshold - self.achieved.high <= width)

    def to_json(self) -> dict[str, Any]:
        """Return the round with named bounds of its intervals."""
        helpfulness = None if self.helpfulness is None else self.helpfulness._asdict()
        return asdict(self) | {"achieved": self.achieved._asdict(), "helpfulness": helpfulness}

    def write(self, folder: Path) -> None:
        """Write `round.json` into a folder."""
        write_json(folder / _FILE_NAME, asdict(self))


@dataclass(frozen=True, slots=True)
class OuterResult:
    """All rounds.

    Args:
        rounds: The rounds, in order; at least one.
        threshold: Threshold of the constraint.
    """

    rounds: list[Round]
    threshold: float

    @property
    def holds(self) -> bool:
        """Whether a round meets the constraint."""
        return any(done.holds(self.threshold) for done in self.rounds)

    @property
    def chosen(self) -> int:
        """Index of the round whose policy is kept.

        Of those that meet the constraint it is that of the smallest multiplier, else the one with the lowest measure.
        """
        indices = range(len(self.rounds))
        holding = [index for index in indices if self.rounds[index].holds(self.threshold)]
        if holding:
            return min(holding, key=lambda index: self.rounds[index].multiplier)
        return min(indices, key=lambda index: self.rounds[index].achieved.value)


def read_round(folder: Path) -> Round | None:
    """Return the finished round in a folder; None if there is none.

    Raises:
        DataError: If the file is malformed.
    """
    return read_if_written(folder / _FILE_NAME, Round, remedy="remove the file to measure its round again")


def format_measure(constraint: Constraint, *values: float) -> str:
    """Return a measure, or a measure with its bounds, as text: shares in percent."""
    is_share = constraint.measure == "unsafe"
    texts = [f"{100 * value:.3g}" if is_share else f"{value:.3g}" for value in values]
    unit = " %" if is_share else ""
    return texts[0] + unit + (f" [{', '.join(texts[1:])}]" if texts[1:] else "")


def show_rounds(result: OuterResult, constraint: Constraint, *, level: float) -> None:
    """Print the rounds as a table.

    Args:
        result: The rounds.
        constraint: The constraint.
        level: Level of the intervals of what they achieve.
    """
    state = "met" if result.holds else "not met"
    show_table(
        f"Rounds: {constraint.measure} at most {format_measure(constraint, constraint.threshold)}, {state} "
        f"({100 * level:.3g} % intervals)",
        ("round", "multiplier", constraint.measure, "holds", "helpfulness", "samples", "judge calls"),
        [
            (
                f"{index + 1}{' (chosen)' if index == result.chosen else ''}",
                f"{done.multiplier:.4g}",
                format_measure(constraint, *done.achieved),
                "yes" if done.holds(result.threshold) else "no",
                "" if done.helpfulness is None else "{:.3f} [{:.3f}, {:.3f}]".format(*done.helpfulness),
                f"{done.samples:,}",
                f"{done.judge_calls:,}",
            )
            for index, done in enumerate(result.rounds)
        ],
    )
