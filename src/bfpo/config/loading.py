"""Reading recipes: YAML, overrides, and errors that say what is wrong and what to write instead.

Unknown keys are refused with the most similar known key, and keys of older stacks with what to use instead: ignoring
a key is worse than refusing it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import Tag, ValidationError
from pydantic_core import ErrorDetails

from bfpo.config.recipes import Section, Source
from bfpo.core.terminal import warn
from bfpo.errors import RecipeError, did_you_mean

RecipeType = TypeVar("RecipeType", bound=Section)

# Keys of older stacks, refused anywhere in a recipe. Every public DPO recipe has some of them.
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
# Former keys of bfpo, anywhere in a recipe; they are accepted with a warning.
DEPRECATED = {"licence": "license", "labelled_by": "labeled_by"}
# No recipe comes close; a file of a few lines whose aliases multiply does.
_MAX_DEPTH, _MAX_VALUES = 50, 100_000
# The keys of these mappings are names of columns, which may be anything.
_COLUMN_MAPPINGS = ("columns", "where")


class _Loader(yaml.SafeLoader):
    """YAML in which `5e-7` is a number, `no` is a string, and a duplicate key is an error.

    In YAML 1.1 `eval_strategy: no` would be false. Only true and false are booleans here.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; one that its type doesn't allow, such as a 13th month, is an error."""
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep=deep)
        place = f"line {node.start_mark.line + 1}: {node.value[:40]!r}"
        try:
            node.value.encode()
            return super().construct_object(node, deep=deep)
        except UnicodeEncodeError:
            raise RecipeError(f"{place} has a lone surrogate, which isn't a character; remove it") from None
        # The constructors of numbers, booleans and dates rely on a tag that fits.
        except (ValueError, LookupError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            raise RecipeError(f"{place} is not a valid {kind}; put it in quotes if it is a text") from None


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class _Dumper(yaml.SafeDumper):
    """YAML that quotes strings which `_Loader` would read as numbers."""


for _dialect in (_Loader, _Dumper):
    _dialect.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"line {key.start_mark.line + 1}: a key is a {key.id}; expected a name")
        if key.value in seen and key.value != "<<":
            raise RecipeError(f"line {key.start_mark.line + 1}: duplicate key '{key.value}'; keep one")
        seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def parse_yaml(text: str, where: str) -> Any:
    """Parse a text in the YAML dialect of recipes.

    Args:
        text: YAML.
        where: Name of the file, for errors.

    Raises:
        RecipeError: If the text isn't valid YAML or has a duplicate key; the message has the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise RecipeError(f"{where}: nested more than {_MAX_DEPTH} levels deep") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def _count_nodes(node: yaml.Node, counts: dict[int, int], depth: int = 1) -> int:
    """Return the number of values in a node with its aliases written out.

    Args:
        node: The node.
        counts: Numbers by id of a node; 0 for the nodes that contain this one.
        depth: Level of the node.

    Raises:
        RecipeError: If there are too many values or levels, or a node contains itself.
    """
    if depth > _MAX_DEPTH:
        raise RecipeError(f"line {node.start_mark.line + 1}: nested more than {_MAX_DEPTH} levels deep")
    if id(node) in counts:
        if counts[id(node)] == 0:
            raise RecipeError(f"line {node.start_mark.line + 1}: an alias is part of what it stands for")
        return counts[id(node)]
    counts[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    count = 1 + sum(_count_nodes(child, counts, depth + 1) for child in children)
    if count > _MAX_VALUES:
        raise RecipeError(f"line {node.start_mark.line + 1}: more than {_MAX_VALUES:,} values with all aliases")
    counts[id(node)] = count
    return count


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Read a recipe file and apply overrides, without checking its keys.

    Args:
        path: YAML file.
        overrides: Changes of the form `key.sub=value`, where the value is YAML; `data.0.limit=10` reaches into lists.

    Raises:
        RecipeError: If the file is missing or isn't a YAML mapping, or an override can't be applied.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        got = "empty" if content is None else f"a {type(content).__name__}"
        raise RecipeError(f"recipe {path} is {got}; expected sections such as data: and model:")
    for override in overrides or []:
        _apply_override(content, override)
    return content


def check_recipe(content: dict[str, Any], kind: type[RecipeType], where: str) -> RecipeType:
    """Check a mapping and return it as a recipe.

    Args:
        content: Sections and keys, as read from a file.
        kind: Class of the recipe.
        where: Name of the file, for errors.

    Raises:
        RecipeError: If any key or value is wrong; the message lists each with what was got and what is allowed.
    """
    content = _with_current_keys(content, where)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = "\n".join(f"  {_describe(fault, content, kind)}" for fault in error.errors())
        raise RecipeError(f"{where}:\n{lines}") from None


def load_recipe(path: str | Path, kind: type[RecipeType], overrides: list[str] | None = None) -> RecipeType:
    """Read a recipe file, apply overrides and check it; see `read_recipe` and `check_recipe`."""
    return check_recipe(read_recipe(path, overrides), kind, str(path))


def holds_recipe(path: Path, recipe: Section) -> bool:
    """Whether a file that `dump_recipe` wrote, perhaps an earlier version of it, holds this recipe."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        return type(recipe).model_validate(_rename_keys(content, str(path), "", {})) == recipe
    except (OSError, UnicodeDecodeError, RecipeError, ValidationError):
        return False


def dump_recipe(recipe: Section) -> str:
    """Return a recipe as YAML that reads back as the same recipe.

    Non-ASCII characters are escaped, because YAML folds some of them (such as NEL).
    """
    return dump_yaml(recipe.model_dump(mode="json"))


