"""Recipes: one YAML file, one command, one model.

A recipe is read, overridden (`key.sub=value`) and checked here; nothing in this module needs torch. Unknown keys
are refused with the nearest known one, and keys of older stacks with their new name. `trainer:` holds
`transformers.TrainingArguments` names and `loss:` the fields of the loss; both are checked where they are used.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bfpo.errors import RecipeError, did_you_mean

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a recipe; extra keys are forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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
    columns: dict[str, str] = {}
    """Renames, `{what the adapter expects: what the file calls it}`."""
    assume_safe: bool = False
    """Label an unlabelled set safe throughout; written into `safety_label_source` as `assumed`."""
    partial_refusals: Literal["refusal", "compliance", "drop"] = "refusal"
    """`xstest_completions` only: what a partial refusal counts as."""
    use: Literal["chosen", "rejected", "both", "safer"] = "chosen"
    """`bfpo sft` only: which answers of a pair to imitate. `safer` takes the safe one and drops both-unsafe pairs."""
    licence: str | None = None
    """Licence of the data, where the adapter doesn't know it."""


class DataRecipe(Section):
    """What is trained on and evaluated on."""

    data: Annotated[list[Source], Field(min_length=1)]
    """The main stream: the safety-labelled set."""
    buffer: list[Source] = []
    """The buffer stream: the helpfulness set. Empty means single-stream training."""
    eval: list[Source] = []
    """Evaluation pairs. Alternative: `holdout`."""
    holdout: Share = 0.0
    """Share of the prompts held out from `data` and `buffer` for evaluation, chosen by the prompt's hash."""
    benchmarks: list[str] = []
    """Prompt files (txt, csv, json, jsonl) that will be evaluated on later: checked for leaks."""
    conflicts: Literal["drop", "keep", "error"] = "drop"
    """What to do with answers that carry both safety labels and pairs that stand in both orders."""
    leaks: Literal["error", "drop"] = "error"
    """What to do with training prompts that stand in `eval` or `benchmarks`."""
    max_dropped: Share = 0.1
    """Largest share of a source's pairs that may be dropped before the run stops."""


class NewModel(Section):
    """A randomly initialised Llama-type model with its own tokenizer, for places without a hub."""

    shape: Literal["tiny", "small", "base"] = "tiny"
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


class LoraSection(Section):
    """Low-rank adapters (LoRA) instead of training the weights themselves. Dropout is always 0."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank."""
    alpha: Annotated[int, Field(ge=1)] = 32
    """Scale: updates are multiplied by alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get adapters; `all-linear` means every linear layer but the head."""


class SftModel(Section):
    """The model that supervised fine-tuning starts from."""

    path: str | None = None
    """Hub id or folder."""
    new: NewModel | None = None
    """Or a random model made on the spot."""
    revision: str | None = None
    """Hub revision."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. Training in pure bfloat16 loses small updates; `trainer: {bf16: true}` doesn't."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention of transformers."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read that code."""
    load_in_4bit: bool = False
    """Quantise the frozen weights to 4 bits (QLoRA); needs `lora`, a GPU and the extra `qlora`."""

    @model_validator(mode="after")
    def _one_origin(self) -> "SftModel":
        origins = [name for name in ("path", "new", "sft") if getattr(self, name, None) is not None]
        allowed = [name for name in ("path", "new", "sft") if name in type(self).model_fields]
        if len(origins) != 1:
            raise ValueError(f"expected exactly one of {', '.join(allowed)}; got {', '.join(origins) or 'none'}")
        return self


class SftRecipe(Section):
    """`bfpo sft`: supervised fine-tuning on completions."""

    model: SftModel
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
    trainer: dict[str, Any] = {}
    """`transformers.TrainingArguments` names."""

    @model_validator(mode="after")
    def _one_way_to_train(self) -> "SftRecipe":
        _check_what_is_trained(self)
        return self


class TrainModel(SftModel):
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
    loss: dict[str, Any] = {"name": "bfpo"}
    """`name` and the fields of that loss; see `bfpo.losses.LOSSES`."""
    train_only: list[str] | None = None
    """Patterns (regular expressions, searched in the name) of the parameters to train; default all."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead; the reference is the adapter switched off. Not together with `train_only`."""
    trainer: dict[str, Any] = {}
    """`transformers.TrainingArguments` names."""

    @model_validator(mode="after")
    def _one_way_to_train(self) -> "TrainRecipe":
        _check_what_is_trained(self)
        return self


def _check_what_is_trained(recipe: SftRecipe | TrainRecipe) -> None:
    if recipe.lora is not None and recipe.train_only is not None:
        raise ValueError("train_only and lora exclude each other; with lora only the adapter is trained")
    if recipe.model.load_in_4bit and recipe.lora is None:
        raise ValueError("model.load_in_4bit needs lora: quantised weights can't be trained")


RecipeType = TypeVar("RecipeType", bound=Section)

