"""The keys of recipes: one YAML file, one command, one model.

The string after each field is its documentation. The keys of `trainer:` are those of `transformers.TrainingArguments`
and are checked when the arguments are made; everything else is checked here, without torch.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_serializer, model_validator
from pydantic_core.core_schema import SerializerFunctionWrapHandler

from bfpo.config.losses import BFPOSection, LossSection

# `as` exports the names again: recipes of other packages are made of them.
from bfpo.config.section import Count as Count
from bfpo.config.section import Fraction as Fraction
from bfpo.config.section import Section as Section
from bfpo.config.section import Share as Share
from bfpo.core.chain import SHARED, Expert


def is_gguf(path: str) -> bool:
    """Return whether a model's path names a GGUF file."""
    return path.lower().endswith(".gguf")


def join_gguf_file(values: Any) -> Any:
    """Return the keys of a model with `path` and `gguf_file` joined into one path.

    Raises:
        ValueError: If there is no `path`, or `gguf_file` isn't the name of a GGUF file.
    """
    if not isinstance(values, dict) or values.get("gguf_file") is None:
        return values
    path, file = values.get("path"), values["gguf_file"]
    if not isinstance(file, str) or not is_gguf(file):
        raise ValueError(f"gguf_file is {file!r}; expected the name of a file that ends in .gguf")
    if not isinstance(path, str) or is_gguf(path):
        raise ValueError(f"gguf_file needs path, the folder or hub id that contains {file}; got {path!r}")
    return {**values, "path": f"{path.rstrip('/')}/{file}", "gguf_file": None}


ReferenceKind = Literal["auto", "adapter", "shared", "cache"]


class Source(Section):
    """Data set, and how to read it."""

    path: str | list[str]
    """Hub id (`org/name`), local file, pattern such as `data/*.csv`, or a list of files."""
    adapter: str = "pairs"
    """How a row is converted into a preference pair: a key of `bfpo.data.adapters.ADAPTERS`, or `module:function`."""
    name: str | None = None
    """Hub configuration."""
    revision: str | None = None
    """Hub revision; without it the data may change between runs."""
    split: str | None = None
    """Hub split; default `train`."""
    fraction: Fraction | None = None
    """Share of the pairs that is used."""
    limit: Count | None = None
    """Maximum number of pairs, after `fraction`."""
    sample: Literal["random", "head"] = "random"
    """Which pairs `fraction` and `limit` select: a seeded sample, or the first ones as in the official code."""
    seed: int = 42
    """Seed of the sample."""
    field: str | None = None
    """Key of the list of rows, in a JSON file that is an object."""
    columns: dict[str, str] = Field(default={})
    """Renamed columns, `{name for the adapter: name in the file}`."""
    ignore_columns: list[str] = Field(default=[])
    """Columns that are left out; without it, a text that the adapter `pairs` doesn't read is an error."""
    turns: Literal["last", "all", "each"] = "last"
    """What is compared in conversations of several turns. `last`: the last answers, after one history. `all`: all
    turns after the common beginning. `each`: each answer of the first with the one at its place in the second."""
    assume_safe: bool = False
    """Label all answers of an unlabeled set safe; `safety_label_source` is then `assumed`."""
    partial_refusals: Literal["refusal", "compliance", "drop"] = "refusal"
    """For `xstest_completions`: what a partial refusal counts as."""
    use: Literal["chosen", "rejected", "both", "safer"] | None = None
    """For `bfpo sft`: which answers of a pair are imitated. `safer`: the safe one, and none of two unsafe ones.
    Default `safer` for labeled pairs, because `chosen` is the more helpful answer, which may be unsafe; else
    `chosen`."""
    license: str | None = None
    """License of the data; default the adapter's."""

    @model_validator(mode="after")
    def _check_turns(self) -> "Source":
        if self.turns != "last" and self.adapter != "pairs":
            raise ValueError(f"turns is '{self.turns}', which only the adapter 'pairs' reads; got '{self.adapter}'")
        return self


class TextSection(Section):
    """How conversations are converted to token ids."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Maximum length of prompt plus completion, in tokens."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """`keep_start` cuts the end of the completion; `keep_end` cuts the beginning of the prompt."""
    chat_template: str | None = None
    """Jinja template, or a file with one; default the tokenizer's."""
    thinking: Literal["score", "context", "drop"] | None = None
    """Reasoning in front of answers. `score`: part of the loss. `context`: read, but not scored. `drop`: removed.
    Default `score` if the chat template renders reasoning, else `drop`."""
    ignore_message_keys: list[str] = Field(default=[])
    """Keys of messages that are left out; without it, an unknown key is an error."""


