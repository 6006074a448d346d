"""Recipe of `bfpo eval`."""

from pydantic import Field, field_validator, model_validator

from bfpo.config.recipes import Count, Section
from bfpo.core.samples import Sampling
from bfpo.evaluation.attacks import AttackedSuite
from bfpo.evaluation.gate import Bound
from bfpo.evaluation.suite import EvalData
from bfpo.generation.attacks import check_attack
from bfpo.generation.open import EngineSection, JudgeServerSection
from bfpo.judging.guarded_engine import Guard
from bfpo.judging.spec import JudgeText, parse_judge

# Two families, both of which detect refusals too.
JUDGES = ["wildguard:allenai/wildguard", "qwen3guard:Qwen/Qwen3Guard-Gen-4B"]


class SamplingSection(Section):
    """How completions are sampled."""

    samples: Count = 1
    """Completions per prompt."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass to sample from."""
    max_new_tokens: Count = 512
    """Maximum length of a completion, in tokens."""
    seed: int = 0
    """Seed; with the prompt's id and the sample's number it fixes a completion."""

    @property
    def settings(self) -> Sampling:
        """Settings as an engine takes them."""
        return Sampling(**self.model_dump())


class Price(Section):
    """Price of a served model, in any currency."""

    prompt: float = Field(ge=0)
    """Price per million tokens read."""
    completion: float = Field(ge=0)
    """Price per million tokens written."""


class LengthControlFiles(Section):
    """Files of huggingface.co/datasets/tatsu-lab/alpaca_eval for its length-controlled win rate."""

    gamed: str
    """`df_gamed.csv`: annotations of the gamed baselines, with the difficulty of every instruction."""
    difficulty: str | None = None
    """`instruction_difficulty.csv`; its difficulties must be those of `gamed`."""


class EvalRecipe(Section):
    """`bfpo eval`: run suites of prompts on a model, judge and score its completions, and compare the results."""

    out: str
    """Output folder; an evaluation started in it resumes."""
    run: str | None = None
    """Short name of the run in tables and figures; default the last part of `out`."""
    model: EngineSection | None = None
    """Model to evaluate; or `completions`."""
    completions: str | None = None
    """Completions saved by another program: completions.jsonl, or a table with a prompt and an answer in each row."""
    guard: Guard | None = None
    """Guard in front of `model` (docs/guards.md); tasks of lm-eval are run without it."""
    suites: list[str | AttackedSuite] = Field(default=["safety", "over_refusal"], min_length=1)
    """Names of shipped suites, or paths of your own; `{suite: safety, attack: crescendo}` attacks the harmful prompts
    of one in conversations of several turns."""
    data: dict[str, EvalData] = Field(default={})
    """Source, or task of lm-eval → where its rows are read from, instead of the hub's (pinned) revision."""
    leave_out: list[str] = Field(default=[])
    """Tasks to leave out, as `alert` or `safety/alert`; the results list them."""
    limit: Count | None = None
    """Maximum number of prompts, or rows, of a task, a sample that is the same in every run; for a first look."""
    max_unanswered: float = Field(0.0, ge=0, lt=1)
    """Maximum share of prompts without a completion (a server gave none, the file lacks it): they are left out, and
    the results say how many."""
    sampling: SamplingSection = SamplingSection()
    """How completions are sampled."""
    judges: list[JudgeText] = Field(default=JUDGES, min_length=1)
    """Judges as for `bfpo judge`, the primary one first. Use several families: judges of one share mistakes. A judge
    reads the answer; `{spec: SPEC, reads: reasoning}`, or `both`, reads the reasoning too (docs/judging.md)."""
    judge_server: JudgeServerSection = JudgeServerSection()
    """How the servers of judges are queried (`rubric:MODEL@http://host:port/v1`)."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Probability from which an answer counts as safe, for judges that give one. Default the judge's own."""
    calibration: str | None = None
    """Answers with human labels, as for `bfpo judge eval`: judges read them too, and each rate is reported a second
    time, corrected for the judge's errors on them. Best are answers of the evaluated model to other prompts:
    docs/judging.md."""
    length_control: LengthControlFiles | None = None
    """Files with which AlpacaEval's length-controlled win rate is computed on its 805 instructions."""
    labeled_by: list[str] = Field(default=[])
    """Names of judges that labeled the model's training data, in addition to those in its data manifest."""
    template_policy: str | None = None
    """How prompts are given to a served model, or to the one behind `completions`; runs under different policies
    can't be compared."""
    base: str | None = None
    """Folder of another evaluation to compare with, the baseline."""
    gate: str | list[Bound] | None = None
    """Bounds on metrics, or a file of them; see docs/evaluation.md."""
    price: Price | None = None
    """Price of the model, for the estimate of `--dry-run`."""
    judge_price: Price | None = None
    """Price of the judges on servers."""

    @field_validator("judges")
    @classmethod
    def _check_primary(cls, specs: list[str]) -> list[str]:
        if parse_judge(specs[0]).reads == "reasoning":
            raise ValueError(f"the first judge is the primary one, and must read answers; got '{specs[0]}'")
        return specs

    @model_validator(mode="after")
    def _check_origin(self) -> "EvalRecipe":
        if (self.model is None) == (self.completions is None):
            raise ValueError("expected exactly one of model and completions")
        if self.model is None and self.guard is not None:
            raise ValueError("guard needs model; saved completions can't be sampled again")
        if self.model is None and any(isinstance(entry, AttackedSuite) for entry in self.suites):
            raise ValueError("suites: an attack needs model; saved completions answer no further turn")
        for entry in self.suites:
            if self.model is not None and not isinstance(entry, str):
                check_attack(entry.attack, self.model)
        return self