def dump_yaml(content: dict[str, Any]) -> str:
    """Return a mapping as YAML that `parse_yaml` reads back as the same mapping."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key_path, equals, value = override.partition("=")
    if not equals or not key_path:
        raise RecipeError(f"override '{override}': expected key.sub=value")
    section: Any = content
    *keys, last = key_path.split(".")
    for key in keys:
        section = _descend(section, key, override)
    parsed = parse_yaml(value, f"override '{override}'")
    if isinstance(section, list):
        section[_index(section, last, override)] = parsed
    elif isinstance(section, dict):
        section[last] = parsed
    else:
        raise RecipeError(f"override '{override}': '{'.'.join(keys)}' is {section!r}, not a section")


def _descend(section: Any, key: str, override: str) -> Any:
    if isinstance(section, list):
        place: Any = _index(section, key, override)
        inner = section[place]
    elif isinstance(section, dict):
        place, inner = key, section.get(key)
        inner = {} if inner is None else inner
    else:
        raise RecipeError(f"override '{override}': '{key}' can't be a key of {section!r}, which is not a section")
    # A copy: behind an alias of YAML the same section is in several places.
    section[place] = copy(inner)
    return section[place]


def _index(entries: list[Any], key: str, override: str) -> int:
    if not key.isdecimal() or int(key) >= len(entries):
        raise RecipeError(f"override '{override}': '{key}' is not an index below {len(entries)}")
    return int(key)


def _with_current_keys(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a recipe with its deprecated keys renamed, after a warning; keys of older stacks are refused."""
    deprecated: dict[str, list[str]] = {}
    current: dict[str, Any] = _rename_keys(content, where, "", deprecated)
    for key, places in deprecated.items():
        warn(f"{where}: '{key}' is deprecated, use '{DEPRECATED[key]}' ({', '.join(places)})")
    return current


def _rename_keys(value: Any, where: str, path: str, deprecated: dict[str, list[str]]) -> Any:
    """Rename deprecated keys at all depths, and record where they are."""
    if isinstance(value, list):
        return [_rename_keys(inner, where, f"{path}{index}.", deprecated) for index, inner in enumerate(value)]
    if not isinstance(value, dict):
        return value
    renamed = {}
    for key, inner in value.items():
        if key in RENAMED:
            raise RecipeError(
                f"{where}: {path}{key} is a key of an older stack; use {RENAMED[key]} (bfpo migrate turns a whole "
                "file into a recipe)"
            )
        new_key = DEPRECATED.get(key, key)
        if new_key != key:
            if new_key in value:
                raise RecipeError(f"{where}: {path}{key} and {path}{new_key} are the same key; keep '{new_key}'")
            deprecated.setdefault(key, []).append(path + key)
        is_column_mapping = key in _COLUMN_MAPPINGS
        renamed[new_key] = inner if is_column_mapping else _rename_keys(inner, where, f"{path}{key}.", deprecated)
    return renamed


def _describe(fault: ErrorDetails, content: Any, kind: type[Section]) -> str:
    """Return one of pydantic's errors as a line: the key, what is wrong, what is allowed."""
    location = fault["loc"]
    key = ".".join(map(str, _input_keys(location, content, missing=fault["type"] == "missing")))
    if fault["type"] == "extra_forbidden":
        *home, last = location
        section, label = _section_at(kind, home)
        owner = f" of '{label}'" if label else ""
        hint = did_you_mean(str(last), [field.alias or name for name, field in section.model_fields.items()])
        return f"{key}: unknown key{owner}; {_other_places(str(last), key, content, kind)}{hint}"
    message = fault["msg"].removeprefix("Value error, ")
    got = f" (got {fault['input']!r})" if fault["type"] not in ("missing", "value_error") else ""
    return f"{key or 'recipe'}: {message}{got}"


def _input_keys(location: Sequence[int | str], content: Any, *, missing: bool) -> list[int | str]:
    """Return an error's location without the labels that pydantic gives to the members of unions."""
    keys: list[int | str] = []
    for part in location:
        in_list = isinstance(content, list) and isinstance(part, int)
        in_mapping = isinstance(content, Mapping) and part in content
        if in_list or in_mapping:
            content = content[part]
            keys.append(part)
    return [*keys, location[-1]] if missing else keys


def _section_at(kind: type[Section], location: Sequence[int | str]) -> tuple[type[Section], str]:
    """Return the section that a location leads to, and its label where it is one of several."""
    section, label = kind, ""
    members: dict[str, type[Section]] = {}
    for part in location:
        if part in section.model_fields:
            members = dict(_sections_in(section.model_fields[str(part)].annotation))
            section, label = members.get("", section), ""
        elif part in members:
            section, label = members[str(part)], str(part)
    return section, label


def _other_places(key: str, here: str, content: Any, kind: type[Section]) -> str:
    """Return a hint where an unknown key at the top of a recipe belongs; "" where no section has it."""
    if "." in here:
        return ""
    places = []
    for name, field in kind.model_fields.items():
        members = dict(_sections_in(field.annotation))
        if set(members) == {""}:
            section = members[""]
        else:
            given = content.get(name) if isinstance(content, Mapping) else None
            labels = set(map(str, given.values())) if isinstance(given, Mapping) else set()
            chosen = [member for label, member in members.items() if label in labels]
            section = chosen[0] if chosen else type(field.get_default(call_default_factory=True))
        if key in getattr(section, "model_fields", ()):
            places.append(f"'{name}.0.{key}'" if section is Source else f"'{name}.{key}'")
    return f"it belongs at {' or '.join(places)}; " if places else ""


def _sections_in(annotation: Any, label: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield the sections of a field's annotation, by their labels in a union; "" where there is no choice."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield label, annotation
    tags = [data.tag for data in getattr(annotation, "__metadata__", ()) if isinstance(data, Tag)]
    for argument in get_args(annotation):
        yield from _sections_in(argument, *tags[:1] or [label])