class DataRecipe(Section):
    """Data for training and evaluation."""

    data: Annotated[list[Source], Field(min_length=1)]
    """Main stream: the safety-labeled set."""
    buffer: list[Source] = Field(default=[])
    """Buffer stream: the helpfulness set. Without it, training has a single stream."""
    eval: list[Source] = Field(default=[])
    """Evaluation pairs; alternatively `holdout`."""
    holdout: Share = 0.0
    """Share of the prompts of `data` and `buffer` held out for evaluation, chosen by a hash of the prompt."""
    benchmarks: list[str] = Field(default=[])
    """Files of prompts (txt, csv, json, jsonl) for later evaluations; training prompts must not be among them."""
    text: TextSection = TextSection()
    """How conversations are converted to token ids."""
    conflicts: Literal["drop", "keep", "error"] = "drop"
    """What to do with answers labeled both safe and unsafe, and with pairs that occur in both orders."""
    leaks: Literal["error", "drop"] = "error"
    """What to do with training prompts that are also in `eval` or `benchmarks`."""
    max_dropped: Share = 0.1
    """Maximum share of a source's pairs that may be dropped; more stops the run."""


class NewModel(Section):
    """Randomly initialized Llama-type model with its own tokenizer, for use without a hub."""

    shape: Literal["nano", "tiny", "small", "base"] = "tiny"
    """Size of the model; see `bfpo.model.new.SHAPES`."""
    vocab_size: Annotated[int, Field(ge=300)] = 4096
    """Vocabulary size of the byte-level BPE tokenizer."""
    texts: list[Source] | None = None
    """Training texts of the tokenizer; default the recipe's training data."""
    seed: int = 42
    """Seed of the initial weights."""


class LayoutSection(Section):
    """How the tokens of a micro-batch are laid out."""

    kind: Literal["packed", "padded"] = "packed"
    """`packed`: one row without padding, each prompt once. `padded`: one row per completion. Equal numbers."""
    max_tokens_per_pack: Count = 8192
    """For `packed`: maximum number of tokens in a pack; a larger micro-batch is split into several packs."""


class LoraSection(Section):
    """Low-rank adapters (LoRA) that are trained instead of the weights. Dropout is always 0."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank."""
    alpha: Annotated[int, Field(ge=1)] = 32
    """Scale; updates are multiplied by alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers with adapters; `all-linear` means every linear layer except the head."""


class ProbeSection(Section):
    """Held-out prompts that the policy itself answers before and after training."""

    prompts: Annotated[int, Field(ge=2)] = 12
    """Number of prompts: half of them with an unsafe answer in the data, half without."""
    max_new_tokens: Count = 32
    """Maximum length of an answer, in tokens."""


class ModelSection(Section):
    """Model that supervised fine-tuning starts from."""

    path: str | None = None
    """Hub id or folder of a model, or of an adapter to train further; or a GGUF file (`.gguf`)."""
    gguf_file: str | None = None
    """GGUF file in the folder or hub repository `path`; its weights are dequantized."""
    new: NewModel | None = None
    """A new, randomly initialized model instead."""
    revision: str | None = None
    """Hub revision."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. Training in pure bfloat16 loses small updates; `trainer: {bf16: true}` doesn't."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention implementation of transformers, `eager` if the model lacks `sdpa`; packed rows use their own."""
    trust_remote_code: bool = False
    """Whether to run code that comes with the model; read that code first."""
    load_in_4bit: bool = False
    """Whether to quantize the frozen weights to 4 bits (QLoRA); needs a GPU, and `lora` or an adapter at `path`."""

    @model_validator(mode="before")
    @classmethod
    def _join_gguf_file(cls, values: Any) -> Any:
        return join_gguf_file(values)

    @model_validator(mode="after")
    def _check_origin(self) -> "ModelSection":
        origins = [name for name in ("path", "new", "sft") if getattr(self, name, None) is not None]
        allowed = [name for name in ("path", "new", "sft") if name in type(self).model_fields]
        if len(origins) != 1:
            raise ValueError(f"expected exactly one of {', '.join(allowed)}; got {', '.join(origins) or 'none'}")
        if self.load_in_4bit and self.path is not None and is_gguf(self.path):
            raise ValueError("load_in_4bit can't read a GGUF file; convert it first (bfpo model import)")
        return self


