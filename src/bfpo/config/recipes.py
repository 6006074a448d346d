"""Recipes: one YAML file, one command, one model. Here is what may stand in them.

The string behind each field is its documentation. `trainer:` holds `transformers.TrainingArguments` names and `loss:`
the fields of the loss; both are checked where they are used. Nothing here needs torch.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bfpo.config.losses import BFPOSection, LossSection

# `as` exports the names again: recipes of other packages are made of them.
from bfpo.config.section import Count as Count
from bfpo.config.section import Fraction as Fraction
from bfpo.config.section import Section as Section
from bfpo.config.section import Share as Share

ReferenceKind = Literal["auto", "adapter", "shared", "cache"]


class Source(Section):
    """One data set and how to read it."""

    path: str | list[str]
    """Hub id (`org/name`), or local file, or pattern such as `data/*.csv`, or a list of files."""
    adapter: str = "pairs"
    """How a raw row becomes a preference pair; a key of `bfpo.data.adapters.ADAPTERS`."""
    name: str | None = None
    """Hub configuration."""
    revision: str | None = None
    """Hub revision; pin it, or the data may change under you."""
    split: str | None = None
    """Hub split; default `train`."""
    fraction: Fraction | None = None
    """Share of the pairs to take."""
    limit: Count | None = None
    """Number of pairs to take at most, after `fraction`."""
    sample: Literal["random", "head"] = "random"
    """Which pairs `fraction` and `limit` take: a seeded sample, or the first ones as the official code does."""
    seed: int = 42
    """Seed of the sample."""
    columns: dict[str, str] = Field(default={})
    """Renames, `{what the adapter expects: what the file calls it}`."""
    assume_safe: bool = False
    """Label an unlabeled set safe throughout; written into `safety_label_source` as `assumed`."""
    partial_refusals: Literal["refusal", "compliance", "drop"] = "refusal"
    """`xstest_completions` only: what a partial refusal counts as."""
    use: Literal["chosen", "rejected", "both", "safer"] = "chosen"
    """`bfpo sft` only: which answers of a pair to imitate. `safer` takes the safe one and drops both-unsafe pairs."""
    license: str | None = None
    """License of the data, where the adapter doesn't know it."""


class DataRecipe(Section):
    """What is trained on and evaluated on."""

    data: Annotated[list[Source], Field(min_length=1)]
    """The main stream: the safety-labeled set."""
    buffer: list[Source] = Field(default=[])
    """The buffer stream: the helpfulness set. Empty means single-stream training."""
    eval: list[Source] = Field(default=[])
    """Evaluation pairs. Alternative: `holdout`."""
    holdout: Share = 0.0
    """Share of the prompts held out from `data` and `buffer` for evaluation, chosen by the prompt's hash."""
    benchmarks: list[str] = Field(default=[])
    """Prompt files (txt, csv, json, jsonl) that will be evaluated on later: checked for leaks."""
    conflicts: Literal["drop", "keep", "error"] = "drop"
    """What to do with answers that carry both safety labels and pairs that stand in both orders."""
    leaks: Literal["error", "drop"] = "error"
    """What to do with training prompts that stand in `eval` or `benchmarks`."""
    max_dropped: Share = 0.1
    """Largest share of a source's pairs that may be dropped before the run stops."""


class NewModel(Section):
    """A randomly initialized Llama-type model with its own tokenizer, for places without a hub."""

    shape: Literal["nano", "tiny", "small", "base"] = "tiny"
    """Size: `bfpo.model.new.SHAPES` has the numbers."""
    vocab_size: Annotated[int, Field(ge=300)] = 4096
    """Entries of the byte-level BPE tokenizer."""
    texts: list[Source] | None = None
    """What the tokenizer is trained on; default the recipe's own training data."""
    seed: int = 42
    """Seed of the initial weights."""


class TextSection(Section):
    """From conversations to token ids."""

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest prompt plus completion, in tokens."""
    truncation: Literal["keep_start", "keep_end"] = "keep_start"
    """`keep_start` cuts the end of the completion; `keep_end` cuts the beginning of the prompt."""
    chat_template: str | None = None
    """Jinja template or a file with one; default the tokenizer's own."""


class LayoutSection(Section):
    """How the tokens of a micro-batch are fed."""

    kind: Literal["packed", "padded"] = "packed"
    """`packed`: one row without padding, each prompt once; `padded`: a row for each completion. Same numbers."""
    max_tokens_per_pack: Count = 8192
    """Tokens fed at a time; a micro-batch with more is split into several packs. `packed` only."""


