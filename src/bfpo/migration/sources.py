"""The data of an old file: mixers, mixtures and names become sources."""

from typing import Any

from bfpo.migration.draft import Draft, DraftLine
from bfpo.migration.rules import ADAPTERS, OFFICIAL_REVISIONS, OFFICIAL_SPLITS
from bfpo.migration.stacks import Kind, Stack

Source = dict[str, Any]


def put_sources(draft: Draft, stack: Stack, kind: Kind) -> None:
    """Write `data`, and `buffer` and `eval` where the old file has them."""
    left = draft.left
    if stack == "LLaMA-Factory":
        _put_named(draft, kind)
    elif "dataset_mixture" in left:
        _put_mixture(draft, kind)
    elif "dataset_mixer" in left:
        _put_mixer(draft, stack, kind)
    else:
        _put_trl(draft, kind)
    if kind == "train" and stack != "official BFPO":
        _assume_safe(draft)
    if "data" not in draft.recipe:
        draft.put("data", [{"path": "FILL-IN.jsonl"}])
        draft.lines.append(
            DraftLine("unsupported", "", "FILL-IN.jsonl", "data", "the file names no data; write a path")
        )


def source(path: str, kind: Kind, **options: Any) -> Source:
    """Return a source with its adapter; options without a value are left out."""
    known = {name.casefold(): adapter for name, adapter in ADAPTERS[kind].items()}
    adapter = known.get(path.casefold(), "demonstrations" if kind == "sft" else "pairs")
    chosen = {name: value for name, value in options.items() if value is not None}
    return {"path": path} | ({} if adapter == "pairs" else {"adapter": adapter}) | chosen


def _put_mixer(draft: Draft, stack: Stack, kind: Kind) -> None:
    """Read `dataset_mixer: {id: fraction}` with `dataset_splits: [train.., test..]`, and the buffer's."""
    official = stack == "official BFPO"
    buffered = draft.left.get("use_buffer") in (True, "True", "true")
    _put_mixer_stream(draft, "", "data", kind, official)
    if buffered and kind == "train":
        _put_mixer_stream(draft, "buffer_", "buffer", kind, official)
        draft.told("computed", "use_buffer", "buffer", "")
        return
    for key in ("use_buffer", "buffer_dataset_mixer", "buffer_dataset_splits"):
        if key in draft.left:
            draft.told(
                "not needed", key, "", "use_buffer is off" if kind == "train" else "fine-tuning has one stream"
            )


def _put_mixer_stream(draft: Draft, prefix: str, place: str, kind: Kind, official: bool) -> None:
    mixer, splits = f"{prefix}dataset_mixer", f"{prefix}dataset_splits"
    weights: dict[str, float] = draft.left.get(mixer) or {}
    named = draft.left.get(splits) or ["train", "test"]
    train, test = (next((str(name) for name in named if word in str(name)), "") for word in ("train", "test"))
    data, held_out = [], []
    for path, fraction in weights.items():
        renamed = OFFICIAL_SPLITS.get(path, {}) if official else {}
        # A file has no splits but "train".
        is_file = path.endswith((".json", ".jsonl", ".csv"))
        options = {"revision": OFFICIAL_REVISIONS.get(path) if official else None}
        if float(fraction) > 0:
            part = {"fraction": float(fraction), "sample": "head"} if float(fraction) < 1 else {}
            split = None if is_file else renamed.get(train, train) or None
            data.append(source(path, kind, split=split, **options, **part))
        if test and not is_file:
            held_out.append(source(path, kind, split=renamed.get(test, test), **options))
    draft.compute(mixer, place, data, "the first rows of each, as there (sample: head)" if _sampled(data) else "")
    tested = not prefix and kind == "train" and held_out and _evaluates(draft)
    if tested:
        draft.put("eval", held_out)
    if splits in draft.left:
        why = "" if tested or prefix else "test splits of fine-tuning data are not read; prompts are held out instead"
        draft.told("computed", splits, f"{place}.split" + (", eval" if tested else ""), why if kind == "sft" else "")


