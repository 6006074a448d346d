"""Errors of the judge that gave the safety labels, and how labels are corrected for them.

A judge calls a safe answer safe with probability `sensitivity`, and an unsafe one with probability 1 - `specificity`.
Replacing each label by an unbiased estimate of the true one makes the gradient of a squared loss that of the true
labels, on average (docs/method.md).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo.core.files import parse_json
from bfpo.errors import DataError, RecipeError

# Below, corrected labels would be over ten times as far apart as the true ones.
SMALLEST_YOUDEN = 0.1


@dataclass(frozen=True, slots=True)
class LabelErrors:
    """How often a judge is right.

    Args:
        sensitivity: Share of the safe answers that the judge calls safe, in [0, 1].
        specificity: Share of the unsafe answers that the judge calls unsafe, in [0, 1].

    Raises:
        RecipeError: If a share is out of its range, or the labels hardly tell safe from unsafe answers.
    """

    sensitivity: float
    specificity: float

    def __post_init__(self) -> None:
        for name in ("sensitivity", "specificity"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RecipeError(f"label_errors.{name} is {value}; expected a share from 0 to 1")
        if not self.youden >= SMALLEST_YOUDEN:
            raise RecipeError(
                f"label_errors: sensitivity {self.sensitivity:g} and specificity {self.specificity:g} add up to "
                f"{self.sensitivity + self.specificity:.3g}; expected at least {1 + SMALLEST_YOUDEN:g}, because "
                "labels of a judge near chance say nothing: use another judge"
            )

    @property
    def youden(self) -> float:
        """Youden's index, sensitivity + specificity - 1: what is left of a difference in safety."""
        return self.sensitivity + self.specificity - 1

    def estimate(self, observed: Any) -> Any:
        """Return the unbiased estimate of a true label from the judge's, which is outside of [0, 1]."""
        return (observed - (1 - self.specificity)) / self.youden


def read_label_errors(path: str | Path) -> LabelErrors:
    """Read the errors on safety from the results of `bfpo judge eval` with one judge.

    Raises:
        DataError: If the file is missing or not such results.
        RecipeError: If it has several judges, or too few labeled answers to say that the judge is better than chance.
    """
    try:
        judges = parse_json(Path(path).read_text(encoding="utf-8"))["judges"]
        by_judge = {str(name): results["safe"]["all"] for name, results in judges.items()}
        bounds = {
            name: [[float(number) for number in row[recall]] for recall in ("recall_yes", "recall_no")]
            for name, row in by_judge.items()
        }
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; `bfpo judge eval` writes this file") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path}: not the results of `bfpo judge eval` on safe and unsafe answers; run it on answers with labels "
            "of both kinds"
        ) from None
    if len(bounds) != 1:
        raise RecipeError(
            f"{path}: has the judges {', '.join(bounds) or '(none)'}; expected one, the judge that labeled pairs; "
            "run `bfpo judge eval` with that judge"
        )
    ((sensitivity, lowest_sensitivity, _), (specificity, lowest_specificity, _)) = next(iter(bounds.values()))
    if lowest_sensitivity + lowest_specificity <= 1:
        raise RecipeError(
            f"{path}: the lower bounds of sensitivity ({lowest_sensitivity:.2f}) and specificity "
            f"({lowest_specificity:.2f}) add up to at most 1, so the judge may be no better than chance; label more "
            "answers, or use another judge"
        )
    return LabelErrors(sensitivity, specificity)