# Keys of older stacks, wherever they stand in a recipe. Every public DPO recipe has some of them, and a key that is
# ignored is worse than one that is refused.
RENAMED = {
    "warmup_ratio": "trainer.warmup_steps (a number below 1 is a share of all steps)",
    "evaluation_strategy": "trainer.eval_strategy",
    "torch_dtype": "model.dtype",
    "gradient_checkpointing": "trainer.activation_checkpointing",
    "gradient_checkpointing_kwargs": "trainer.activation_checkpointing_kwargs",
    "overwrite_output_dir": "nothing: a run never deletes an earlier one; choose another trainer.output_dir",
    "logging_dir": "the environment variable of your tracker; bfpo writes metrics.jsonl into trainer.output_dir",
    "group_by_length": "nothing: the stream plan decides the order",
    "save_safetensors": "nothing: weights are always safetensors",
    "no_cuda": "trainer.use_cpu",
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "dataset_mixer": "data, with one `fraction` per source",
    "dataset_mixture": "data, with one `fraction` per source",
    "dataset_splits": "the `split` of a source",
    "datasets": "data",
    "buffer_dataset_mixer": "buffer, with one `fraction` per source",
    "buffer_datasets": "buffer",
    "other_data_config": "data and buffer",
    "use_buffer": "buffer (a list of sources; leave it out for a single stream)",
    "buffer_loss_weight": "buffer_weight",
    "use_selective": "train_only",
    "selected_layers": "train_only",
    "trainable_modules": "train_only",
    "max_prompt_length": "text.max_length and text.truncation",
    "loss_type": "loss.name",
    "tokenizer_name_or_path": "nothing: the tokenizer comes with model.path",
}


class _Loader(yaml.SafeLoader):
    """YAML in which `5e-7` is a number and a key that stands twice is an error."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen and key.value != "<<":
            raise RecipeError(f"line {key.start_mark.line + 1}: key '{key.value}' stands twice; keep one")
        seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML by the recipe's rules.

    Raises:
        RecipeError: With `where` and the line, if the text isn't YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Read a recipe file and apply overrides, without checking the keys yet.

    Args:
        path: A YAML file.
        overrides: Strings `key.sub=value`; the value is YAML. `data.0.limit=10` reaches into lists.

    Raises:
        RecipeError: If the file is missing, isn't a YAML mapping, or an override has no place to go.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} holds {type(content).__name__}; expected sections such as data: and model:")
    for override in overrides or []:
        _apply(content, override)
    return content


def check_recipe(content: dict[str, Any], kind: type[RecipeType], where: str) -> RecipeType:
    """Turn a mapping into a recipe.

    Raises:
        RecipeError: With every fault found: the key, what was got, what is allowed.
    """
    _refuse_renamed(content, where)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(f"  {_fault(fault, kind)}" for fault in error.errors())
        raise RecipeError(f"{where}:\n{faults}") from None


def load_recipe(path: str | Path, kind: type[RecipeType], overrides: list[str] | None = None) -> RecipeType:
    """Read, override and check a recipe; see `read_recipe` and `check_recipe`."""
    return check_recipe(read_recipe(path, overrides), kind, str(path))


def dump_recipe(recipe: Section) -> str:
    """Return a recipe as YAML that reads back as the same recipe.

    Non-ASCII characters are escaped: YAML folds some of them (NEL, say) when they stand as they are.
    """
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _apply(content: dict[str, Any], override: str) -> None:
    keys, equals, value = override.partition("=")
    if not equals or not keys:
        raise RecipeError(f"override '{override}': expected key.sub=value")
    place: Any = content
    *path, last = keys.split(".")
    for key in path:
        place = _step(place, key, override)
    parsed = parse_yaml(value, f"override '{override}'")
    if isinstance(place, list):
        place[_index(place, last, override)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise RecipeError(f"override '{override}': '{'.'.join(path)}' is {place!r}, not a section")


def _step(place: Any, key: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, key, override)]
    if not isinstance(place, dict):
        raise RecipeError(f"override '{override}': '{key}' is asked of {place!r}, which is not a section")
    if place.get(key) is None:
        place[key] = {}
    return place[key]


def _index(place: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(place):
        raise RecipeError(f"override '{override}': '{key}' is not an index below {len(place)}")
    return int(key)


def _refuse_renamed(content: Any, where: str, path: str = "") -> None:
    if isinstance(content, list):
        for index, item in enumerate(content):
            _refuse_renamed(item, where, f"{path}{index}.")
    elif isinstance(content, dict):
        for key, value in content.items():
            if key in RENAMED:
                raise RecipeError(f"{where}: {path}{key} is a name of an older stack; use {RENAMED[key]}")
            if key != "columns":
                _refuse_renamed(value, where, f"{path}{key}.")


def _fault(fault: Any, kind: type[Section]) -> str:
    location = [part for part in fault["loc"] if part not in ("str", "list[str]")]
    key = ".".join(map(str, location))
    if fault["type"] == "extra_forbidden":
        known = _fields_at(kind, location[:-1])
        return f"{key}: unknown key; {_place_of(str(location[-1]), kind)}{did_you_mean(str(location[-1]), known)}"
    message = fault["msg"].removeprefix("Value error, ")
    got = f" (got {fault['input']!r})" if fault["type"] not in ("missing", "value_error") else ""
    return f"{key or 'recipe'}: {message}{got}"


def _place_of(key: str, kind: type[Section]) -> str:
    """Say where a key belongs that stands in the wrong section."""
    homes = [
        f"{name}.{key}"
        for name, model in _sections(kind).items()
        if key in model.model_fields and model is not Source
    ]
    return f"it belongs at '{homes[0]}'; " if homes else ""


def _sections(kind: type[Section]) -> dict[str, type[Section]]:
    found = {}
    for name, field in kind.model_fields.items():
        for candidate in (field.annotation, *_arguments(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                found[name] = candidate
    return found


def _arguments(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [inner for argument in arguments for inner in (argument, *_arguments(argument))]


def _fields_at(kind: type[Section], location: list[Any]) -> list[str]:
    for part in location:
        if isinstance(part, str):
            kind = _sections(kind).get(part, kind)
    return list(kind.model_fields)
