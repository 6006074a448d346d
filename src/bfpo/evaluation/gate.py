"""Gates: bounds on the metrics of an evaluation, decided by their intervals."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import model_validator

from bfpo.config.loading import check_recipe, parse_yaml
from bfpo.config.recipes import Section
from bfpo.core.samples import KINDS
from bfpo.core.terminal import say, show_table
from bfpo.errors import GateViolated, RecipeError, did_you_mean
from bfpo.evaluation.attacks import attack_metrics
from bfpo.evaluation.correction import QUESTIONS
from bfpo.evaluation.lm_eval.tasks import listed_metrics
from bfpo.evaluation.metric_specs import DERIVED_METRICS, METRICS_OF_REASONING, metrics_of
from bfpo.evaluation.results import CORRECTED, MetricResult, Results, format_metric
from bfpo.evaluation.suite import INDICES, Task
from bfpo.evaluation.suite_scores import LENGTH_CONTROLLED, LENGTH_CONTROLLED_APPROXIMATE, ORDER_DECIDES, WIN_RATE
from bfpo.stats.intervals import MIN_PROMPTS

BoundState = Literal["passed", "violated", "undecided"]


class Bound(Section):
    """A bound on one metric."""

    suite: str
    """Name of the suite."""
    task: str
    """Task of the suite, or `harmful`, `benign`, `lookalike`, `all`."""
    metric: str
    """Name of the metric."""
    judge: str | None = None
    """Judge that the metric rests on; default the primary judge."""
    category: str | None = None
    """Category of the prompts; default all prompts of the task."""
    min: float | None = None
    """Smallest allowed value."""
    max: float | None = None
    """Largest allowed value."""

    @model_validator(mode="after")
    def _has_limit(self) -> "Bound":
        if self.min is None and self.max is None:
            raise ValueError("expected min or max")
        return self

    def __str__(self) -> str:
        """Return the bound as one line."""
        limits = [] if self.min is None else [f">= {self.min:g}"]
        limits += [] if self.max is None else [f"<= {self.max:g}"]
        category = f" [{self.category}]" if self.category else ""
        judge = f" by {self.judge}" if self.judge else ""
        return f"{self.suite}/{self.task}{category} {self.metric}{judge} {' and '.join(limits)}"


class _Gate(Section):
    bounds: list[Bound]
    """The bounds."""


class BoundResult(NamedTuple):
    """A bound with the metric that it is about.

    Args:
        bound: The bound.
        metric: The metric.
        state: `violated` or `passed` if the whole interval is on one side of the bound and the metric has at least
            `MIN_PROMPTS` prompts, else `undecided`.
        reason: Reason of an undecided bound, if its interval isn't the reason; else "".
    """

    bound: Bound
    metric: MetricResult
    state: BoundState
    reason: str = ""

    @property
    def text(self) -> str:
        """The state with its reason."""
        return f"{self.state}: {self.reason}" if self.reason else self.state


def read_gate(path: str) -> list[Bound]:
    """Read the bounds of a file: a list, or a mapping with the list as `bounds:`.

    Raises:
        RecipeError: If the file is missing or malformed.
    """
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"gate {path}: {error}") from None
    return check_recipe(content if isinstance(content, dict) else {"bounds": content}, _Gate, path).bounds


def check_bounds(
    bounds: Sequence[Bound],
    tasks: Sequence[Task],
    lm_eval: Mapping[str, str],
    *,
    corrected: bool = False,
    length_controlled: bool = False,
    with_indices: Collection[str] = (),
) -> None:
    """Check that each bound is on a task that is run and on a metric that it has.

    Args:
        bounds: The bounds.
        tasks: Judged tasks.
        lm_eval: `SUITE/TASK` → lm-eval's name of the task.
        corrected: Whether rates are corrected for the judges' errors too.
        length_controlled: Whether AlpacaEval's length-controlled win rate is computed.
        with_indices: Names of the suites with indices.

    Raises:
        RecipeError: If a task or a metric is unknown.
    """
    names = {f"{task.suite}/{name}" for task in tasks for name in (task.name, task.kind, "all")}
    names |= {f"{suite}/all" for suite in with_indices}
    measured = {spec.name for kind in KINDS for spec in (*metrics_of(kind), *METRICS_OF_REASONING)}
    measured |= {*DERIVED_METRICS, *INDICES}
    if any(task.references for task in tasks):
        measured |= {WIN_RATE.name, ORDER_DECIDES.name}
    measured |= {LENGTH_CONTROLLED} if length_controlled else set()
    measured |= attack_metrics([task.attack for task in tasks if task.attack is not None])
    calibrated = {name + CORRECTED for name in QUESTIONS}
    measured |= calibrated if corrected else set()
    for bound in bounds:
        name = f"{bound.suite}/{bound.task}"
        if name not in names | lm_eval.keys():
            raise RecipeError(f"gate: no task {name}; {did_you_mean(name, sorted({*names, *lm_eval}))}")
        if bound.metric in calibrated - measured:
            raise RecipeError(f"gate: metric '{bound.metric}' needs answers with human labels; set `calibration:`")
        if bound.metric == LENGTH_CONTROLLED_APPROXIMATE:
            raise RecipeError(
                f"gate: metric '{bound.metric}' is an approximation, which decides no bound; name the files of "
                f"`length_control:`, and '{LENGTH_CONTROLLED}' here"
            )
        if bound.metric == LENGTH_CONTROLLED and LENGTH_CONTROLLED not in measured:
            raise RecipeError(f"gate: metric '{bound.metric}' needs AlpacaEval's files; set `length_control:`")
        # The metrics of a group of lm-eval aren't known before it is run.
        metrics = listed_metrics(lm_eval[name]) if name in lm_eval else measured
        metric = bound.metric.partition(" (")[0] if name in lm_eval else bound.metric
        if metrics and metric not in metrics:
            raise RecipeError(f"gate: metric '{bound.metric}'; {did_you_mean(metric, sorted(metrics))}")


def evaluate_bounds(results: Results, bounds: Sequence[Bound]) -> list[BoundResult]:
    """Compare metrics with their bounds.

    Raises:
        RecipeError: If a bound is on a metric that the results don't have.
    """
    return [_evaluate_bound(bound, _find_metric(results, bound)) for bound in bounds]


def enforce_bounds(results: Results, bounds: Sequence[Bound]) -> None:
    """Show the state of each bound.

    Raises:
        RecipeError: If a bound is on a metric that the results don't have.
        GateViolated: If a bound is violated with confidence.
    """
    bound_results = evaluate_bounds(results, bounds)
    rows = [
        (str(result.bound), format_metric(result.metric), result.metric.n, result.text) for result in bound_results
    ]
    show_table("Gate: decided only where the whole interval is on one side", ("bound", "value", "n", "state"), rows)
    violated = [result for result in bound_results if result.state == "violated"]
    if violated:
        reasons = "; ".join(f"{result.bound}, found {format_metric(result.metric)}" for result in violated)
        raise GateViolated(f"{len(violated)} of {len(bound_results)} bounds are violated: {reasons}")
    if undecided := sum(result.state == "undecided" for result in bound_results):
        say(f"{undecided} of {len(bound_results)} bounds are undecided; more prompts or samples would decide them")


def _find_metric(results: Results, bound: Bound) -> MetricResult:
    def full_name(metric: MetricResult) -> str:
        return f"{metric.suite}/{metric.task} {metric.metric}"

    name = f"{bound.suite}/{bound.task} {bound.metric}"
    candidates = [metric for metric in results.metrics if full_name(metric) == name]
    if not candidates:
        names = list(dict.fromkeys(map(full_name, results.metrics)))
        raise RecipeError(f"gate: there is no {name}; {did_you_mean(name, names)}")
    primary = results.judges[0]["name"] if results.judges else ""
    judges = {bound.judge} if bound.judge is not None else {"", primary}
    for metric in candidates:
        if metric.category == bound.category and metric.judge in judges:
            return metric
    if bound.category not in {metric.category for metric in candidates}:
        categories = sorted({metric.category for metric in candidates if metric.category})
        raise RecipeError(f"gate: {bound}: no such category; {did_you_mean(str(bound.category), categories)}")
    others = sorted({metric.judge for metric in candidates})
    if bound.judge is None:
        raise RecipeError(
            f"gate: {bound}: the primary judge {primary} doesn't measure it; set `judge:` to one of "
            f"{', '.join(others)}"
        )
    raise RecipeError(f"gate: {bound}: no such judge; {did_you_mean(bound.judge, others)}")


def _evaluate_bound(bound: Bound, metric: MetricResult) -> BoundResult:
    if metric.value is None:
        return BoundResult(bound, metric, "undecided")
    prompts = metric.n if metric.smallest_part is None else metric.smallest_part
    if prompts < MIN_PROMPTS:
        noun = "prompt" if prompts == 1 else "prompts"
        part = "" if metric.smallest_part is None else " in its smallest part"
        return BoundResult(bound, metric, "undecided", f"{prompts} {noun}{part}, {MIN_PROMPTS} needed")
    low, high = metric.low, metric.high
    if low is None or high is None:
        return BoundResult(bound, metric, "undecided", "the metric has no interval")
    is_violated = (bound.min is not None and high < bound.min) or (bound.max is not None and low > bound.max)
    is_passed = (bound.min is None or low >= bound.min) and (bound.max is None or high <= bound.max)
    return BoundResult(bound, metric, "violated" if is_violated else "passed" if is_passed else "undecided")
