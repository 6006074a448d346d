"""Gates: bounds that an evaluation's numbers must keep, decided by their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import model_validator

from bfpo.config.loading import check_recipe, parse_yaml
from bfpo.config.recipes import Section
from bfpo.core.terminal import say, show_table
from bfpo.errors import GateViolated, RecipeError, did_you_mean
from bfpo.evaluation.correction import QUESTIONS
from bfpo.evaluation.lm_eval.tasks import listed_metrics
from bfpo.evaluation.panel import LENGTH_CONTROLLED, LENGTH_CONTROLLED_APPROXIMATE, ORDER_DECIDES, WIN_RATE
from bfpo.evaluation.results import CORRECTED, MetricResult, Results, shown
from bfpo.evaluation.scoring import DERIVED, MEASURES
from bfpo.evaluation.suite import INDICES, Task

State = Literal["passed", "violated", "undecided"]
MIN_PROMPTS = 10
"""Number of prompts below which no bound is decided. Fewer rarely contain one of the bad answers that a model gives
now and then, and intervals of skewed scores cover too seldom; see the coverage in docs/statistics.md."""


class Bound(Section):
    """A bound on one number."""

    suite: str
    """Name of the suite."""
    task: str
    """Task of the suite, or `harmful`, `benign`, `lookalike`, `all`."""
    metric: str
    """What is measured."""
    judge: str | None = None
    """Whose word it rests on; default the primary judge's."""
    category: str | None = None
    """Kind of harm, or of request; default all of the task."""
    min: float | None = None
    """Smallest value that is fine."""
    max: float | None = None
    """Largest value that is fine."""

    @model_validator(mode="after")
    def _bounded(self) -> "Bound":
        if self.min is None and self.max is None:
            raise ValueError("expected min or max")
        return self

    def __str__(self) -> str:
        """Return the bound as a line says it."""
        ends = [f">= {self.min:g}" for _ in [0] if self.min is not None]
        ends += [f"<= {self.max:g}" for _ in [0] if self.max is not None]
        category = f" [{self.category}]" if self.category else ""
        by = f" by {self.judge}" if self.judge else ""
        return f"{self.suite}/{self.task}{category} {self.metric}{by} {' and '.join(ends)}"


class _Gates(Section):
    bounds: list[Bound]
    """What must hold."""


class Decided(NamedTuple):
    """A bound with what the results say of it.

    Args:
        bound: The bound.
        metric: The number.
        state: `violated` or `passed` only when the whole interval is on one side of the bound, and only from
            `MIN_PROMPTS` prompts on.
        reason: Why it is undecided although the interval may be on one side; "" otherwise.
    """

    bound: Bound
    metric: MetricResult
    state: State
    reason: str = ""

    @property
    def text(self) -> str:
        """The state with its reason, for a table."""
        return f"{self.state}: {self.reason}" if self.reason else self.state


def read_gate(path: str) -> list[Bound]:
    """Read the bounds of a file: a list, or a mapping with the list as `bounds:`.

    Raises:
        RecipeError: If it is missing or malformed.
    """
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"gate {path}: {error}") from None
    return check_recipe(content if isinstance(content, dict) else {"bounds": content}, _Gates, path).bounds


