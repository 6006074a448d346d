"""Names of metrics and tasks on the page, and the formatting of numbers."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from bfpo.evaluation.attacks import AFTER_TURN

# A dash for a missing value or between the ends of a range, and the sign of negative numbers.
MISSING = DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


class MetricText(NamedTuple):
    """Name of a metric on the page.

    Args:
        label: Name.
        hint: What the metric measures.
        unit_interval: Whether the metric lies in [0, 1].
    """

    label: str
    hint: str = ""
    unit_interval: bool = True


METRIC_TEXTS = {
    "safety": MetricText("Safety", "share of answers judged safe; undecided answers count as not safe"),
    "helpfulness": MetricText("Helpfulness", "mean rating from 0 (useless) to 1 (fully helpful)"),
    "over_refusal": MetricText("Over-refusal", "share of these harmless prompts that were refused"),
    "refusal": MetricText("Refusal", "share of prompts that were refused; neither good nor bad"),
    "safety_corrected": MetricText("Safety, corrected", "corrected for the judge's errors on human-labeled answers"),
    "over_refusal_corrected": MetricText("Over-refusal, corrected", "corrected for the judge's errors"),
    "refusal_corrected": MetricText("Refusal, corrected", "corrected for the judge's errors"),
    "severity": MetricText("Severity", "mean harm of the answers, from 0 (safe) to 1"),
    "safety_worst_tenth": MetricText(
        "Safety, worst tenth", "share safe, over the least safe tenth of prompts (CVaR)"
    ),
    "severity_worst_tenth": MetricText("Severity, worst tenth", "mean harm over the worst tenth of prompts (CVaR)"),
    "malformed": MetricText("Malformed", "share of answers that are not well-formed"),
    "cut": MetricText("Cut off", "share of answers that reached the length limit"),
    "tokens": MetricText("Length", "mean number of tokens; neither good nor bad", unit_interval=False),
    "reasoning_safety": MetricText(
        "Safety of the reasoning", "share of completions with reasoning whose reasoning is judged safe"
    ),
    "reasoning_severity": MetricText("Severity of the reasoning", "mean harm of the reasoning, from 0 (safe) to 1"),
    "safe_answer_unsafe_reasoning": MetricText(
        "Safe answer, unsafe reasoning",
        "share of completions with reasoning whose answer is judged safe and whose reasoning unsafe",
    ),
    "no_answer": MetricText("No answer", "share of completions with reasoning that end before an answer"),
    "reasoning_words": MetricText("Length of the reasoning", "mean number of words", unit_interval=False),
    "answer_words": MetricText("Length of the answer", "mean number of words after reasoning", unit_interval=False),
    "call_rate": MetricText("Calls", "share of completions that call a tool; neither good nor bad"),
    "unsafe_call_rate": MetricText("Unsafe calls", "share of completions that call a tool and are judged unsafe"),
    "target_call_rate": MetricText("Calls of target tools", "share of completions that call a tool of the task"),
    "harmlessness_index": MetricText("Harmlessness index"),
    "helpfulness_index": MetricText("Helpfulness index"),
    "win_rate": MetricText(
        "Win rate", "mean preference over the reference outputs, in both orders; a tie counts one half"
    ),
    "win_rate_length_controlled": MetricText(
        "Length-controlled win rate", "win rate that AlpacaEval's regression predicts at equal answer lengths"
    ),
    "win_rate_length_controlled_approximate": MetricText(
        "Length-controlled win rate, approximate",
        "win rate that a regression on the lengths only predicts at equal answer lengths",
    ),
    "order_decides": MetricText("Order decides", "share of prompts where the order of the two answers decides"),
    "acc": MetricText("Accuracy", "share of questions whose correct answer has the highest likelihood"),
    "acc_norm": MetricText("Length-normalized accuracy", "accuracy with likelihoods divided by the answer's length"),
    "safety_under_attack": MetricText(
        "Safety under attack", "share of conversations without an unsafe reply; undecided ones count as not safe"
    ),
    "safety_single_turn": MetricText(
        "Safety, prompt alone", "share of safe answers to the same prompts without an attack"
    ),
    "lost_under_attack": MetricText(
        "Lost under attack", "share of prompts with a safe answer alone and an unsafe reply in the conversation"
    ),
    "refused_replies": MetricText("Refused replies", "share of a conversation's replies that refused, by markers"),
    "same_language": MetricText("Same language", "share of answers in the language of the prompt, by a guess"),
    "harmonic_mean": MetricText("Harmonic mean", "of safety on harmful prompts and helpfulness on benign prompts"),
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
CORRECTION_NOTE = (
    "A corrected rate estimates what human annotators would measure, from the judge's error rates on human-labeled "
    "answers; its interval includes that uncertainty. A dash with [0.00, 1.00] means that the labels do not "
    "determine the rate."
)
# What the sign of a label teaches in each cell: positive, negative, zero.
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


def metric_text(metric: str) -> MetricText:
    """Return the text of a metric; an unknown metric keeps its name."""
    if metric.startswith(AFTER_TURN):
        turn = metric.removeprefix(AFTER_TURN)
        return MetricText(
            f"Safety after turn {turn}", "share of conversations without an unsafe reply until that turn"
        )
    return METRIC_TEXTS.get(metric) or MetricText(metric.replace("_", " "), unit_interval=False)


def lesson(cell: str, label: float) -> str:
    """Return what a label teaches in a cell."""
    positive, negative, zero = LESSONS[cell]
    return positive if label > 0 else negative if label < 0 else zero


def format_number(value: float | None) -> str:
    """Return a number with a readable number of digits; a dash for None."""
    if value is None:
        return MISSING
    size = abs(value)
    digits = 2 if size < 10 else 1 if size < 1000 else 0
    return f"{value:,.{digits}f}".replace("-", MINUS)


def format_signed(value: float | None) -> str:
    """Return a difference with its sign; a dash for None."""
    return MISSING if value is None else ("+" if value >= 0 else "") + format_number(value)


def format_exact(value: float) -> str:
    """Return a label or a target with its sign, without trailing zeros."""
    return f"{value:+.4g}".replace("-", MINUS)


def format_interval(
    low: float | None, high: float | None, *, format_bound: Callable[[float | None], str] = format_number
) -> str:
    """Return an interval in brackets; "" when a bound is missing."""
    return "" if low is None or high is None else f"[{format_bound(low)}, {format_bound(high)}]"


def format_duration(seconds: object) -> str:
    """Return a duration; a dash when it is not a number."""
    if not isinstance(seconds, int | float):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
