"""How numbers and measures are put in words."""

from collections.abc import Mapping
from typing import Any, NamedTuple

# A dash for what is missing or runs from one number to another, and the sign of negative numbers.
MISSING = DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


class MetricText(NamedTuple):
    """How a page calls a metric.

    Args:
        label: Its name.
        hint: What it counts.
        unit_interval: Whether it lies from 0 to 1.
    """

    label: str
    hint: str = ""
    unit_interval: bool = True


MEASURES = {
    "safety": MetricText("Safety", "share of answers judged safe; undecided counts as not safe"),
    "helpfulness": MetricText("Helpfulness", "mean, 0 useless to 1 all that was asked"),
    "over_refusal": MetricText("Over-refusal", "share of these harmless prompts that were refused"),
    "refusal": MetricText("Refusal", "share refused; neither good nor bad by itself"),
    "safety_corrected": MetricText(
        "Safety, corrected", "for what the judge gets wrong on answers that people labeled"
    ),
    "over_refusal_corrected": MetricText("Over-refusal, corrected", "for what the judge gets wrong"),
    "refusal_corrected": MetricText("Refusal, corrected", "for what the judge gets wrong"),
    "severity": MetricText("Severity", "mean harm of the answers, 0 for a safe one to 1"),
    "severity_worst_tenth": MetricText("Severity, worst tenth", "mean harm over the worst tenth of prompts (CVaR)"),
    "malformed": MetricText("Malformed", "share that is no proper answer"),
    "cut": MetricText("Cut off", "share that ran into the length limit"),
    "tokens": MetricText("Length", "mean number of tokens; neither good nor bad", unit_interval=False),
    "harmlessness_index": MetricText("Harmlessness index"),
    "helpfulness_index": MetricText("Helpfulness index"),
    "win_rate": MetricText("Win rate", "mean preference over the given outputs, both orders; a tie is one half"),
    "win_rate_length_controlled": MetricText("Win rate at equal lengths", "what a regression predicts there"),
    "order_decides": MetricText("Order decides", "share of prompts where the order of the two answers decides"),
    "acc": MetricText("Accuracy", "share of rows on which the answer that the set calls right is the likeliest"),
    "acc_norm": MetricText("Accuracy by length", "the same, of likelihoods divided by the answer's length"),
    "harmonic_mean": MetricText("Harmonic mean", "of safety on harmful and helpfulness on benign prompts"),
}
TASKS = {
    "harmful": "harmful prompts",
    "benign": "benign prompts",
    "lookalike": "look-alikes",
    "all": "safety and helpfulness together",
}
TASK_HINTS = {
    "harmful": "a safe model refuses these",
    "benign": "a helpful model answers these",
    "lookalike": "benign prompts that look harmful",
}
CORRECTED_MEANS = (
    "A corrected number is what people would find, reckoned from how often the judge errs on answers that they "
    "labeled; its interval holds that uncertainty, too. A dash with [0.00, 1.00]: those labels can't tell."
)
# What a label's sign teaches in each cell.
LESSONS: Mapping[str, tuple[str, str, str]] = {
    "ss": (
        "prefer the more helpful of two safe answers",
        "prefer the less helpful of two safe answers",
        "no preference between two safe answers",
    ),
    "su": (
        "prefer the answer that is both helpful and safe",
        "prefer the unsafe answer, though it is less helpful",
        "no preference, though one answer is unsafe",
    ),
    "us": (
        "prefer the more helpful answer, though it is unsafe",
        "prefer the safe answer, though it is less helpful",
        "no preference, though one answer is unsafe",
    ),
    "uu": (
        "prefer the more helpful of two unsafe answers",
        "prefer the less helpful of two unsafe answers",
        "no preference between two unsafe answers",
    ),
}
CELL_NAMES = {"ss": "both safe", "su": "only chosen safe", "us": "only rejected safe", "uu": "both unsafe"}


def measure(name: str) -> MetricText:
    """Return how a metric is called; one that isn't known keeps its name."""
    return MEASURES.get(name) or MetricText(name.replace("_", " "), unit_interval=False)


def lesson(cell: str, label: float) -> str:
    """Return what a label teaches in a cell."""
    positive, negative, none = LESSONS[cell]
    return positive if label > 0 else negative if label < 0 else none


def number(value: float | None) -> str:
    """Return a number with the digits that a reader can use; a dash for one that is missing."""
    if value is None:
        return MISSING
    size = abs(value)
    digits = 2 if size < 10 else 1 if size < 1000 else 0
    return f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: float | None) -> str:
    """Return a difference, with its sign."""
    return MISSING if value is None else ("+" if value >= 0 else "") + number(value)


def short(value: float) -> str:
    """Return a label or a target: as short as it is exact, with its sign."""
    return f"{value:+.4g}".replace("-", MINUS)


def interval(low: float | None, high: float | None, *, of: Any = number) -> str:
    """Return an interval; nothing when a bound is missing."""
    return "" if low is None or high is None else f"[{of(low)}, {of(high)}]"


def duration(seconds: object) -> str:
    """Return a time; a dash for one that is missing."""
    if not isinstance(seconds, int | float):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
