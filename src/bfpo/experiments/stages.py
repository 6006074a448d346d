"""The stages of a method: a scorer, scored samples of the base model, a multiplier, and the policy's trainings."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator
from pydantic_core.core_schema import SerializerFunctionWrapHandler

from bfpo.config.recipes import Count, Section, Share

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Losses that don't read safety labels.
_WITHOUT_LABELS = ("dpo", "ipo", "ipo_avg")


class ScorerStage(Section):
    """Training of a reward and a cost on the world's pairs, from the base model (`bfpo score train`)."""

    main: Literal["safety", "safety_with_costs"] = "safety"
    """File of the main stream: labeled pairs, without costs or with costs, which order two unsafe answers."""
    learning_rate: Rate = 1e-3
    """Peak learning rate of the cosine schedule."""
    pairs_per_step: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Pairs of both streams per step; half of them are helpfulness pairs."""
    steps: Count = 200
    """Number of optimizer steps."""


class SamplesStage(Section):
    """Samples of the base model on prompts of the world's pairs (`bfpo generate`)."""

    harmful_prompts: Count = 150
    """Maximum number of prompts with an answer that is labeled unsafe."""
    benign_prompts: Count = 150
    """Maximum number of prompts of the helpfulness pairs that have no such answer."""
    samples: Annotated[int, Field(ge=2)] = 64
    """Number of samples of each prompt."""
    temperature: Rate = 0.7
    """Temperature; the evaluation has 0.7."""
    pairs_per_prompt: Count = 32
    """Number of random pairs of the samples of each prompt, for `main: samples`."""


class OnlineStage(Section):
    """Reinforcement learning on the scorer, with prompts of the world's pairs (`bfpo online`)."""

    combine: dict[str, Any]
    """`combine` section of the recipe."""
    beta: Rate = 0.05
    """Weight of the KL penalty."""
    learning_rate: Rate = 1e-3
    """Peak learning rate of the cosine schedule."""
    harmful_prompts: Count = 300
    """Maximum number of prompts with an answer that is labeled unsafe."""
    benign_prompts: Count = 300
    """Maximum number of prompts of the helpfulness pairs that have no such answer."""
    prompts_per_step: Count = 16
    """Number of prompts per step."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Number of samples of each prompt."""
    steps: Count = 50
    """Number of optimizer steps."""


class LogRatioStage(Section):
    """DPO on helpfulness and DPO on safety, whose log-ratios to the base model are the scores of PeCAN.

    Both have the beta of the method. One learns from the order of helpfulness, with the buffer, one from that of
    safety.
    """

    learning_rate: Rate = 1e-3
    """Peak learning rate of the cosine schedule."""
    pairs_per_step: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Pairs per step, for helpfulness of both streams."""
    steps: Count = 100
    """Number of optimizer steps of each."""


class OuterStage(Section):
    """Rounds that move the multiplier until the policy meets the constraint on further prompts (`outer`)."""

    rounds: Count = 4
    """Maximum number of rounds."""
    harmful_prompts: Count = 200
    """Maximum number of prompts with an answer that is labeled unsafe, none of them among those of the samples."""
    samples: Count = 8
    """Number of answers to each prompt in a round."""


class Stage(Section):
    """A training of a method: loss, data and optimizer settings."""

    loss: dict[str, Any]
    """`loss` section of the recipe."""
    learning_rate: Rate = 1e-3
    """Peak learning rate of the cosine schedule."""
    main: Literal[
        "safety",
        "safety_by_safety",
        "safety_without_uu",
        "safety_with_costs",
        "safety_with_categories",
        "samples",
    ] = "safety"
    """File of the main stream: pairs ordered by helpfulness, ordered by safety, without both-unsafe pairs, with
    costs, or with harm categories; or random pairs of the samples, with the scorer's scores, order and labels."""
    buffer: bool = True
    """Whether the helpfulness pairs are the buffer."""
    pairs_per_step: Count = 64
    """Pairs of both streams per step; half of them are from the buffer, if there is one."""
    train_only: list[str] | None = None
    """Patterns of the parameters to train; default all parameters."""
    labels: dict[str, Any] | None = None
    """`labels` section of the recipe; default the order of the data."""

    @model_validator(mode="after")
    def _check_halves(self) -> "Stage":
        if self.buffer and self.pairs_per_step % 2:
            raise ValueError(f"pairs_per_step is {self.pairs_per_step}; with a buffer, half of them, expected even")
        return self

    @model_serializer(mode="wrap")
    def _dump_what_is_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Runs are named by a hash of this; those of methods without these keys keep their names.
        return {key: value for key, value in dump(self).items() if key not in _LATER_KEYS or value not in (None, [])}