class LoraSection(Section):
    """Low-rank adapters (LoRA) instead of training the weights themselves. Dropout is always 0."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank."""
    alpha: Annotated[int, Field(ge=1)] = 32
    """Scale: updates are multiplied by alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get adapters; `all-linear` means every linear layer but the head."""


class ModelSection(Section):
    """The model that supervised fine-tuning starts from."""

    path: str | None = None
    """Hub id or folder, of a model or of an adapter that is then trained further."""
    new: NewModel | None = None
    """Or a random model made on the spot."""
    revision: str | None = None
    """Hub revision."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. Training in pure bfloat16 loses small updates; `trainer: {bf16: true}` doesn't."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention of transformers, for everything but packed rows, which bring their own."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read that code."""
    load_in_4bit: bool = False
    """Quantize the frozen weights to 4 bits (QLoRA); needs `lora` or an adapter at `path`, and a GPU."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        origins = [name for name in ("path", "new", "sft") if getattr(self, name, None) is not None]
        allowed = [name for name in ("path", "new", "sft") if name in type(self).model_fields]
        if len(origins) != 1:
            raise ValueError(f"expected exactly one of {', '.join(allowed)}; got {', '.join(origins) or 'none'}")
        return self


class SftRecipe(Section):
    """`bfpo sft`: supervised fine-tuning on completions."""

    model: ModelSection
    """What to start from."""
    data: Annotated[list[Source], Field(min_length=1)]
    """Pairs (see `use`), or prompts with completions (`adapter: demonstrations`)."""
    holdout: Share = 0.0
    """Share of the prompts held out for evaluation, chosen by the prompt's hash."""
    max_dropped: Share = 0.1
    """Largest share of the completions that may be dropped before the run stops."""
    text: TextSection = TextSection()
    """From conversations to token ids."""
    train_only: list[str] | None = None
    """Patterns of the parameters to train; default all."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead; not together with `train_only`."""
    layout: LayoutSection = LayoutSection()
    """How tokens are fed; it decides time and memory, not numbers."""
    max_eval: Count | None = 2000
    """Evaluate on at most so many completions, a seeded sample; null for all."""
    trainer: dict[str, Any] = Field(default={})
    """`transformers.TrainingArguments` names."""

    @model_validator(mode="after")
    def _one_way_to_train(self) -> "SftRecipe":
        _check_what_is_trained(self)
        return self


class TrainModel(ModelSection):
    """The model that preference training starts from; it is also the reference."""

    sft: SftRecipe | None = None
    """Or a model fine-tuned on the spot by this recipe; made once and cached by content."""


class TrainRecipe(DataRecipe):
    """`bfpo train`: preference training."""

    model: TrainModel
    """What to start from."""
    buffer_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the buffer's mean loss."""
    safety: Literal["labels", "scores"] = "labels"
    """What the loss reads as safety: the bits, or the probabilities in `*_safety_score`."""
    text: TextSection = TextSection()
    """From conversations to token ids."""
    loss: LossSection = BFPOSection()
    """`name` of the loss, and its hyperparameters."""
    train_only: list[str] | None = None
    """Patterns (regular expressions, searched in the name) of the parameters to train; default all."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead; the reference is the adapter switched off. Not together with `train_only`."""
    reference: ReferenceKind = "auto"
    """`adapter` switched off, weights `shared` with the policy, or a `cache` of numbers; `auto` chooses what fits."""
    cache_dir: str | None = None
    """Where `reference: cache` keeps its numbers; default `cache/reference` beside the output folder."""
    layout: LayoutSection = LayoutSection()
    """How tokens are fed; it decides time and memory, not numbers."""
    max_eval: Count | None = 2000
    """Evaluate on at most so many pairs of each stream, a seeded sample; null for all."""
    trainer: dict[str, Any] = Field(default={})
    """`transformers.TrainingArguments` names."""

    @model_validator(mode="after")
    def _one_way_to_train(self) -> "TrainRecipe":
        _check_what_is_trained(self)
        return self


def _check_what_is_trained(recipe: SftRecipe | TrainRecipe) -> None:
    if recipe.lora is not None and recipe.train_only is not None:
        raise ValueError("train_only and lora exclude each other; with lora only the adapter is trained")
