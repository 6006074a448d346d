"""`results.json`, schema 3: the results of an evaluation, which reports show."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bfpo.core.files import content_hash, parse_json, write_json
from bfpo.core.samples import Completion
from bfpo.data.guard_summary import GuardSummary
from bfpo.errors import DataError
from bfpo.evaluation.comparisons import DifferenceVerdict, ModelComparison

SCHEMA = 3
FILE_NAME = "results.json"
# Where the folder of a run has its evaluation.
EVALUATION_FOLDER = "evaluation"
# Suffix of rates that are corrected for their judge's errors.
CORRECTED = "_corrected"


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One metric with its interval.

    Args:
        suite: Name of the suite.
        task: Kind of the prompts (`harmful`, `benign`, `lookalike`, or `all`), or a task of the suite.
        metric: Name of the metric.
        value: Value; None if nothing could be scored.
        low: Lower bound of the 95 % interval.
        high: Upper bound.
        n: Number of prompts.
        unscored: Number of completions without a verdict on the metric. An undecided completion counts as not safe;
            other metrics leave it out.
        interval: Method of the interval.
        higher_is_better: Whether higher is better; None when neither is.
        judge: Name of the judge; empty if the metric needs none.
        category: Category of the prompts; None for all prompts of the task.
        least: Lower bound of the interval if every undecided completion counted as 0; None without undecided ones,
            and for metrics that are neither rates nor win rates.
        most: Upper bound if every one counted as 1.
        recipe: For a composite index: the metrics that it is the mean of, or the missing part; else empty.
        smallest_part: Number of prompts of the part with the fewest, for a composite; else None.
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
    smallest_part: int | None = None


@dataclass(frozen=True, slots=True)
class MetricComparison:
    """One metric compared with a baseline's, over the same prompts.

    Args:
        against: Name of the baseline.
        suite: As in `MetricResult`.
        task: As in `MetricResult`.
        metric: As in `MetricResult`.
        difference: This run minus the baseline.
        low: Lower bound of the 95 % interval.
        high: Upper bound.
        n: Number of prompts that both answered.
        interval: Method of the interval.
        verdict: Verdict on the difference; None when neither direction is better.
        judge: As in `MetricResult`.
        category: As in `MetricResult`.
        against_model: Model of the baseline.
        against_answers: Hash of the baseline's completions; names of runs may be equal.
        p_value: P-value of the test that belongs to the interval, not adjusted; None without one.
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
        """Return whether the baseline is that run, and not another with its name."""
        baseline = self.against, self.against_model, self.against_answers
        return baseline == (other.run, other.model, other.answers)


@dataclass(frozen=True, slots=True)
class AgreementResult:
    """Agreement of two judges on one question, over the completions that both decided.

    Args:
        judges: Names of the two judges.
        question: `safe` or `refusal`.
        kappa: Cohen's kappa; None where it is undefined.
        low: Lower bound of the 95 % interval; None where the judges agree throughout, or one of them has the same
            verdict on every completion.
        high: Upper bound.
        n: Number of completions.
        share: Share of completions on which the verdicts are equal, in [0, 1]; None without completions.
    """

    judges: list[str]
    question: str
    kappa: float | None
    low: float | None
    high: float | None
    n: int
    share: float | None


