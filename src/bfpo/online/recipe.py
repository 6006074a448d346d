"""Schema of an online recipe."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from bfpo.config.combine import CombineSection, LagrangianSection
from bfpo.config.recipes import Count, LoraSection, ModelSection, Section, Share, is_gguf
from bfpo.data.prompts import PromptSource
from bfpo.generation.open import JudgeServerSection
from bfpo.judging.spec import JUDGES, AnswerJudgeText, Finding, JudgeSpec, parse_judge


class WatchSection(Section):
    """A judge that doesn't train the policy and reads some of its samples, to notice reward hacking."""

    judge: AnswerJudgeText
    """Spec of a safety judge other than the scorers."""
    every: Count = 5
    """Number of steps from a batch that it reads to the next."""
    window: Annotated[int, Field(ge=2)] = 5
    """Number of batches in a window. Training stops if in the latest window the reward is higher than in the safest
    before, the cost is not, and the share that this judge calls safe is lower, beyond chance over all windows."""


class OnlineRecipe(Section):
    """`bfpo online`: reinforcement learning on scores of judges."""

    model: ModelSection
    """Model to start from; it is also the reference of the KL penalty."""
    prompts: list[PromptSource] = Field(min_length=1)
    """Prompts to sample answers to, harmful and benign ones."""
    reward: AnswerJudgeText
    """Spec of a judge that rates helpfulness: a reward model (`reward:PATH`, `beaver-reward:PATH`), a rubric, ..."""
    cost: AnswerJudgeText
    """Spec of a judge of safety that gives a number: a cost model (`cost:PATH`), a classifier, `linear:PATH`,
    ... Its cost is its score, else its severity, else the log-odds of unsafe."""
    judge_server: JudgeServerSection = JudgeServerSection()
    """How the server of a judge is queried (`rubric:MODEL@http://host:port/v1`)."""
    combine: CombineSection = LagrangianSection()
    """How reward and cost become the number that is maximized."""
    max_missing: Share = 0.1
    """Maximum share of samples without a score, from 100 on; they are left out and counted, and more stop the run."""
    watch: WatchSection | None = None
    """A held-out judge, which ends the run at reward hacking."""
    lora: LoraSection | None = None
    """Low-rank adapters to train instead of all weights."""
    trainer: dict[str, Any] = Field(default={})
    """Arguments of `trl.RLOOConfig`: `beta` is the weight of the KL penalty, `num_generations` the samples of a
    prompt."""

    @model_validator(mode="after")
    def _check_scorers(self) -> "OnlineRecipe":
        needed: dict[str, Finding] = {"reward": "helpfulness", "cost": "safe"}
        for key, finding in needed.items():
            _check_finding(key, parse_judge(getattr(self, key)), finding)
        reads_number = getattr(self.combine, "measure", "cost") != "unsafe"
        if reads_number and "cost" not in parse_judge(self.cost).scores:
            able = ", ".join(sorted(name for name, kind in JUDGES.items() if "cost" in kind.scores))
            raise ValueError(
                f"cost: '{self.cost}' says safe or unsafe without a number; expected one of {able}, or "
                "combine: {name: lagrangian, measure: unsafe}"
            )
        if self.watch is not None:
            watching = parse_judge(self.watch.judge)
            _check_finding("watch.judge", watching, "safe")
            for key in needed:
                scoring = parse_judge(getattr(self, key))
                if shared := {part.text for part in watching.parts} & {part.text for part in scoring.parts}:
                    raise ValueError(
                        f"watch.judge: {min(shared)} is the {key} too; expected a judge that isn't trained on"
                    )
        return self

    @model_validator(mode="after")
    def _check_model(self) -> "OnlineRecipe":
        if self.model.path is None:
            raise ValueError("model: a new model can't answer prompts; fine-tune it first (bfpo sft), and set path")
        if self.model.load_in_4bit and self.lora is None:
            raise ValueError("model.load_in_4bit needs lora: quantized weights can't be trained")
        if is_gguf(self.model.path) and self.lora is None:
            raise ValueError(
                "model: the reference is loaded a second time, which TRL can't do from a GGUF file; set lora, or "
                "convert the file (bfpo model import)"
            )
        return self


def _check_finding(key: str, spec: JudgeSpec, finding: Finding) -> None:
    if finding not in spec.findings:
        able = ", ".join(name for name, kind in JUDGES.items() if finding in kind.findings)
        verb = "judge safety" if finding == "safe" else "rate helpfulness"
        raise ValueError(f"{key}: '{spec.text}' doesn't {verb}; expected one of {able}, or your own")
