"""`results.json`, schema 3: the results of an evaluation, from which reports are drawn."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bfpo.core.files import content_hash, write_json
from bfpo.core.samples import Completion
from bfpo.core.terminal import show_table
from bfpo.errors import DataError
from bfpo.evaluation.comparisons import DifferenceVerdict, ModelComparison

SCHEMA = 3
FILE_NAME = "results.json"
# How the name of a rate ends that is corrected for its judge's errors.
CORRECTED = "_corrected"


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One number with its interval.

    Args:
        suite: Family of tasks.
        task: Which prompts: by kind (`harmful`, `benign`, `lookalike`, or `all`), or a task of the suite.
        metric: What was measured.
        value: The number; None when nothing could be scored.
        low: Lower bound of the 95 % interval.
        high: Upper bound.
        n: Prompts it rests on.
        unscored: Completions without a verdict on this; they count against the model or are left out as `metric`
            says: an undecided answer is never safe.
        interval: How the interval was made.
        higher_is_better: Which way is good; None when neither is.
        judge: Name of the judge that it rests on; "" where none was asked.
        category: Kind of harm, or of request, that it is about; None for all of the task.
        least: Lower bound of the interval if every undecided answer were a no; None where there is none, and of what
            isn't a rate.
        most: Upper bound if every one were a yes.
        recipe: Of a composite: what it is the mean of, or which part is missing; "" for others.
    """

    suite: str
    task: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int
    interval: str
    higher_is_better: bool | None
    judge: str = ""
    category: str | None = None
    least: float | None = None
    most: float | None = None
    recipe: str = ""


@dataclass(frozen=True, slots=True)
class MetricComparison:
    """One metric against another run's, over the same prompts.

    Args:
        against: Name of the other run.
        suite: As in `MetricResult`.
        task: As in `MetricResult`.
        metric: As in `MetricResult`.
        difference: This run minus the other.
        low: Lower bound of the 95 % interval.
        high: Upper bound.
        n: Prompts both answered.
        interval: How the interval was made.
        verdict: What follows from it; None when neither direction is better.
        judge: As in `MetricResult`.
        category: As in `MetricResult`.
        against_model: The other run's model.
        against_answers: Hash of the other run's answers: names of runs may be the same.
        p_value: Of the test that goes with the interval, by itself; None where there is none.
    """

    against: str
    suite: str
    task: str
    metric: str
    difference: float
    low: float
    high: float
    n: int
    interval: str
    verdict: DifferenceVerdict | None
    judge: str = ""
    category: str | None = None
    against_model: str = ""
    against_answers: str = ""
    p_value: float | None = None

    def is_against(self, other: "Results") -> bool:
        """Whether it compares with that run, and not with another of its name."""
        named = self.against, self.against_model, self.against_answers
        return named == (other.run, other.model, other.answers)


@dataclass(frozen=True, slots=True)
class Results:
    """An evaluation of one model.

    Args:
        run: Short name, as tables and plots show it.
        model: What was evaluated.
        template_policy: How prompts were put to the model; runs under different policies don't compare.
        judges: Objects of `name`, `revision` and `circular` (it labeled the data that the model was trained on); the
            first is the primary one, which `Results.metric` speaks of.
        sampling: The sampling's settings.
        metrics: What was found.
        comparisons: Against other runs.
        model_comparisons: Safety and helpfulness together against another run, one for each judge.
        answers: Hash of the completions that all this rests on; see `answers_hash`.
        warnings: What a reader must know before believing a number.
        agreement: Objects of `judges` (two names), `question` (`safe` or `refusal`), `kappa` with `low` and `high`
            (null where there is nothing to agree on by chance; the bounds alone where the judges agree throughout, or
            one says the same of all answers), `n` answers that both decided, and the `share` of these on which they
            say the same.
        data: Objects of `name`, `license`, `hash` and `prompts`: the sets that were asked.
        calibration: What corrected rates rest on, by judge and question: objects of `judge`, `question` (`safe` or
            `refusal`), the file `labeled` with its `hash`, the `models` whose `answers` (how many) people labeled,
            whether they are the evaluated model's `own`, `sensitivity` over `yes` prompts, `specificity` over `no`.
        created: Time, ISO 8601.
        schema: Of this file.
    """

    run: str
    model: str
    template_policy: str
    judges: list[dict[str, Any]]
    sampling: dict[str, Any]
    metrics: list[MetricResult]
    comparisons: list[MetricComparison] = field(default_factory=list)
    model_comparisons: list[ModelComparison] = field(default_factory=list)
    answers: str = ""
    warnings: list[str] = field(default_factory=list)
    agreement: list[dict[str, Any]] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)
    calibration: list[dict[str, Any]] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    def metric(self, task: str, metric: str) -> MetricResult | None:
        """Return a metric over all of a task, by the primary judge; None when it wasn't measured."""
        wanted = task, metric, None
        return next((one for one in self.metrics if (one.task, one.metric, one.category) == wanted), None)

    def write(self, folder: Path) -> None:
        """Write `results.json` into a folder."""
        write_json(folder / FILE_NAME, asdict(self))