@dataclass(frozen=True, slots=True)
class TaskData:
    """Data of one task. Fields that are None are left out of the file, except `license`.

    Args:
        name: `SUITE/TASK`.
        license: License of the data; None if unknown.
        hash: Hash of the prompts or rows that were used.
        prompts: Number of prompts or rows that were used.
        source: Key of `bfpo.data.prompt_sets.PROMPT_SETS`, or `lm-eval`.
        origin: Path, or hub id with revision (`from` in the file).
        published: Number of prompts or rows of the data (`of` in the file).
        compared_with: Generators of the outputs that completions are compared with.
        references_hash: Hash of these outputs.
        file_sha256: Hash of the local file.
        lm_eval: Version of lm-eval.
        version: Version of the lm-eval task.
        few_shot: Number of examples in the prompt.
        template_policy: How prompts of the lm-eval task are given to the model.
        kept_in: File with the results of the lm-eval task, relative to the folder of the evaluation.
        attack: Name and hash of the attack on the prompts, `LABEL@HASH`; its files are in `attack-LABEL@HASH`.
    """

    name: str
    license: str | None
    hash: str
    prompts: int
    source: str | None = None
    origin: str | None = None
    published: int | None = None
    compared_with: list[str] | None = None
    references_hash: str | None = None
    file_sha256: str | None = None
    lm_eval: str | None = None
    version: int | float | str | None = None
    few_shot: int | None = None
    template_policy: str | None = None
    kept_in: str | None = None
    attack: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the row of the file."""
        values = {name: value for name, value in asdict(self).items() if value is not None or name == "license"}
        return _rename(values, _DATA_KEYS)


# Fields whose keys in the file are words of their own in Python.
_DATA_KEYS = {"origin": "from", "published": "of"}


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """Errors of one judge on one question, measured on answers with human labels.

    Args:
        judge: Name of the judge.
        question: `safe` or `refusal`.
        labeled: Name of the file of labeled answers.
        hash: Hash of the file.
        models: Models that gave the labeled answers.
        own: Whether they are answers of the evaluated model.
        answers: Number of labeled answers.
        sensitivity: Share of the `yes` answers that the judge calls so, in [0, 1].
        yes: Number of prompts whose answers the annotators call `safe` or a `refusal`.
        specificity: Share of the other answers that the judge calls so, in [0, 1].
        no: Number of prompts of the other answers.
    """

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


@dataclass(frozen=True, slots=True)
class ReasoningResult:
    """How the verdicts of one judge on answers and on their reasoning go together, in numbers of completions.

    Args:
        judge: Name of the judge.
        completions: Completions with reasoning.
        both_safe: Answer and reasoning are safe.
        safe_answer_unsafe_reasoning: Safe answers after unsafe reasoning.
        unsafe_answer_safe_reasoning: Unsafe answers after safe reasoning.
        both_unsafe: Answer and reasoning are unsafe.
        undecided: Either verdict is undecided, or there is no answer.
    """

    judge: str
    completions: int
    both_safe: int
    safe_answer_unsafe_reasoning: int
    unsafe_answer_safe_reasoning: int
    both_unsafe: int
    undecided: int


@dataclass(frozen=True, slots=True)
class LanguageResult:
    """One metric over the prompts in one language; the other fields are as in `MetricResult`.

    Args:
        language: Language of the prompts.
    """

    language: str
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
    least: float | None = None
    most: float | None = None

    @classmethod
    def of(cls, language: str, metric: MetricResult) -> "LanguageResult":
        """Return a metric over the prompts in a language."""
        names = [column.name for column in fields(cls) if column.name != "language"]
        return cls(language, **{name: getattr(metric, name) for name in names})


@dataclass(frozen=True, slots=True)
class Results:
    """Results of the evaluation of one model.

    Args:
        run: Short name, as in tables and plots.
        model: Name of the model.
        template_policy: How prompts are given to the model; runs under different policies can't be compared.
        judges: Objects of `name`, `revision` and `circular` (the judge labeled the model's training data, or is
            the guard's), and of `reads` if that isn't the answer; the first is the primary judge, which
            `Results.metric` uses.
        sampling: Sampling settings.
        metrics: Metrics of all suites and judges.
        comparisons: Comparisons of metrics with a baseline.
        model_comparisons: Comparisons with a baseline in safety and helpfulness together, one for each judge.
        answers: Hash of the completions; see `answers_hash`.
        warnings: Warnings that a reader needs before relying on the numbers.
        agreement: Agreement of every two judges.
        data: Data of the tasks.
        calibration: Errors of the judges that corrected rates rest on.
        reasoning: Answers and their reasoning, by each judge that read both separately.
        languages: Metrics by the language of the prompts, where a suite has several languages.
        guard: What a guard did that samples and judges; None without one.
        created: Time, ISO 8601.
        schema: Schema of the file.
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
    agreement: list[AgreementResult] = field(default_factory=list)
    data: list[TaskData] = field(default_factory=list)
    calibration: list[CalibrationResult] = field(default_factory=list)
    reasoning: list[ReasoningResult] = field(default_factory=list)
    languages: list[LanguageResult] = field(default_factory=list)
    guard: GuardSummary | None = None
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    def metric(self, task: str, metric: str) -> MetricResult | None:
        """Return a metric over all prompts of a task: of the first suite and judge that have it; None if none has."""
        for result in self.metrics:
            if (result.task, result.metric, result.category) == (task, metric, None):
                return result
        return None

    def write(self, folder: Path) -> None:
        """Write `results.json` into a folder."""
        write_json(folder / FILE_NAME, asdict(self) | {"data": [row.to_json() for row in self.data]})


@cache
def _results_adapter() -> TypeAdapter[Results]:
    return TypeAdapter(Results)


def read_results(folder: Path) -> Results:
    """Read the `results.json` of a folder, of this or an earlier schema.

    Raises:
        DataError: If the file is missing, malformed, or of a later schema.
    """
    path = folder / FILE_NAME
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder}: no {FILE_NAME}; evaluate the run first") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    schema = content.get("schema") if isinstance(content, dict) else type(content).__name__
    if schema not in (1, 2, SCHEMA):
        raise DataError(
            f"{path}: schema is {schema}; this version reads schemas 1 to {SCHEMA}: evaluate again, which reuses "
            "the completions and verdicts of the folder"
        )
    try:
        results = _results_adapter().validate_json(json.dumps(_to_fields(content)), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        got = "" if first["type"] == "missing" else f" (it holds {str(first['input'])[:80]!r})"
        raise DataError(f"{path}: {where}: {first['msg']}{got}; evaluate the run again") from None
    for index, judge in enumerate(results.judges):
        if not (isinstance(judge.get("name"), str) and isinstance(judge.get("revision"), str)):
            raise DataError(f"{path}: judges.{index}: expected a name and a revision, two strings; evaluate again")
    return results


def _to_fields(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a file of any schema, by the names of the fields of `Results`.

    Schema 1 lacks the circularity of judges, agreement, data and calibration. Schema 2 calls the model comparisons
    `pairs` and spells two keys in British English.
    """
    data_fields = {key: name for name, key in _DATA_KEYS.items()} | {"licence": "license"}
    try:
        upgraded = {
            **content,
            "schema": SCHEMA,
            "judges": [{"circular": False, **judge} for judge in content["judges"]],
            "model_comparisons": content.get("pairs", content.get("model_comparisons", [])),
            "data": [_rename(row, data_fields) for row in content.get("data", [])],
            "calibration": [_rename(row, {"labelled": "labeled"}) for row in content.get("calibration", [])],
        }
    except (TypeError, KeyError, AttributeError):
        # Malformed content is reported by the validation.
        return {**content, "schema": SCHEMA}
    upgraded.pop("pairs", None)
    return upgraded


def _rename(row: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in row.items()}


def format_metric(metric: MetricResult | None) -> str:
    """Return a metric as text: value, interval, and the bounds that the undecided completions leave."""
    if metric is None or metric.value is None:
        return "-"
    if metric.low is None or metric.high is None:
        return f"{metric.value:.2f}"
    text = f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}]"
    if metric.least is None or metric.most is None:
        return text
    return f"{text} ({metric.unscored:,} undecided: {metric.least:.2f} to {metric.most:.2f})"


def answers_hash(completions: Iterable[Completion]) -> str:
    """Return a hash of completions: of their prompt ids, sample numbers and texts."""
    return content_hash(sorted((*completion.key, completion.text_hash) for completion in completions))[:12]


METRIC_COLUMNS = tuple(column.name for column in fields(MetricResult))
