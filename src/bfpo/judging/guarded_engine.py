"""`guard:` of a recipe, and putting an engine behind it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from bfpo.config.loading import load_recipe
from bfpo.config.recipes import Count, Section
from bfpo.core.guarding import REFUSAL
from bfpo.core.samples import Completion, Engine, Judge, Sampling
from bfpo.errors import DataError, RecipeError
from bfpo.generation.open import JudgeServerSection
from bfpo.judging.open import open_judge
from bfpo.judging.spec import JUDGES, AnswerJudgeText, parse_judge

if TYPE_CHECKING:
    from bfpo.generation.guards.screen import Screen
    from bfpo.generation.in_process import TransformersEngine
    from bfpo.model.cost_head import CostHead

# A rule on the kinds of known prompts, and labels of earlier answers.
_READ_NOTHING = ("refusal-rule", "people")


class FirstSafeSection(Section):
    """Guard that takes the first of several samples that a judge calls safe, or a fixed refusal (docs/guards.md)."""

    kind: Literal["first_safe"]
    """Kind of the guard."""
    judge: AnswerJudgeText
    """Spec of the safety judge, as for `bfpo judge`; `{spec: SPEC, reads: both}` reads the reasoning too."""
    samples: Count = 4
    """Maximum number of samples for an answer, or for a sentence."""
    by: Literal["answer", "sentence"] = "answer"
    """What is drawn and judged at a time: `answer`, or `sentence`, together with the sentences before it; the latter
    needs a model in this process."""
    refusal: str = Field(REFUSAL, min_length=1)
    """Text in place of an answer of which no sample is called safe."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Probability from which a sample counts as safe, for judges that give one. Default the judge's own."""
    judge_server: JudgeServerSection = JudgeServerSection()
    """How the server of the judge is queried (`rubric:MODEL@http://host:port/v1`)."""

    @field_validator("judge")
    @classmethod
    def _judges_safety(cls, spec: str) -> str:
        parsed = parse_judge(spec)
        if "safe" not in parsed.findings or not parsed.kinds.isdisjoint(_READ_NOTHING):
            able = ", ".join(
                name for name, kind in JUDGES.items() if "safe" in kind.findings and name not in _READ_NOTHING
            )
            raise ValueError(f"'{spec}' can't read a new answer for safety; expected one of {able}, or your own")
        return spec


class FactorSection(Section):
    """Guard that makes tokens less probable whose answers a head expects to be unsafe (docs/guards.md)."""

    kind: Literal["factor"]
    """Kind of the guard."""
    head: str
    """File of the cost head, of this model."""
    kappa: float = Field(1.0, ge=0)
    """Strength: each token's probability is multiplied by 1 - p (1 - exp(-kappa)); 0 changes nothing."""
    top_k: Count = 20
    """Number of candidates for each token, the likeliest; others are left out."""


class ProjectSection(Section):
    """Guard that moves hidden states to where a linear head calls them safe (docs/guards.md)."""

    kind: Literal["project"]
    """Kind of the guard."""
    head: str
    """File of the linear cost head, of this model."""
    at_most: float = Field(0.5, gt=0, lt=1)
    """Largest probability of "unsafe" by the head that a state may have."""


Guard = Annotated[
    Annotated[FirstSafeSection, Tag("first_safe")]
    | Annotated[FactorSection, Tag("factor")]
    | Annotated[ProjectSection, Tag("project")],
    Discriminator("kind"),
]


class GuardFile(Section):
    """File of `--guard`: the key of recipes with its section."""

    guard: Guard
    """The guard."""


def load_guard(path: Path) -> Guard:
    """Read the guard in a file.

    Raises:
        RecipeError: If the file is missing or malformed.
    """
    return load_recipe(path, GuardFile).guard


def guard_engine(
    engine: Engine,
    sampling: Sampling,
    guard: Guard | None,
    *,
    show: Callable[[Completion], None] | None = None,
    screen: "Screen | None" = None,
) -> Engine:
    """Return an engine behind a guard, whose judge stays in memory beside the model; without one, the engine.

    Args:
        engine: The engine.
        sampling: How it samples.
        guard: The guard.
        show: Function that gets an answer up to the end of each sentence once it has passed, where sentences are
            judged; see `SafeSentences`.
        screen: Screen by the guard's judge, for engines that share it; by default the judge is opened.

    Raises:
        RecipeError: If the guard isn't possible with this sampling.
        DataError: If the file of the judge is missing or malformed.
        ModelError: If the model of the judge can't be loaded.
    """
    if guard is None:
        return engine
    if guard.kind != "first_safe":
        from bfpo.generation.guards.factor import FactorGuard
        from bfpo.generation.guards.project import Projection

        model = _in_process(engine, f"guard.kind is '{guard.kind}'", "set guard.kind to first_safe")
        head = load_head(guard.head, model, key="guard.head")
        if guard.kind == "factor":
            return model.behind(FactorGuard.by(head, kappa=guard.kappa, top_k=guard.top_k))
        return model.behind(Projection(head, guard.at_most))
    if sampling.temperature == 0 and guard.samples > 1:
        raise RecipeError(
            f"guard.samples is {guard.samples}, but at temperature 0 all samples are equal; set guard.samples to 1, "
            "or a temperature above 0"
        )
    if guard.by == "sentence":
        from bfpo.generation.guards.sentences import SafeSentences

        model = _in_process(engine, "guard.by is 'sentence'", "set guard.by to answer")
        judge = screen or open_guard_judge(guard)
        return SafeSentences(model, judge, samples=guard.samples, refusal=guard.refusal, show=show)
    from bfpo.generation.guards.first_safe import FirstSafe

    return FirstSafe(engine, screen or open_guard_judge(guard), samples=guard.samples, refusal=guard.refusal)


def load_head(path: str, engine: "TransformersEngine", *, key: str) -> "CostHead":
    """Return the head in a file.

    Args:
        path: The file.
        engine: Engine of the model whose states the head reads.
        key: Key of the recipe with the path, for errors.

    Raises:
        DataError: If it isn't a head for this model.
    """
    from bfpo.model.cost_head import load_cost_head

    head = load_cost_head(Path(path))
    config = engine.model.config.get_text_config()
    count, width = config.num_hidden_layers, config.hidden_size
    if head.width != width or not all(layer == -1 or 1 <= layer <= count for layer in head.layers):
        raise DataError(
            f"{key}: {path} is for layers {list(head.layers)} and states of width {head.width}; "
            f"{engine.model_name} has {count} layers of width {width}: train a head on this model's states"
        )
    return head


def open_guard_judge(guard: FirstSafeSection) -> Judge:
    """Open the judge of a guard.

    Raises:
        DataError: If the file of the judge is missing or malformed.
        ModelError: If the model of the judge can't be loaded.
    """
    return open_judge(guard.judge, threshold=guard.threshold, server=guard.judge_server)


def _in_process(engine: Engine, what: str, instead: str) -> "TransformersEngine":
    """Return the engine of a model in this process.

    Raises:
        RecipeError: If it is another engine.
    """
    from bfpo.generation.in_process import TransformersEngine

    if not isinstance(engine, TransformersEngine):
        raise RecipeError(
            f"{what}, which needs a model in this process: servers neither continue an answer nor show states of the "
            f"model; {instead}, or leave out server and steps"
        )
    return engine
