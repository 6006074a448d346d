"""Schema of a red-team recipe."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from bfpo.config.recipes import Count, Section
from bfpo.core.pairs import Cell
from bfpo.data.prompts import PromptSource
from bfpo.generation.attacks import AttackSpec
from bfpo.generation.open import EngineSection, JudgeServerSection
from bfpo.judging.guarded_engine import Guard
from bfpo.judging.spec import JUDGES, AnswerJudgeText, parse_judge


class RedteamRecipe(Section):
    """`bfpo redteam`: preference pairs from your own model."""

    out: str
    """Output folder; an earlier run in it is resumed."""
    model: EngineSection
    """Model whose answers are sampled."""
    guard: Guard | None = None
    """Guard in front of the model (docs/guards.md), to attack both together; its refusals make no pairs."""
    prompts: list[PromptSource] = Field(min_length=1)
    """Harmful prompts, and benign ones, without which the pairs would teach a model to refuse everything."""
    judge: AnswerJudgeText
    """Spec of the safety judge, as for `bfpo judge`; `{spec: SPEC, reads: both}` reads the reasoning too."""
    helpfulness: str = "fallback"
    """Spec of a judge that rates helpfulness, or `fallback`: answers above refusals, then longer above shorter."""
    judge_server: JudgeServerSection = JudgeServerSection()
    """How the server of a judge is queried (`rubric:MODEL@http://host:port/v1`)."""
    samples: int = Field(4, ge=2)
    """Answers per prompt."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature, above 0 because identical samples make no pairs."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass of nucleus sampling."""
    max_new_tokens: Count = 256
    """Maximum length of an answer, in tokens."""
    keep_cut: bool = False
    """Whether answers that were cut at `max_new_tokens` make pairs, too; training then doesn't score their end."""
    seed: int = 0
    """Seed of the sampling."""
    attack: AttackSpec | None = None
    """Attack of several turns on the harmful prompts, `crescendo` or a section; answers are sampled where a reply was
    unsafe first, or at the last turn, and add to those to the prompts alone."""
    guide: bool = True
    """Whether to lead the model to a safe answer in three steps, and to let it check the answer in a fourth, where
    every sample is unsafe."""
    check: Literal["measure", "filter"] = "measure"
    """What that check does. `measure`: it is compared with the judge. `filter`: answers that it doesn't call safe
    make no pairs, also where the judge calls them safe."""
    per_prompt: Count = 2
    """Maximum number of pairs of a prompt, each of another cell."""
    quota: dict[Cell, int] = Field(default={})
    """Cell → maximum number of pairs; other cells have no limit."""
    min_benign: float = Field(0.1, ge=0, lt=1)
    """Minimum share of prompts that are benign or look-alike."""
    max_unanswered: float = Field(0.1, ge=0, lt=1)
    """Maximum share of samples that may be missing: prompts too long for the model, or server failures."""
    rounds: Count = 1
    """Number of rounds; each further round samples from the model that the last one trained."""
    train: dict[str, Any] | None = None
    """Keys of a train recipe other than `model`, `data` and `trainer.output_dir`; required for several rounds."""

    @field_validator("judge", "helpfulness")
    @classmethod
    def _is_a_judge(cls, spec: str, info: ValidationInfo) -> str:
        if spec != "fallback" or info.field_name == "judge":
            parse_judge(spec)
        return spec

    @model_validator(mode="after")
    def _check_findings(self) -> "RedteamRecipe":
        for key, finding in (("judge", "safe"), ("helpfulness", "helpfulness")):
            spec = getattr(self, key)
            if spec != "fallback" and finding not in parse_judge(spec).findings:
                able = ", ".join(name for name, kind in JUDGES.items() if finding in kind.findings)
                verb = "judge safety" if finding == "safe" else "rate helpfulness"
                raise ValueError(f"{key}: '{spec}' doesn't {verb}; expected one of {able}, or your own")
        return self

    @model_validator(mode="after")
    def _check_guide(self) -> "RedteamRecipe":
        if self.guide and self.model.steps is not None:
            raise ValueError("guide leads the model through steps, which model.steps already does; set guide: false")
        return self

    @model_validator(mode="after")
    def _check(self) -> "RedteamRecipe":
        if self.rounds > 1 and (self.train is None or self.model.server or self.model.steps):
            raise ValueError(
                f"rounds is {self.rounds}; several rounds require train, and a model without server and steps"
            )
        if self.attack is not None and self.attack.prefill is not None:
            raise ValueError("attack: prefill changes answers and not prompts, so it makes no pairs")
        return self
