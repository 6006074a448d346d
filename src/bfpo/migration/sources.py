"""The data of an old file: its mixers, mixtures and names become the sources of a recipe."""

from typing import Any

from bfpo.migration.draft import Draft, KeyOutcome
from bfpo.migration.rules import ADAPTERS, OFFICIAL_REVISIONS, OFFICIAL_SPLITS
from bfpo.migration.stacks import RecipeKind, Stack

SourceSection = dict[str, Any]

# Paths of `datasets` that name a format, not a data set.
_FILE_FORMATS = ("json", "csv", "parquet", "arrow", "text")
_HOLDOUT_COUNT = "the old value is a count, holdout is a share of the prompts; set holdout yourself"


def put_sources(draft: Draft, stack: Stack, kind: RecipeKind) -> None:
    """Write `data`, and `buffer` and `eval` if the old file has them."""
    remaining = draft.remaining
    if stack == "LLaMA-Factory":
        _put_named(draft, kind)
    elif "dataset_mixture" in remaining:
        _put_mixture(draft, kind)
    elif "dataset_mixer" in remaining:
        _put_mixer(draft, stack, kind)
    else:
        _put_trl(draft, kind)
    if kind == "train" and stack != "official BFPO":
        _assume_safe(draft)
    if "data" not in draft.recipe:
        draft.put("data", [{"path": "FILL-IN.jsonl"}])
        reason = "the file names no data; write a path"
        draft.outcomes.append(KeyOutcome("unsupported", "", "FILL-IN.jsonl", "data", reason))


def make_source(path: str, kind: RecipeKind, **options: Any) -> SourceSection:
    """Return a source with its adapter; options without a value are left out."""
    adapters = {name.casefold(): adapter for name, adapter in ADAPTERS[kind].items()}
    adapter = adapters.get(path.casefold(), "demonstrations" if kind == "sft" else "pairs")
    source: SourceSection = {"path": path}
    if adapter != "pairs":
        source["adapter"] = adapter
    return source | {name: value for name, value in options.items() if value is not None}


def _put_mixer(draft: Draft, stack: Stack, kind: RecipeKind) -> None:
    """Read `dataset_mixer: {id: fraction}` with `dataset_splits: [train.., test..]`, and the buffer's."""
    is_official = stack == "official BFPO"
    uses_buffer = draft.remaining.get("use_buffer") in (True, "True", "true")
    _put_mixer_stream(draft, "", "data", kind, is_official)
    if uses_buffer and kind == "train":
        _put_mixer_stream(draft, "buffer_", "buffer", kind, is_official)
        draft.note("computed", "use_buffer", recipe_key="buffer")
        return
    reason = "use_buffer is off" if kind == "train" else "fine-tuning has one stream"
    for key in ("use_buffer", "buffer_dataset_mixer", "buffer_dataset_splits"):
        if key in draft.remaining:
            draft.note("not needed", key, reason)


def _put_mixer_stream(draft: Draft, prefix: str, section: str, kind: RecipeKind, is_official: bool) -> None:
    mixer_key, splits_key = f"{prefix}dataset_mixer", f"{prefix}dataset_splits"
    fractions: dict[str, float] = draft.remaining.get(mixer_key) or {}
    splits = draft.remaining.get(splits_key) or ["train", "test"]
    train, test = (next((str(split) for split in splits if part in str(split)), "") for part in ("train", "test"))
    data, held_out = [], []
    for path, fraction in fractions.items():
        renamed_splits = OFFICIAL_SPLITS.get(path, {}) if is_official else {}
        # The only split of a file is "train".
        is_file = path.endswith((".json", ".jsonl", ".csv"))
        options = {"revision": OFFICIAL_REVISIONS.get(path) if is_official else None}
        if float(fraction) > 0:
            sample = {"fraction": float(fraction), "sample": "head"} if float(fraction) < 1 else {}
            split = None if is_file else renamed_splits.get(train, train) or None
            data.append(make_source(path, kind, split=split, **options, **sample))
        if test and not is_file:
            held_out.append(make_source(path, kind, split=renamed_splits.get(test, test), **options))
    is_sampled = any("fraction" in source for source in data)
    reason = "the first rows of each, as in the old file (sample: head)" if is_sampled else ""
    draft.compute(mixer_key, section, data, reason)
    reads_test = not prefix and kind == "train" and bool(held_out) and _evaluates(draft)
    if reads_test:
        draft.put("eval", held_out)
    if splits_key in draft.remaining:
        reason = ""
        if kind == "sft" and not prefix:
            reason = "test splits of fine-tuning data are not read; prompts are held out instead"
        recipe_key = f"{section}.split, eval" if reads_test else f"{section}.split"
        draft.note("computed", splits_key, reason, recipe_key=recipe_key)