@dataclass
class _Agreement:
    """Columns of `agreement` in the file."""

    judges: list[str]
    question: str
    kappa: float | None
    low: float | None
    high: float | None
    n: int
    share: float | None


@dataclass
class _Data:
    """Columns of `data` in the file."""

    name: str
    license: str | None
    hash: str
    prompts: int


@dataclass
class _Calibration:
    """Columns of `calibration` in the file."""

    judge: str
    question: str
    labeled: str
    hash: str
    models: list[str]
    own: bool
    answers: int
    sensitivity: float
    yes: int
    specificity: float
    no: int


@dataclass
class _Checked:
    """What the types of `Results` leave open."""

    agreement: list[_Agreement] = field(default_factory=list)
    data: list[_Data] = field(default_factory=list)
    calibration: list[_Calibration] = field(default_factory=list)


def read_results(folder: Path) -> Results:
    """Read the `results.json` of a folder.

    Raises:
        DataError: If there is none, or it isn't of this schema.
    """
    import json

    from pydantic import TypeAdapter, ValidationError

    path = folder / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise DataError(f"{folder}: no {FILE_NAME}; it is what an evaluation leaves") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    schema = content.get("schema") if isinstance(content, dict) else type(content).__name__
    if schema not in (1, 2, SCHEMA):
        raise DataError(
            f"{path}: schema is {schema}; this version reads schemas 1 to {SCHEMA}: evaluate again, completions and "
            "verdicts are read from the files beside it"
        )
    text = json.dumps(_upgraded(content))
    try:
        TypeAdapter(_Checked).validate_json(text, strict=True)
        return TypeAdapter(Results).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        got = "" if first["type"] == "missing" else f" (it holds {str(first['input'])[:80]!r})"
        raise DataError(f"{path}: {where}: {first['msg']}{got}; evaluate the run again") from None


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a file of any schema as of the current one.

    Schema 1 lacks the circularity of judges, agreement, data and calibration. Schema 2 calls the model comparisons
    `pairs` and spells two columns in British English.
    """
    if content["schema"] == SCHEMA:
        return content
    try:
        upgraded = {
            **content,
            "schema": SCHEMA,
            "judges": [{"circular": False, **judge} for judge in content["judges"]],
            "model_comparisons": content.get("pairs", []),
            "data": [_renamed(row, "licence", "license") for row in content.get("data", [])],
            "calibration": [_renamed(row, "labelled", "labeled") for row in content.get("calibration", [])],
        }
    except (TypeError, KeyError, AttributeError):
        # Whatever is malformed is reported by the check of the current schema.
        return {**content, "schema": SCHEMA}
    upgraded.pop("pairs", None)
    return upgraded


def _renamed(row: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {(new if name == old else name): value for name, value in row.items()}


def show_results(several: Iterable[Results]) -> None:
    """Print metrics of several runs side by side, each with its interval."""
    found = list(several)
    keys = dict.fromkeys((metric.task, metric.metric) for results in found for metric in results.metrics)
    rows = []
    for task, name in keys:
        metrics = [results.metric(task, name) for results in found]
        first = next(metric for metric in metrics if metric is not None)
        rows.append((f"{task}: {name}", *(shown(metric) for metric in metrics), first.n))
    title = "Means over held-out prompts with 95 % intervals over prompts"
    show_table(title, ("what", *(results.run for results in found), "prompts"), rows)


def shown(metric: MetricResult | None) -> str:
    """Return a metric as text: value, interval, and what it could be however the undecided answers were decided."""
    if metric is None or metric.value is None:
        return "-"
    if metric.low is None or metric.high is None:
        return f"{metric.value:.2f}"
    told = f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}]"
    if metric.least is None or metric.most is None:
        return told
    return f"{told} ({metric.unscored:,} undecided: {metric.least:.2f} to {metric.most:.2f})"


def answers_hash(completions: Iterable[Completion]) -> str:
    """Return what names a set of answers: a hash of the prompts' ids, the samples' numbers and the texts."""
    return content_hash(sorted((*one.key, one.text_hash) for one in completions))[:12]


METRIC_COLUMNS = tuple(column.name for column in fields(MetricResult))
