"""Numbers by judge and by category, how far judges agree, and what a reader must know first."""

from collections.abc import Sequence
from typing import NamedTuple

from bfpo.core.samples import KINDS
from bfpo.evaluation.results import CORRECTED, MetricResult
from bfpo.report.run_files import Run
from bfpo.report.tables import Key, Value, value
from bfpo.report.words import MISSING, TASKS, interval, measure, number

MAIN = (
    ("harmful", "safety"),
    ("harmful", "refusal"),
    ("benign", "helpfulness"),
    ("benign", "over_refusal"),
    ("lookalike", "over_refusal"),
    ("all", "harmlessness_index"),
    ("all", "helpfulness_index"),
)
# Most of the color that a cell of the heat map takes on: the number on it stays readable.
DEEPEST = 40


class ByJudge(NamedTuple):
    """The main numbers of a run by one judge.

    Args:
        place: Of the run on the page.
        judge: Its name, or its name and that they are corrected for what it gets wrong.
        circular: Whether it labeled what the model was trained on.
        borrowed: Whether they are corrected by its errors on other models' answers.
        values: One per column.
    """

    place: int
    judge: str
    circular: bool
    borrowed: bool
    values: list[Value]


class Heat(NamedTuple):
    """A category with one number per run.

    Args:
        task: Its prompts.
        category: Its name.
        metric: What is shown.
        cells: Value and how deep its color is, in percent.
        prompts: How many it rests on.
    """

    task: str
    category: str
    metric: str
    cells: list[tuple[Value, int]]
    prompts: int


class AgreementRow(NamedTuple):
    """How far two judges agree on a question about a run's answers, as texts."""

    run: str
    judges: str
    question: str
    answers: str
    share: str
    kappa: str


def columns(runs: Sequence[Run]) -> list[Key]:
    """Return suite, task and name of the main numbers that some run has."""
    every = [(one.suite, one.task, one.metric) for run in runs for one in run.results.metrics if one.judge]
    return [key for main in MAIN for key in dict.fromkeys(every) if key[1:] == main]


def column_name(key: Key, *, with_suite: bool) -> str:
    """Return how a column is headed."""
    suite, task, metric = key
    name = measure(metric).label if task == "all" else f"{measure(metric).label}, {TASKS.get(task, task)}"
    return f"{suite}: {name}" if with_suite else name


def by_judge(runs: Sequence[Run]) -> list[ByJudge]:
    """Return the main numbers by run and judge, safety, refusals and helpfulness side by side."""
    found = []
    for place, run in enumerate(runs):
        for judge in run.results.judges:
            name = str(judge.get("name", ""))
            borrowed = any(one.judge == name and not one.own for one in run.results.calibration)
            circular = bool(judge.get("circular"))
            of = {(one.suite, one.task, one.metric): one for one in run.results.metrics if _is(one, name)}
            for called, ending in ((name, ""), (f"{name}, corrected", CORRECTED)):
                metrics = [of.get((suite, task, metric + ending)) for suite, task, metric in columns(runs)]
                if any(one is not None for one in metrics):
                    values = [value(one) for one in metrics]
                    found.append(ByJudge(place, called, circular, borrowed and ending != "", values))
    return found


def recipes(runs: Sequence[Run]) -> list[str]:
    """Return what each composite number is the mean of, or what it lacks; with names where the runs differ."""
    told: dict[str, list[str]] = {}
    for run in runs:
        for one in run.results.metrics:
            if one.recipe:
                names = told.setdefault(f"{measure(one.metric).label} of {one.suite}: {one.recipe}.", [])
                names += [run.name] if run.name not in names else []
    return [text if len(names) == len(runs) else f"{', '.join(names)}: {text}" for text, names in told.items()]


def _is(one: MetricResult, judge: str) -> bool:
    return one.judge == judge and one.category is None


def heat_map(runs: Sequence[Run]) -> list[Heat]:
    """Return safety by category of harm, over-refusal by category of harmless prompts, by each run's first judge."""
    found = []
    tables = []
    for run in runs:
        table: dict[tuple[str, str, str, str], MetricResult] = {}
        for one in run.results.metrics:
            if one.category is not None and one.metric in ("safety", "over_refusal"):
                table.setdefault((one.suite, one.task, one.category, one.metric), one)
        tables.append(table)
    for key in dict.fromkeys(key for table in tables for key in table):
        cells, prompts = [], 0
        for table in tables:
            cell = table.get(key)
            bad = 0.0 if cell is None or cell.value is None else 1 - cell.value if key[3] == "safety" else cell.value
            cells.append((value(cell), round(DEEPEST * min(1.0, max(0.0, bad)))))
            prompts = max(prompts, cell.n if cell else 0)
        task = TASKS.get(key[1], key[1]) if key[1] in KINDS else f"{key[0]}: {key[1]}"
        found.append(Heat(task, key[2], measure(key[3]).label, cells, prompts))
    return found


def agreements(runs: Sequence[Run]) -> list[AgreementRow]:
    """Return how far the judges of each run agree."""
    found = []
    for run in runs:
        for one in run.results.agreement:
            kappa = f"{number(one.kappa)} {interval(one.low, one.high)}".strip()
            share = MISSING if one.share is None else f"{one.share:.0%}"
            pair = " and ".join(one.judges)
            found.append(AgreementRow(run.name, pair, one.question, f"{one.n:,}", share, kappa))
    return found


def warnings_of_results(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return what a reader must know before believing a number: the runs it is about, and a text."""
    told: dict[str, list[str]] = {}
    for run in runs:
        for text in run.results.warnings:
            told.setdefault(text, []).append(run.name)
        circular = [str(judge.get("name")) for judge in run.results.judges if judge.get("circular")]
        if circular and not any(text.startswith("Circular") for text in run.results.warnings):
            text = f"Circular: {', '.join(circular)} labeled the data that the model was trained on."
            told.setdefault(text, []).append(run.name)
        undecided = sum(
            one.unscored for one in run.results.metrics if one.metric == "safety" and one.category is None
        )
        if undecided and not any("undecided" in text for text in run.results.warnings):
            told.setdefault("Some safety verdicts are undecided; they count as not safe.", []).append(run.name)
    return [("" if len(names) == len(runs) else ", ".join(names), text) for text, names in told.items()]