class SftRecipe(Section):
    """`bfpo sft`: supervised fine-tuning on completions."""

    model: ModelSection
    """Model to start from."""
    data: Annotated[list[Source], Field(min_length=1)]
    """Pairs (see `use`), or prompts with completions (`adapter: demonstrations`)."""
    holdout: Share = 0.0
    """Share of the prompts held out for evaluation, chosen by a hash of the prompt."""
    max_dropped: Share = 0.1
    """Maximum share of a source's completions that may be dropped; more stops the run."""
    text: TextSection = TextSection()
    """How conversations are converted to token ids."""
    train_only: list[str] | None = None
    """Patterns of the parameters to train; default all."""
    lora: LoraSection | None = None
    """Low-rank adapters to train instead of the weights; can't be combined with `train_only`."""
    shared_adapter: str | None = None
    """Folder or hub id of an adapter of the same base model that is active beside the new adapter, and frozen. The
    new one can then be used with it only, as `steps:` of model sections."""
    experts: list[Expert] = Field(default=[])
    """Steps of the chain of `bfpo redteam` that each get an adapter of their own, from data of `adapter: guided`: one
    run for each, in a folder of `output_dir`, which model sections name as `steps:` (docs/redteam.md). With `shared`,
    first a `shared_adapter` for them is trained on all these steps."""
    router_aux_loss_coef: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    """Weight of the load-balancing loss of a mixture of experts; default that of the model's configuration."""
    layout: LayoutSection = LayoutSection()
    """How tokens are laid out; affects time and memory, not the numbers."""
    max_eval: Count | None = 2000
    """Maximum number of evaluated completions, a seeded sample; null for all."""
    trainer: dict[str, Any] = Field(default={})
    """Arguments of `transformers.TrainingArguments`."""

    @model_validator(mode="after")
    def _check_trained_parameters(self) -> "SftRecipe":
        _check_trained_parameters(self)
        return self

    @model_validator(mode="after")
    def _check_experts(self) -> "SftRecipe":
        if not self.experts:
            return self
        if len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts has a step twice: {', '.join(self.experts)}")
        if others := sorted({source.adapter for source in self.data} - {"guided"}):
            raise ValueError(f"experts are trained on steps of adapter 'guided'; data has '{others[0]}'")
        if self.train_only is not None:
            raise ValueError("experts are adapters, and train_only trains the weights; set lora instead")
        if SHARED in self.experts:
            if missing := [step for step in ("analysis", "guidance", "answer") if step not in self.experts]:
                raise ValueError(f"experts has shared, which is active in every step; add {', '.join(missing)}")
            if self.lora is None or self.shared_adapter is not None:
                raise ValueError("experts has shared, a new adapter; set lora, and leave out shared_adapter")
        return self

    @model_validator(mode="after")
    def _check_shared_adapter(self) -> "SftRecipe":
        if self.shared_adapter is not None and self.lora is None:
            raise ValueError("shared_adapter is active beside a new adapter; set lora")
        return self


class TrainModel(ModelSection):
    """Model that preference training starts from; it is also the reference."""

    sft: SftRecipe | None = None
    """A model that this recipe fine-tunes first; it is cached by the recipe's content."""

    @model_validator(mode="after")
    def _check_sft(self) -> "TrainModel":
        if self.sft is not None and self.sft.experts:
            raise ValueError("sft.experts makes several adapters, and a training starts from one model; leave it out")
        if self.sft is not None and self.sft.shared_adapter is not None:
            raise ValueError("sft.shared_adapter makes an adapter that can't be used alone; leave it out")
        return self


class ScoreLabelsSection(Section):
    """Preferences that follow from the scores of the answers, in place of the order of the data."""

    source: Literal["scores"] = Field(alias="from")
    """The columns `chosen_reward`, `rejected_reward`, `chosen_cost` and `rejected_cost`, which every pair needs."""
    multiplier: str
    """`dual.json` of `bfpo dual`, or its folder: the score of an answer is reward - λ·cost."""
    draw: Literal["soft", "probability", "argmax"] = "soft"
    """`soft`: probabilities by the Bradley-Terry model, or for squared losses the difference as the target.
    `probability`: the order of each pair is drawn once. `argmax`: the higher score is preferred."""
    seed: int = 42
    """Seed of `probability`."""

    @model_serializer(mode="wrap")
    def _dump_by_key(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"from" if name == "source" else name: value for name, value in dump(self).items()}