def check_bounds(
    bounds: Sequence[Bound],
    tasks: Sequence[Task],
    lm_eval: Mapping[str, str],
    *,
    corrected: bool = False,
    length_controlled: bool = False,
) -> None:
    """Refuse bounds on tasks that aren't asked and on things that nothing measures.

    Args:
        bounds: What must hold.
        tasks: What is asked and judged.
        lm_eval: Suite/task → name of a task of lm-eval, which measures what its definition says.
        corrected: Whether rates are corrected for judges' errors, too.
        length_controlled: Whether AlpacaEval's length-controlled win rate is computed.

    Raises:
        RecipeError: If there is one.
    """
    places = {f"{task.suite}/{name}" for task in tasks for name in (task.name, task.kind, "all")}
    measured = {one.name for several in MEASURES.values() for one in several} | {*DERIVED, *INDICES}
    if any(one.references for one in tasks):
        measured |= {WIN_RATE.name, ORDER_DECIDES.name}
    measured |= {LENGTH_CONTROLLED} if length_controlled else set()
    calibrated = {name + CORRECTED for name in QUESTIONS}
    measured |= calibrated if corrected else set()
    for bound in bounds:
        place = f"{bound.suite}/{bound.task}"
        if place not in places | lm_eval.keys():
            raise RecipeError(
                f"gate: nothing is asked of {place}; {did_you_mean(place, sorted({*places, *lm_eval}))}"
            )
        if bound.metric in calibrated - measured:
            raise RecipeError(f"gate: metric '{bound.metric}' needs answers that people labeled; name `calibration:`")
        if bound.metric == LENGTH_CONTROLLED_APPROXIMATE:
            raise RecipeError(
                f"gate: metric '{bound.metric}' is an approximation, which decides no bound; name the files of "
                f"`length_control:`, and '{LENGTH_CONTROLLED}' here"
            )
        if bound.metric == LENGTH_CONTROLLED and LENGTH_CONTROLLED not in measured:
            raise RecipeError(f"gate: metric '{bound.metric}' needs AlpacaEval's files; name `length_control:`")
        # Of a group of tasks it isn't known before.
        known = listed_metrics(lm_eval[place]) if place in lm_eval else measured
        name = bound.metric.partition(" (")[0] if place in lm_eval else bound.metric
        if known and name not in known:
            raise RecipeError(f"gate: metric '{bound.metric}'; {did_you_mean(name, sorted(known))}")


def decide(results: Results, bounds: Sequence[Bound]) -> list[Decided]:
    """Hold numbers to bounds.

    Raises:
        RecipeError: If a bound is on a number that isn't there.
    """
    return [_decide(bound, _metric(results, bound)) for bound in bounds]


def enforce(results: Results, bounds: Sequence[Bound]) -> None:
    """Show what became of each bound.

    Raises:
        RecipeError: If a bound is on a number that isn't there.
        GateViolated: If a bound is violated with confidence.
    """
    decided = decide(results, bounds)
    rows = [(str(one.bound), shown(one.metric), one.metric.n, one.text) for one in decided]
    show_table("Gate: decided only where the whole interval is on one side", ("bound", "found", "n", "that is"), rows)
    violated = [one for one in decided if one.state == "violated"]
    if violated:
        told = "; ".join(f"{one.bound}, found {shown(one.metric)}" for one in violated)
        raise GateViolated(f"{len(violated)} of {len(decided)} bounds are violated: {told}")
    if open_ones := sum(one.state == "undecided" for one in decided):
        say(f"{open_ones} of {len(decided)} bounds are undecided: more prompts or samples would tell")


def _metric(results: Results, bound: Bound) -> MetricResult:
    def named(metric: MetricResult) -> str:
        return f"{metric.suite}/{metric.task} {metric.metric}"

    of_name = [one for one in results.metrics if named(one) == f"{bound.suite}/{bound.task} {bound.metric}"]
    if not of_name:
        known = list(dict.fromkeys(named(one) for one in results.metrics))
        wanted = f"{bound.suite}/{bound.task} {bound.metric}"
        raise RecipeError(f"gate: there is no {wanted}; {did_you_mean(wanted, known)}")
    for one in of_name:
        if one.category == bound.category and bound.judge in (None, one.judge):
            return one
    if bound.category not in {one.category for one in of_name}:
        categories = sorted({one.category for one in of_name if one.category})
        raise RecipeError(f"gate: {bound}: no such category; {did_you_mean(str(bound.category), categories)}")
    judges = sorted({one.judge for one in of_name})
    raise RecipeError(f"gate: {bound}: no such judge; {did_you_mean(str(bound.judge), judges)}")


def _decide(bound: Bound, metric: MetricResult) -> Decided:
    if metric.value is None:
        return Decided(bound, metric, "undecided")
    prompts = metric.n if metric.smallest_part is None else metric.smallest_part
    if prompts < MIN_PROMPTS:
        part = "" if metric.smallest_part is None else " in its smallest part"
        return Decided(
            bound,
            metric,
            "undecided",
            f"{prompts} {'prompt' if prompts == 1 else 'prompts'}{part}, {MIN_PROMPTS} needed",
        )
    low = metric.value if metric.low is None else metric.low
    high = metric.value if metric.high is None else metric.high
    over = (bound.min is not None and high < bound.min) or (bound.max is not None and low > bound.max)
    within = (bound.min is None or low >= bound.min) and (bound.max is None or high <= bound.max)
    return Decided(bound, metric, "violated" if over else "passed" if within else "undecided")
