"""What may stand in a red-team recipe."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from bfpo.config.recipes import Count, Section
from bfpo.core.pairs import Cell
from bfpo.data.prompts import PromptSource
from bfpo.generation.open import EngineSection, ServerSection
from bfpo.judging.spec import parse_judge


class RedteamRecipe(Section):
    """`bfpo redteam`: a preference set from one's own model."""

    out: str
    """Folder; one begun earlier is continued."""
    model: EngineSection
    """Whose answers are wanted."""
    prompts: list[PromptSource] = Field(min_length=1)
    """Harmful ones, and benign ones so that the set can't teach refusing everything."""
    judge: str
    """Says what is safe: a judge as for `bfpo judge`."""
    helpfulness: str = "fallback"
    """A judge whose verdicts carry helpfulness, or `fallback`: answers above refusals, then longer above shorter."""
    judge_server: ServerSection = ServerSection()
    """How the server of a judge is queried (`rubric:MODEL@http://host:port/v1`)."""
    samples: int = Field(4, ge=2)
    """Answers per prompt."""
    temperature: float = Field(1.0, gt=0)
    """Above 0: equal samples make no pairs."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass that is kept."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    seed: int = 0
    """Of the sampling."""
    guide: bool = True
    """Where every sample is unsafe: lead the same model to a safe answer in three steps."""
    per_prompt: Count = 2
    """Pairs of a prompt at most, of different cells first."""
    quota: dict[Cell, int] = Field(default={})
    """Pairs of a cell at most; a cell that isn't named has no limit."""
    min_benign: float = Field(0.1, ge=0, lt=1)
    """Smallest share of prompts that are benign or look-alike."""
    max_unanswered: float = Field(0.1, ge=0, lt=1)
    """Largest share of samples that may be missing: a prompt too long for the model, or a server that fails."""
    rounds: Count = 1
    """Further rounds ask the model that the last one trained."""
    train: dict[str, Any] | None = None
    """What a train recipe holds beside `model`, `data` and `trainer.output_dir`; needed for several rounds."""

    @field_validator("judge", "helpfulness")
    @classmethod
    def _is_a_judge(cls, spec: str) -> str:
        if spec != "fallback":
            parse_judge(spec)
        return spec

    @model_validator(mode="after")
    def _check(self) -> "RedteamRecipe":
        if self.rounds > 1 and (self.train is None or self.model.server is not None):
            raise ValueError("rounds above 1 need train: and a model without server:")
        return self