class SafeFirstSection(Section):
    """The order of the data, except that a safe answer is preferred to an unsafe one."""

    source: Literal["safety"] = Field(alias="from")
    """The safety labels: a pair whose rejected answer alone is safe is swapped."""
    both_unsafe: Literal["helpful", "cost"] = "helpful"
    """Which of two unsafe answers is preferred. `helpful`: the more helpful one, as in the data. `cost`: the one of
    the lower `*_cost`, which such pairs then need."""

    @model_serializer
    def _dump_by_key(self) -> dict[str, str]:
        return {"from": self.source, "both_unsafe": self.both_unsafe}


def _label_source(value: object) -> str | None:
    source = value.get("from") if isinstance(value, Mapping) else getattr(value, "source", None)
    return source if isinstance(source, str) else None


LabelsSection = Annotated[
    Annotated[ScoreLabelsSection, Tag("scores")] | Annotated[SafeFirstSection, Tag("safety")],
    Discriminator(
        _label_source,
        custom_error_type="label_source",
        custom_error_message="expected {from: scores, multiplier: dual.json} or {from: safety}",
    ),
]


class OuterSection(Section):
    """Rounds of training, sampling and judging that move the multiplier until the constraint holds (C-DPO).

    The constraint, and the multiplier of the first round, are those of the `dual.json` of `labels` or of the loss.
    """

    prompts: str
    """File of prompts that the trained policy answers; those of the constraint's kind count."""
    judge: str
    """Spec of the judge that measures the constraint, such as `cost:PATH`, as for `bfpo judge`."""
    reward: str | None = None
    """Spec of a judge whose mean score is the helpfulness that is shown; it judges the answers to all prompts."""
    rounds: Count = 5
    """Maximum number of rounds."""
    samples: Count = 8
    """Number of answers to each prompt and in each round, at the temperature of `dual.json`."""
    max_new_tokens: Count = 256
    """Maximum length of an answer, in tokens."""
    seed: int = 1
    """Seed of the answers of the first round; further rounds have the next ones."""


