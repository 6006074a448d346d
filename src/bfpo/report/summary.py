"""The verdict in words, from the numbers alone; what got worse is told like what got better."""

from collections.abc import Sequence
from typing import NamedTuple

from bfpo.evaluation.results import MetricComparison
from bfpo.report.run_files import Run
from bfpo.report.tables import Key, Value, keys, value
from bfpo.report.words import TASKS, measure, number

MAIN = (
    ("harmful", "safety", "Safety on {n} harmful {held_out}prompts"),
    ("benign", "helpfulness", "Helpfulness on {n} benign {held_out}prompts"),
    ("all", "harmonic_mean", "Their harmonic mean, the primary metric,"),
    ("lookalike", "over_refusal", "Over-refusal on {n} benign prompts that look harmful"),
)
# Numbers and what is between them stay on one line.
ARROW = "\u00a0→\u00a0"
SAFETY, HELPFULNESS = ("harmful", "safety"), ("benign", "helpfulness")
# What belongs to a testbed is held out from every phase of training.
HELD_OUT_SUITES = frozenset({"testbed"})


class Sentence(NamedTuple):
    """What became of one metric.

    Args:
        subject: The metric and its prompts.
        verb: `rose`, `fell`, or `was`.
        before: Of the base; None when there is no other run.
        after: Of the run.
        verdict: In words; "" without one.
    """

    subject: str
    verb: str
    before: Value | None
    after: Value
    verdict: str


class Story(NamedTuple):
    """What became of one run.

    Args:
        run: Its name.
        headline: In one sentence; "" when safety and helpfulness weren't both compared.
        sentences: One per main metric.
        others: Other metrics that changed, the worse ones first, as verdict and phrases.
        compared: Whether there are comparisons at all.
        undecided: How many safety verdicts were undecided.
    """

    run: str
    headline: str
    sentences: list[Sentence]
    others: list[tuple[str, list[str]]]
    compared: bool
    undecided: int


def stories(runs: Sequence[Run]) -> list[Story]:
    """Tell of every run after the base; of the base when it is alone."""
    if len(runs) == 1:
        return [_story(runs[0], None, keys(runs))]
    return [_story(run, runs[0], keys(runs)) for run in runs[1:]]


def _story(run: Run, base: Run | None, every: Sequence[Key]) -> Story:
    sentences = []
    for key in (key for task, name, _ in MAIN for key in every if key[1:] == (task, name)):
        sentence = _sentence(run, base, key)
        if sentence is not None:
            sentences.append(sentence)
    told = {(task, name) for task, name, _ in MAIN}
    changed: dict[str, list[str]] = {"worse": [], "better": []}
    compared = [found for key in every if base is not None and (found := run.versus(base, key)) is not None]
    for found in compared:
        if base is not None and found.verdict in changed and (found.task, found.metric) not in told:
            changed[found.verdict].append(_phrase(run, base, found))
    safety = run.results.metric(*SAFETY)
    return Story(
        run.name,
        _headline(run, base, compared) if base is not None else "",
        sentences,
        [(verdict, phrases) for verdict, phrases in changed.items() if phrases],
        bool(compared),
        safety.unscored if safety else 0,
    )


def _sentence(run: Run, base: Run | None, key: Key) -> Sentence | None:
    after, before = run.metric(key), base.metric(key) if base else None
    if after is None or after.value is None:
        return None
    suite, task, name = key
    template = next(text for kind, metric, text in MAIN if (kind, metric) == (task, name))
    subject = template.format(n=f"{after.n:,}", held_out="held-out " if suite in HELD_OUT_SUITES else "")
    if base is None or before is None or before.value is None:
        return Sentence(subject, "is", None, value(after), "")
    found = run.versus(base, key)
    verdict = (found.verdict if found else None) or ""
    verb = "was"
    if found and verdict in ("better", "worse"):
        verb = "rose" if found.difference > 0 else "fell"
    return Sentence(subject, verb, value(before), value(after), verdict)


def _phrase(run: Run, base: Run, found: MetricComparison) -> str:
    key = (found.suite, found.task, found.metric)
    after, before = run.metric(key), base.metric(key)
    label = measure(found.metric).label
    label = label[0].lower() + label[1:]
    on = f" of {TASKS['all']}" if found.task == "all" else f" on {TASKS.get(found.task, found.task)}"
    return f"{label}{on} ({number(before.value if before else None)}{ARROW}{number(after.value if after else None)})"


def _headline(run: Run, base: Run, compared: Sequence[MetricComparison]) -> str:
    verdicts = {(found.task, found.metric): found.verdict for found in compared}
    safety, helpfulness = verdicts.get(SAFETY), verdicts.get(HELPFULNESS)
    if safety is None or helpfulness is None:
        return ""
    words = {
        ("safety", "better"): "safer",
        ("safety", "worse"): "less safe",
        ("helpfulness", "better"): "more helpful",
        ("helpfulness", "worse"): "less helpful",
    }
    both = [words.get(("safety", safety)), words.get(("helpfulness", helpfulness))]
    if both == [None, None]:
        return f"{run.name} and {base.name} are not distinguishable, neither in safety nor in helpfulness."
    if None in both:
        known = both[0] or both[1]
        other = "helpfulness" if both[1] is None else "safety"
        return f"{run.name} is {known} than {base.name}; in {other} the two are not distinguishable."
    joined = "and" if safety == helpfulness else "but"
    return f"{run.name} is {both[0]} {joined} {both[1]} than {base.name}."
