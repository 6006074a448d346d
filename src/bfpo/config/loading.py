"""Reading recipes: YAML, overrides, and errors that say what is wrong and what to write instead.

Unknown keys are refused with the nearest known one, and keys of older stacks with their new name: a key that is
ignored is worse than one that is refused.
"""

import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from bfpo.config.recipes import Section, Source
from bfpo.errors import RecipeError, did_you_mean

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
    """YAML in which `5e-7` is a number, `no` is a word, and a key that stands twice is an error.

    `eval_strategy: no` means the word; YAML 1.1 would make it false. true and false stay what they are.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class _Dumper(yaml.SafeDumper):
    """Quotes a word that `_Loader` would take for a number."""


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(
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
    return dump_yaml(recipe.model_dump(mode="json"))


def dump_yaml(content: dict[str, Any]) -> str:
    """Return a mapping as YAML that `parse_yaml` reads back as the same."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


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
                raise RecipeError(
                    f"{where}: {path}{key} is a name of an older stack; use {RENAMED[key]} (bfpo migrate turns a "
                    "whole file into a recipe)"
                )
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