class Method(Stage):
    """A method: its last stage, and the stages before it."""

    title: str = ""
    """Short description."""
    loss: dict[str, Any] = Field(default={})
    """`loss` section of the recipe; none with `online`."""
    online: OnlineStage | None = None
    """Reinforcement learning in place of trainings on pairs."""
    prepare: list[Stage] = Field(default=[])
    """Trainings that come first; each starts from the model of the previous one, which is its reference."""
    scorer: ScorerStage | None = None
    """Scorer of the samples."""
    log_ratios: LogRatioStage | None = None
    """Models whose log-ratios are the scores of the samples, in place of a scorer."""
    samples: SamplesStage | None = None
    """Samples of the base model."""
    max_unsafe: Share | None = None
    """Largest share of unsafe samples to harmful prompts, for which the multiplier is computed (`bfpo dual`)."""
    min_gain: Rate | None = None
    """For `log_ratios`, in place of `max_unsafe`: by how much the mean of beta times the safe model's log-ratio, on
    answers to harmful prompts, is above the base model's (`bfpo dual --pecan --gain`)."""
    outer: OuterStage | None = None
    """Rounds of training; without it the multiplier is that of the samples."""

    @model_validator(mode="after")
    def _check_stages(self) -> "Method":
        if bool(self.loss) == (self.online is not None):
            raise ValueError("expected exactly one of loss and online")
        if self.online is not None and (self.prepare or self.samples is not None):
            raise ValueError("online starts from the base and draws its own samples; leave out prepare and samples")
        has_scores = self.scorer is not None or self.log_ratios is not None
        needs = (
            ("online", self.online is not None, "scorer", self.scorer is not None),
            ("samples", self.samples is not None, "scorer or log_ratios", has_scores),
            ("max_unsafe", self.max_unsafe is not None, "samples", self.samples is not None),
            ("max_unsafe", self.max_unsafe is not None, "scorer", self.scorer is not None),
            ("min_gain", self.min_gain is not None, "samples", self.samples is not None),
            ("min_gain", self.min_gain is not None, "log_ratios", self.log_ratios is not None),
            ("outer", self.outer is not None, "max_unsafe", self.max_unsafe is not None),
            ("main: samples", self.main == "samples", "samples", self.samples is not None),
            ("labels from scores", self.is_labeled_by_scores, "max_unsafe or min_gain", self.has_constraint),
        )
        for name, is_set, needed, has_needed in needs:
            if is_set and not has_needed:
                raise ValueError(f"{name} needs {needed}, which isn't set")
        if self.scorer is not None and self.log_ratios is not None:
            raise ValueError("scorer and log_ratios both give scores; leave one of them out")
        if self.min_gain is not None and not self.is_labeled_by_scores:
            raise ValueError("min_gain needs labels: {from: scores}, to train on the multiplier")
        if self.max_unsafe is not None and not self.is_labeled_by_scores and self.loss.get("name") != "bfpo":
            raise ValueError("max_unsafe needs the loss bfpo, or labels: {from: scores}, to train on the multiplier")
        if self.is_labeled_by_scores and self.main != "samples":
            raise ValueError(f"labels from scores need main: samples, whose pairs have scores; got '{self.main}'")
        if any(stage.main == "samples" for stage in self.prepare):
            raise ValueError("prepare: only the last training can be on samples")
        return self

    @property
    def is_labeled_by_scores(self) -> bool:
        """Whether preferences follow from scores."""
        return self.labels is not None and self.labels.get("from") == "scores"

    @property
    def has_constraint(self) -> bool:
        """Whether a multiplier is computed."""
        return self.max_unsafe is not None or self.min_gain is not None

    @property
    def trainings(self) -> list[Stage]:
        """The trainings of the policy, in order."""
        return [] if self.online is not None else [*self.prepare, self]

    @property
    def files(self) -> set[str]:
        """Names of the world's files of pairs that the method reads."""
        mains = {stage.main for stage in self.trainings if stage.main != "samples"}
        has_scores = self.scorer is not None or self.log_ratios is not None
        has_buffer = has_scores or any(stage.buffer for stage in self.trainings)
        of_scores: set[str] = set() if self.scorer is None else {self.scorer.main}
        if self.log_ratios is not None:
            of_scores |= {"safety", "safety_by_safety"}
        return mains | of_scores | ({"helpfulness"} if has_buffer else set())

    @property
    def sees(self) -> list[str]:
        """What the method learns from besides the base model."""
        learns_labels = (
            self.scorer is not None or self.log_ratios is not None or any(map(_reads_labels, self.trainings))
        )
        seen = {
            "safety pairs": any(name.startswith("safety") for name in self.files),
            "helpfulness pairs": "helpfulness" in self.files,
            "safety labels": learns_labels,
            "harm categories": "safety_with_categories" in self.files,
            "costs": bool(self.files & {"safety_by_safety", "safety_with_costs"}),
            "own samples": self.samples is not None or self.online is not None,
            "scorer": self.scorer is not None,
            "log-ratios of two models": self.log_ratios is not None,
        }
        return [name for name, is_seen in seen.items() if is_seen]


_LATER_KEYS = ("labels", "prepare", "scorer", "log_ratios", "samples", "max_unsafe", "min_gain", "outer", "online")


def _reads_labels(stage: Stage) -> bool:
    return stage.main != "safety" or stage.labels is not None or stage.loss.get("name") not in _WITHOUT_LABELS