def _put_mixture(draft: Draft, kind: Kind) -> None:
    """Read alignment-handbook's `dataset_mixture: {datasets: [{id, config, split, columns, weight}], ..}`."""
    mixture = draft.left["dataset_mixture"]
    data = []
    for entry in mixture.get("datasets") or []:
        weight = entry.get("weight")
        part = (
            {"fraction": float(weight), "seed": mixture.get("seed", 0)} if weight is not None and weight < 1 else {}
        )
        name = entry.get("config") if entry.get("config") != "default" else None
        data.append(
            source(entry["id"], kind, name=name, split=entry.get("split"), revision=entry.get("revision"), **part)
        )
    size = mixture.get("test_split_size")
    draft.compute("dataset_mixture", "data", data, "columns that aren't needed are not read")
    if isinstance(size, float) and 0 < size < 1:
        draft.put("holdout", size)
        draft.lines.append(
            DraftLine("computed", "dataset_mixture.test_split_size", size, "holdout", "a share of the prompts")
        )
    elif size:
        why = "a count there, a share of the prompts here: set holdout yourself"
        draft.lines.append(DraftLine("unsupported", "dataset_mixture.test_split_size", size, "holdout", why))


def _put_trl(draft: Draft, kind: Kind) -> None:
    """Read TRL's `dataset_name` with its splits, or `datasets: [{path, name, split, data_files}]`."""
    left = draft.left
    entries = left.get("datasets")
    if entries:
        data = []
        for entry in entries:
            files = entry.get("data_files")
            path = files if isinstance(files, str) else entry["path"]
            data.append(source(path, kind, name=entry.get("name"), split=entry.get("split")))
        draft.compute("datasets", "data", data, "")
    elif left.get("dataset_name"):
        path, name = left["dataset_name"], left.get("dataset_config")
        split, test = left.get("dataset_train_split", "train"), left.get("dataset_test_split", "test")
        draft.compute("dataset_name", "data", [source(path, kind, name=name, split=split)], "")
        if kind == "train" and _evaluates(draft):
            draft.put("eval", [source(path, kind, name=name, split=test)])
    used = bool(draft.recipe.get("data"))
    for key in ("dataset_config", "dataset_train_split", "dataset_test_split"):
        if key in left:
            draft.told("computed" if used else "not needed", key, "data, eval", "")


def _put_named(draft: Draft, kind: Kind) -> None:
    """Read LLaMA-Factory's `dataset: a,b`: names that its dataset_info.json explains."""
    left = draft.left
    names = [name.strip() for name in str(left.get("dataset") or "").split(",") if name.strip()]
    limit = left.get("max_samples")
    if names:
        data = [source(name, kind, limit=limit) for name in names]
        draft.put("data", data)
        why = "names of dataset_info.json: write a path or hub id each, and columns: {prompt: instruction, ..}"
        draft.told("unsupported", "dataset", "data", why)
    if "max_samples" in left:
        draft.told("computed", "max_samples", "data.limit", "")
    size = left.get("val_size")
    if isinstance(size, int | float) and 0 < size < 1:
        draft.rename("val_size", "holdout")
    elif "val_size" in left:
        why = "a count there, a share of the prompts here: set holdout yourself" if size else "nothing is held out"
        draft.told("unsupported" if size else "not needed", "val_size", "holdout", why)
    if "eval_dataset" in left:
        draft.told("unsupported", "eval_dataset", "eval", "write its path into eval")
    if "dataset_dir" in left:
        draft.told("not needed", "dataset_dir", "", "sources name their files")
    if "template" in left:
        draft.told(
            "not needed",
            "template",
            "",
            "the tokenizer's own chat template is used; text.chat_template names another",
        )


def _assume_safe(draft: Draft) -> None:
    """Let a loss that reads no labels train on sets that have none."""
    unlabeled = [
        one
        for place in ("data", "eval")
        for one in draft.recipe.get(place, [])
        if one.get("adapter") in (None, "hh_rlhf")
    ]
    for one in unlabeled:
        one["assume_safe"] = True
    if unlabeled:
        why = "the loss reads no safety labels; before you choose bfpo, label the pairs and take this out"
        draft.lines.append(DraftLine("computed", "", True, "data.assume_safe", why))


def _evaluates(draft: Draft) -> bool:
    return any(draft.left.get(name, "no") != "no" for name in ("evaluation_strategy", "eval_strategy"))


def _sampled(data: list[Source]) -> bool:
    return any("fraction" in one for one in data)
