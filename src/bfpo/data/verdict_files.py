"""Names of the files that hold the output of a judge: `STEM-NAME@REVISION.jsonl`, as `verdicts-linear@3f2a.jsonl`.

The revision is part of the name, so another revision of a judge never appends to the file of an earlier one.
"""

from pathlib import Path

from bfpo.core.files import file_name, parse_json


def judge_file(folder: Path, stem: str, name: str, revision: str) -> Path:
    """Return the file of a judge; a file of an earlier version of the program is found under its old name.

    Args:
        folder: Folder that holds the completions.
        stem: What the judge did: `verdicts`, `guided-verdicts`, `calibration`, `references` or `comparisons`.
        name: Name of the judge.
        revision: Revision of the judge.
    """
    path = folder / f"{stem}-{file_name(name)}@{revision}.jsonl"
    if path.exists() or path.with_name(f"{path.name}.unfinished").exists():
        return path
    for old in _old_names(stem, name, revision):
        for existing in (folder / old, folder / f"{old}.unfinished"):
            if existing.is_file() and _is_of(existing, name, revision):
                return folder / old
    return path


def judge_files(folder: Path, stem: str) -> list[Path]:
    """Return the finished files of all judges in a folder, those with old names included, sorted by name."""
    return sorted(folder.glob(f"{stem}*.jsonl"))


def _old_names(stem: str, name: str, revision: str) -> list[str]:
    label = file_name(name)
    # The verdicts of the judge that rated helpfulness in `bfpo redteam`.
    ratings = ["helpfulness.jsonl"] if stem == "verdicts" else []
    return [
        f"{stem}.jsonl",
        *ratings,
        f"{stem}-{label}.jsonl",
        f"{stem}-{file_name(f'{name}@{revision[:8]}')}.jsonl",
        f"{stem}-{label}-{revision}.jsonl",
        f"{label}@{revision}.jsonl",
    ]


def _is_of(path: Path, name: str, revision: str) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    try:
        row = parse_json(first)
        return bool((row["judge"], row["revision"]) == (name, revision))
    except (ValueError, TypeError, KeyError):
        return False