def _put_mixture(draft: Draft, kind: RecipeKind) -> None:
    """Read alignment-handbook's `dataset_mixture: {datasets: [{id, config, split, columns, weight}], ..}`."""
    mixture = draft.remaining["dataset_mixture"]
    data = []
    for entry in mixture.get("datasets") or []:
        weight = entry.get("weight")
        sample = {}
        if weight is not None and weight < 1:
            sample = {"fraction": float(weight), "seed": mixture.get("seed", 0)}
        name = entry.get("config") if entry.get("config") != "default" else None
        split, revision = entry.get("split"), entry.get("revision")
        data.append(make_source(entry["id"], kind, name=name, split=split, revision=revision, **sample))
    draft.compute("dataset_mixture", "data", data, "unused columns are not read")
    size = mixture.get("test_split_size")
    if isinstance(size, float) and 0 < size < 1:
        draft.put("holdout", size)
        reason = "a share of the prompts"
        draft.outcomes.append(KeyOutcome("computed", "dataset_mixture.test_split_size", size, "holdout", reason))
    elif size:
        key = "dataset_mixture.test_split_size"
        draft.outcomes.append(KeyOutcome("unsupported", key, size, "holdout", _HOLDOUT_COUNT))


def _put_trl(draft: Draft, kind: RecipeKind) -> None:
    """Read TRL's `dataset_name` with its splits, or `datasets: [{path, name, split, data_files}]`."""
    remaining = draft.remaining
    entries = remaining.get("datasets")
    if entries:
        draft.compute("datasets", "data", [source for entry in entries for source in _read_entry(draft, entry, kind)])
    elif remaining.get("dataset_name"):
        path, name = remaining["dataset_name"], remaining.get("dataset_config")
        train, test = remaining.get("dataset_train_split", "train"), remaining.get("dataset_test_split", "test")
        draft.compute("dataset_name", "data", [make_source(path, kind, name=name, split=train)])
        if kind == "train" and _evaluates(draft):
            draft.put("eval", [make_source(path, kind, name=name, split=test)])
    has_data = bool(draft.recipe.get("data"))
    for key in ("dataset_config", "dataset_train_split", "dataset_test_split"):
        if key in remaining:
            draft.note("computed" if has_data else "not needed", key, recipe_key="data, eval")


def _read_entry(draft: Draft, entry: dict[str, Any], kind: RecipeKind) -> list[SourceSection]:
    """Return the sources of an entry of TRL's `datasets`; what they lack is noted."""
    read = {"path", "name", "split"}
    files, split = entry.get("data_files"), entry.get("split")
    if isinstance(files, dict):
        # Files by split, of which the others are not trained on.
        files, split = files.get(split or "train"), None
    sources = [make_source(entry["path"], kind, name=entry.get("name"), split=split)]
    if files and entry["path"] in _FILE_FORMATS:
        folder = f"{entry['data_dir']}/" if entry.get("data_dir") else ""
        paths = [files] if isinstance(files, str) else files
        sources = [make_source(f"{folder}{path}", kind, split=split) for path in paths]
        read |= {"data_files", "data_dir"}
    for key, value in entry.items():
        if key not in read and value is not None:
            reason = "write it into the source in data"
            draft.outcomes.append(KeyOutcome("unsupported", f"datasets.{key}", value, "data", reason))
    return sources


def _put_named(draft: Draft, kind: RecipeKind) -> None:
    """Read LLaMA-Factory's `dataset: a,b`, which are names of its dataset_info.json."""
    remaining = draft.remaining
    names = [name.strip() for name in str(remaining.get("dataset") or "").split(",") if name.strip()]
    limit = remaining.get("max_samples")
    if names:
        draft.put("data", [make_source(name, kind, limit=limit) for name in names])
        reason = "names of dataset_info.json: write a path or hub id each, and columns: {prompt: instruction, ..}"
        draft.note("unsupported", "dataset", reason, recipe_key="data")
    if "max_samples" in remaining:
        draft.note("computed", "max_samples", recipe_key="data.limit")
    size = remaining.get("val_size")
    if isinstance(size, int | float) and 0 < size < 1:
        draft.rename("val_size", "holdout")
    elif "val_size" in remaining:
        reason = _HOLDOUT_COUNT if size else "nothing is held out"
        draft.note("unsupported" if size else "not needed", "val_size", reason, recipe_key="holdout")
    if "eval_dataset" in remaining:
        draft.note("unsupported", "eval_dataset", "write its path into eval", recipe_key="eval")
    if "dataset_dir" in remaining:
        draft.note("not needed", "dataset_dir", "sources name their files")
    if "template" in remaining:
        reason = "the tokenizer's own chat template is used; text.chat_template sets another"
        draft.note("not needed", "template", reason)


def _assume_safe(draft: Draft) -> None:
    """Set `assume_safe` for sources without labels, so that a loss that reads no labels can be trained."""
    unlabeled = [
        source
        for section in ("data", "eval")
        for source in draft.recipe.get(section, [])
        if source.get("adapter") in (None, "hh_rlhf")
    ]
    for source in unlabeled:
        source["assume_safe"] = True
    if unlabeled:
        reason = "the loss reads no safety labels; before you use the loss bfpo, label the pairs and remove this"
        draft.outcomes.append(KeyOutcome("computed", "", True, "data.assume_safe", reason))


def _evaluates(draft: Draft) -> bool:
    return any(draft.remaining.get(key, "no") != "no" for key in ("evaluation_strategy", "eval_strategy"))
