"""What may stand in a recipe of `bfpo eval`."""

from pydantic import Field, field_validator, model_validator

from bfpo.config.recipes import Count, Section
from bfpo.core.samples import Sampling
from bfpo.evaluation.gate import Bound
from bfpo.evaluation.suite import EvalData
from bfpo.generation.open import EngineSection, ServerSection
from bfpo.judging.spec import parse_judge

# Of two families, both of which tell refusals too.
JUDGES = ["wildguard:allenai/wildguard", "qwen3guard:Qwen/Qwen3Guard-Gen-4B"]


class SamplingSection(Section):
    """How completions are sampled."""

    samples: Count = 1
    """Answers per prompt."""
    temperature: float = Field(0.7, ge=0)
    """0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass that is kept."""
    max_new_tokens: Count = 512
    """Longest answer, in tokens."""
    seed: int = 0
    """With a prompt's id and the sample's number it fixes an answer."""

    @property
    def settings(self) -> Sampling:
        """As an engine takes them."""
        return Sampling(**self.model_dump())


class Price(Section):
    """What a served model costs, in any one currency."""

    prompt: float = Field(ge=0)
    """Per million tokens read."""
    completion: float = Field(ge=0)
    """Per million tokens written."""


class LengthControlFiles(Section):
    """Files of huggingface.co/datasets/tatsu-lab/alpaca_eval for its length-controlled win rate."""

    gamed: str
    """`df_gamed.csv`: annotations of the gamed baselines, with the difficulty of every instruction."""
    difficulty: str | None = None
    """`instruction_difficulty.csv`; the difficulties are compared with those of `gamed`."""


class EvalRecipe(Section):
    """`bfpo eval`: suites of prompts put to a model, its answers judged, scored, compared and gated."""

    out: str
    """Folder; one begun earlier is continued."""
    run: str | None = None
    """Short name of the run in tables and figures; default the last part of `out`."""
    model: EngineSection | None = None
    """Whose answers are evaluated; or `completions`."""
    completions: str | None = None
    """Answers that another program saved: completions.jsonl, or a table with a prompt and an answer in each row."""
    suites: list[str] = Field(default=["safety", "over_refusal"], min_length=1)
    """Names of shipped suites, or paths of one's own."""
    data: dict[str, EvalData] = Field(default={})
    """Source, or task of lm-eval → where its rows are read from, instead of the hub's (pinned) revision."""
    leave_out: list[str] = Field(default=[])
    """Tasks that are left out, as `alert` or `safety/alert`; the results say so."""
    limit: Count | None = None
    """Prompts, or rows, of a task at most, a sample that is the same in every run; for a first look."""
    max_unanswered: float = Field(0.0, ge=0, lt=1)
    """Largest share of prompts without an answer (a server gave none, the file lacks it): they are left out, and the
    results say so."""
    sampling: SamplingSection = SamplingSection()
    """How completions are sampled."""
    judges: list[str] = Field(default=JUDGES, min_length=1)
    """Judges as for `bfpo judge`; the first is the primary one. Several families: judges of one share mistakes."""
    judge_server: ServerSection = ServerSection()
    """How the servers of judges are queried (`rubric:MODEL@http://host:port/v1`)."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Of judges that give a probability: an answer is safe from it on. Default the judge's own."""
    calibration: str | None = None
    """Answers that people labeled, as for `bfpo judge eval`: judges read them too, and each rate is told a second
    time, corrected for what the judge gets wrong there. Of the evaluated model, to other prompts: docs/judging.md."""
    length_control: LengthControlFiles | None = None
    """Files with which AlpacaEval's length-controlled win rate is computed on its 805 instructions."""
    labeled_by: list[str] = Field(default=[])
    """Names of judges that labeled the model's training data, beside those that its folder tells of."""
    template_policy: str | None = None
    """How prompts were put to a served model or to the one that `completions` are of; runs under different policies
    don't compare."""
    base: str | None = None
    """Folder of another evaluation to compare with."""
    gate: str | list[Bound] | None = None
    """Bounds that the numbers must keep, or a file of them; see docs/benchmark.md."""
    price: Price | None = None
    """Of the model, for the estimate of `--dry-run`."""
    judge_price: Price | None = None
    """Of the judges that are asked over a server."""

    @field_validator("judges")
    @classmethod
    def _are_judges(cls, specs: list[str]) -> list[str]:
        for spec in specs:
            parse_judge(spec)
        return specs

    @model_validator(mode="after")
    def _one_origin(self) -> "EvalRecipe":
        if (self.model is None) == (self.completions is None):
            raise ValueError("expected exactly one of model and completions")
        return self