class TrainRecipe(DataRecipe):
    """`bfpo train`: preference training."""

    model: TrainModel
    """Model to start from."""
    buffer_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the mean loss of the buffer stream."""
    safety: Literal["labels", "scores"] = "labels"
    """What the loss uses as safety: the labels, or the probabilities in `*_safety_score`."""
    loss: LossSection = BFPOSection()
    """Name and hyperparameters of the loss."""
    labels: LabelsSection | None = None
    """Preferences from scores or with the safe answer first, for any loss; default the order of the data."""
    outer: OuterSection | None = None
    """Train in rounds that move the multiplier until the policy meets the constraint; default one training."""
    train_only: list[str] | None = None
    """Patterns of the parameters to train, regular expressions that are searched in the names; default all."""
    lora: LoraSection | None = None
    """Low-rank adapters to train instead of the weights; can't be combined with `train_only`."""
    reference: ReferenceKind = "auto"
    """`adapter`: the policy with its adapter disabled. `shared`: a copy of the trained weights, with the other
    weights of the policy. `cache`: log-probabilities on disk. `auto`: the one that fits what is trained."""
    cache_dir: str | None = None
    """Folder of `reference: cache`; default `cache/reference` beside the output folder."""
    router_aux_loss_coef: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    """Weight of the load-balancing loss of a mixture of experts; default that of the model's configuration."""
    layout: LayoutSection = LayoutSection()
    """How tokens are laid out; affects time and memory, not the numbers."""
    max_eval: Count | None = 2000
    """Maximum number of evaluated pairs of each stream, a seeded sample; null for all."""
    probe: ProbeSection | None = ProbeSection()
    """Held-out prompts that the policy itself answers before and after `bfpo train`; null for none."""
    trainer: dict[str, Any] = Field(default={})
    """Arguments of `transformers.TrainingArguments`."""

    @model_validator(mode="after")
    def _check_trained_parameters(self) -> "TrainRecipe":
        _check_trained_parameters(self)
        return self

    @model_validator(mode="after")
    def _check_one_multiplier(self) -> "TrainRecipe":
        loss = self.loss
        has_weight = isinstance(loss, BFPOSection) and (loss.multiplier or loss.safety_weight)
        if isinstance(self.labels, ScoreLabelsSection) and has_weight:
            raise ValueError("labels and loss.safety_weight both have a multiplier; leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_outer(self) -> "TrainRecipe":
        has_file = isinstance(self.labels, ScoreLabelsSection) or getattr(self.loss, "multiplier", None) is not None
        if self.outer is not None and not has_file:
            raise ValueError(
                "outer moves the multiplier of a dual.json, and there is none; set labels to {from: scores, "
                "multiplier: dual.json}, or loss.multiplier of bfpo"
            )
        return self

    @model_validator(mode="after")
    def _check_label_errors(self) -> "TrainRecipe":
        if isinstance(self.loss, BFPOSection) and self.loss.label_errors is not None:
            if self.safety == "scores":
                raise ValueError("loss.label_errors corrects labels, and safety is 'scores'; leave one of them out")
            if isinstance(self.labels, ScoreLabelsSection):
                raise ValueError(
                    "loss.label_errors corrects labels, and labels come from scores; leave one of them out"
                )
            if self.labels is not None:
                raise ValueError(
                    "loss.label_errors corrects labels of pairs whose order doesn't depend on them, and labels come "
                    "from safety; leave one of them out"
                )
        return self


class HeadsSection(Section):
    """Heads of a score model."""

    reward: bool = True
    """Whether to train a reward: higher is more helpful. It learns from the order of the pairs, of both streams."""
    cost: bool = True
    """Whether to train a cost: above 0 is unsafe. It learns from the safety labels of the main stream."""

    @property
    def names(self) -> tuple[Literal["reward", "cost"], ...]:
        """Names of the heads."""
        names: dict[Literal["reward", "cost"], bool] = {"reward": self.reward, "cost": self.cost}
        return tuple(name for name, is_trained in names.items() if is_trained)


class ScoreRecipe(DataRecipe):
    """`bfpo score train`: a model that gives answers a reward and a cost."""

    model: ModelSection
    """Model to start from; its language-model head is replaced."""
    per_token: Literal[False] = False
    """`true` trains a cost head for guards, with the keys of the next section."""
    heads: HeadsSection = HeadsSection()
    """Heads to train on the one backbone."""
    regularization: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.001
    """Weight of the squares of both scores of a pair, for each head, as in Safe RLHF."""
    center_rewards_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of the square of the sum of both rewards of a pair, as in TRL's `RewardTrainer`."""
    buffer_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the mean loss of the buffer stream, which trains the reward alone."""
    train_only: list[str] | None = None
    """Patterns of the parameters to train besides the heads, as in `bfpo train`; default all."""
    lora: LoraSection | None = None
    """Low-rank adapters to train besides the heads; they are merged at the end."""
    layout: LayoutSection = LayoutSection()
    """How tokens are laid out; affects time and memory, not the numbers."""
    max_eval: Count | None = 2000
    """Maximum number of evaluated pairs of each stream, a seeded sample; null for all."""
    trainer: dict[str, Any] = Field(default={})
    """Arguments of `transformers.TrainingArguments`."""

    @model_validator(mode="after")
    def _check(self) -> "ScoreRecipe":
        _check_trained_parameters(self)
        if not self.heads.names:
            raise ValueError("heads has neither a reward nor a cost; expected at least one")
        if self.buffer and not self.heads.reward:
            raise ValueError("buffer trains the reward alone, and heads.reward is false; leave buffer out")
        if self.model.load_in_4bit:
            raise ValueError("model.load_in_4bit isn't possible for score models; leave it out")
        if self.text.truncation != "keep_start" or self.text.thinking is not None:
            raise ValueError(
                "text.truncation and text.thinking have no effect: a score is that of a whole answer without its "
                "reasoning; leave them out"
            )
        return self


def _check_trained_parameters(recipe: SftRecipe | TrainRecipe | ScoreRecipe) -> None:
    if recipe.lora is not None and recipe.train_only is not None:
        raise ValueError("train_only and lora can't be combined: with lora only the adapter is trained")
