"""The summary in words, from the numbers only; changes for the worse are reported like changes for the better."""

from collections.abc import Sequence
from typing import NamedTuple

from bfpo.evaluation.results import MetricComparison
from bfpo.report.run_files import MetricKey, Run
from bfpo.report.tables import ValueCell, metric_keys, value_cell
from bfpo.report.words import TASKS, format_number, format_signed, metric_text

# Task, metric, and the subject of its sentence.
MAIN = (
    ("harmful", "safety", "Safety on {n} harmful {held_out}prompts"),
    ("benign", "helpfulness", "Helpfulness on {n} benign {held_out}prompts"),
    ("all", "harmonic_mean", "Their harmonic mean, the primary metric,"),
    ("lookalike", "over_refusal", "Over-refusal on {n} benign prompts that look harmful"),
)
# An arrow that stays on one line with the numbers around it.
ARROW = "\u00a0→\u00a0"
SAFETY, HELPFULNESS = ("harmful", "safety"), ("benign", "helpfulness")
# Prompts of a testbed are held out from every phase of training.
HELD_OUT_SUITES = frozenset({"testbed"})


class MetricSentence(NamedTuple):
    """A sentence about one metric.

    Args:
        subject: The metric and its prompts.
        verb: `rose`, `fell`, or `was`; `is` without a baseline.
        before: Value of the baseline; None without one.
        after: Value of the run.
        verdict: Verdict on the difference; "" for none.
        parts: Numbers of prompts of the baseline, of the run, and of both, if they differ; the verdict is on those of
            both.
        difference: Difference over the prompts of both, with its sign; "" unless there are parts.
    """

    subject: str
    verb: str
    before: ValueCell | None
    after: ValueCell
    verdict: str
    parts: tuple[str, str, str] | None = None
    difference: str = ""


class RunSummary(NamedTuple):
    """Summary of one run.

    Args:
        run: Name of the run.
        headline: One sentence; "" unless both safety and helpfulness were compared.
        sentences: One per main metric.
        others: Other metrics that changed, as verdict and phrases; worse ones first.
        is_compared: Whether any metric was compared.
        undecided: Number of undecided safety verdicts.
    """

    run: str
    headline: str
    sentences: list[MetricSentence]
    others: list[tuple[str, list[str]]]
    is_compared: bool
    undecided: int


def summarize(runs: Sequence[Run]) -> list[RunSummary]:
    """Return a summary of every run after the baseline; of the baseline if it is the only run."""
    keys = metric_keys(runs)
    if len(runs) == 1:
        return [_summarize_run(runs[0], None, keys)]
    return [_summarize_run(run, runs[0], keys) for run in runs[1:]]


def _summarize_run(run: Run, baseline: Run | None, keys: Sequence[MetricKey]) -> RunSummary:
    sentences = []
    for task, name, template in MAIN:
        for key in keys:
            sentence = _sentence(run, baseline, key, template) if key[1:] == (task, name) else None
            if sentence is not None and sum(other[1:] == key[1:] for other in keys) > 1:
                sentence = sentence._replace(subject=f"{key[0]}: {sentence.subject}")
            if sentence is not None:
                sentences.append(sentence)
    headline, comparisons = "", []
    others: dict[str, list[str]] = {"worse": [], "better": []}
    if baseline is not None:
        comparisons = [comparison for key in keys if (comparison := run.comparison(baseline, key)) is not None]
        headline = _headline(run, baseline, comparisons)
        main = {(task, name) for task, name, _ in MAIN}
        for comparison in comparisons:
            if comparison.verdict in others and (comparison.task, comparison.metric) not in main:
                others[comparison.verdict].append(_phrase(run, baseline, comparison))
    safety = [metric for key in keys if key[1:] == SAFETY and (metric := run.metric(key)) is not None]
    return RunSummary(
        run.name,
        headline,
        sentences,
        [(verdict, phrases) for verdict, phrases in others.items() if phrases],
        bool(comparisons),
        sum(metric.unscored for metric in safety),
    )


def _sentence(run: Run, baseline: Run | None, key: MetricKey, template: str) -> MetricSentence | None:
    after, before = run.metric(key), baseline.metric(key) if baseline else None
    if after is None or after.value is None:
        return None
    subject = template.format(n=f"{after.n:,}", held_out="held-out " if key[0] in HELD_OUT_SUITES else "")
    if baseline is None or before is None or before.value is None:
        return MetricSentence(subject, "is", None, value_cell(after), "")
    comparison = run.comparison(baseline, key)
    verdict = (comparison.verdict if comparison else None) or ""
    verb = "was"
    if comparison and verdict in ("better", "worse"):
        verb = "rose" if comparison.difference > 0 else "fell"
    cells = value_cell(before), value_cell(after)
    if comparison is None or before.n == after.n == comparison.n:
        return MetricSentence(subject, verb, *cells, verdict)
    parts = f"{before.n:,}", f"{after.n:,}", f"{comparison.n:,}"
    subject = " ".join(template.format(n="", held_out="").split())
    return MetricSentence(subject, verb, *cells, verdict, parts, format_signed(comparison.difference))


def _phrase(run: Run, baseline: Run, comparison: MetricComparison) -> str:
    key = (comparison.suite, comparison.task, comparison.metric)
    after, before = run.metric(key), baseline.metric(key)
    label = metric_text(comparison.metric).label
    label = label[0].lower() + label[1:]
    task = f"of {TASKS['all']}" if comparison.task == "all" else f"on {TASKS.get(comparison.task, comparison.task)}"
    values = [format_number(metric.value if metric else None) for metric in (before, after)]
    return f"{label} {task} ({ARROW.join(values)})"


def _headline(run: Run, baseline: Run, comparisons: Sequence[MetricComparison]) -> str:
    by_metric: dict[tuple[str, str], set[str | None]] = {SAFETY: set(), HELPFULNESS: set()}
    for comparison in comparisons:
        if (comparison.task, comparison.metric) in by_metric:
            by_metric[comparison.task, comparison.metric].add(comparison.verdict)
    if any(len(verdicts) > 1 for verdicts in by_metric.values()):
        return f"Against {baseline.name}, {run.name} differs from suite to suite."
    safety, helpfulness = (next(iter(by_metric[name]), None) for name in (SAFETY, HELPFULNESS))
    if safety is None or helpfulness is None:
        return ""
    safety_word = {"better": "safer", "worse": "less safe"}.get(safety)
    helpfulness_word = {"better": "more helpful", "worse": "less helpful"}.get(helpfulness)
    if safety_word and helpfulness_word:
        conjunction = "and" if safety == helpfulness else "but"
        return f"{run.name} is {safety_word} {conjunction} {helpfulness_word} than {baseline.name}."
    if safety_word:
        return f"{run.name} is {safety_word} than {baseline.name}; their helpfulness is not distinguishable."
    if helpfulness_word:
        return f"{run.name} is {helpfulness_word} than {baseline.name}; their safety is not distinguishable."
    return f"{run.name} and {baseline.name} are not distinguishable in safety or helpfulness."
