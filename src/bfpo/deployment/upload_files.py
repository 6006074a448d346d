"""The files of a checkpoint that a repository gets: a list of allowed names, without secrets, paths and names."""

import getpass
import re
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from bfpo.errors import DataError, ModelError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")
_VOCABULARY = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("*.model", "chat_template.jinja"),
)
# Texts of others, whose paths are no paths of this machine.
_AGREEMENTS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# Files that a run writes, which may name paths.
_RECORDS = (
    *("README.md", "config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json"),
    *("recipe.resolved.yaml", "run.json", "data_manifest.json", "shared_adapter.json"),
)
ALLOWED = (*_WEIGHTS, *_VOCABULARY, *_AGREEMENTS, *_RECORDS)
"""Names of the files that are uploaded, from the checkpoint's own folder only."""

# A folder may have spaces in its name, not around it: `80 / 20` has no path.
_FOLDER = r"[\w.@+-](?:[\w.@+ -]*[\w.@+-])?"
# Behind a colon, too, as in `linear:/folder/judge.npz`; not in https://host/path, nor in a relative path.
_POSIX_PATH = re.compile(rf"(?<![\w/.~<])(?:~|file://)?/(?:{_FOLDER}/)+([\w.@+-]+)")
_WINDOWS_PATH = re.compile(rf"\b[A-Za-z]:(?:[\\/]+{_FOLDER})+[\\/]+([\w.@+-]+)")
# What is around a whole key or a whole value in YAML.
_YAML_BEFORE = re.compile(r"[\s-]*(?:[\w.]+:\s+)?['\"]?")
_YAML_AFTER = re.compile(r"['\"]?\s*(?::(?:\s|$)|$)")
_SECRETS = (
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}"),
    re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    re.compile(r"://[^/\s:@\"']+:[^/\s@\"']+@"),
)
# Accounts that identify nobody.
_COMMON_ACCOUNTS = frozenset(("root", "user", "admin", "ubuntu", "runner", "jovyan", "nobody", "localhost", "model"))


@dataclass(frozen=True, slots=True)
class UploadFile:
    """A file that is uploaded.

    Args:
        path: The file on this machine.
        text: Text that is uploaded in its place; None for the file as it is.
        replaced: What was replaced in the text, in words.
    """

    path: Path
    text: str | None = None
    replaced: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of bytes that are uploaded."""
        return self.path.stat().st_size if self.text is None else len(self.text.encode("utf-8"))


def select_files(folder: Path, private: Sequence[str]) -> tuple[list[UploadFile], list[str]]:
    """Return the files of a checkpoint that are uploaded, and the names of those that aren't.

    In records of a run, absolute paths are replaced by their last part, and the names of the account and the machine
    by a general word.

    Args:
        folder: Folder of the checkpoint.
        private: Names of `private_names`.

    Raises:
        ModelError: If the folder has no model with safetensors.
        DataError: If a file contains a secret, or isn't text.
    """
    if not folder.is_dir():
        raise ModelError(f"'{folder}': no such folder; expected a run's output folder or a checkpoint in it")
    entries = sorted(folder.iterdir())
    allowed = [entry for entry in entries if entry.is_file() and _matches(entry.name, ALLOWED)]
    names = {entry.name for entry in allowed}
    if not names & {"config.json", "adapter_config.json"} and not any(name.endswith(".gguf") for name in names):
        raise ModelError(f"'{folder}' contains no model; expected config.json or adapter_config.json in it")
    if not any(_matches(name, _WEIGHTS) for name in names):
        raise ModelError(f"'{folder}' has no weights as safetensors or GGUF; pickles are not uploaded")
    files = [
        _clean(entry, private) if _matches(entry.name, (*_RECORDS, *_AGREEMENTS)) else UploadFile(entry)
        for entry in allowed
    ]
    left_out = [entry.name + "/" * entry.is_dir() for entry in entries if entry not in allowed]
    return files, left_out


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def private_names(repo_id: str) -> list[str]:
    """Return the names of the account and of the machine, as far as they identify someone.

    Args:
        repo_id: Repository; what its name contains is public.
    """
    try:
        account = getpass.getuser()
    except (KeyError, OSError, ImportError):
        account = ""
    names = {account, Path.home().name, socket.gethostname()}
    public = repo_id.lower()
    return sorted(
        name
        for name in names
        if len(name) > 2 and name.lower() not in _COMMON_ACCOUNTS and name.lower() not in public
    )


def _clean(path: Path, private: Sequence[str]) -> UploadFile:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from None
    if _matches(path.name, _AGREEMENTS):
        _check_secrets(text, str(path))
        return UploadFile(path)
    cleaned, replaced = clean_text(text, private, where=str(path), keep_words=path.suffix in (".json", ".yaml"))
    return UploadFile(path, cleaned if replaced else None, replaced)


def _check_secrets(text: str, where: str) -> None:
    if any(pattern.search(text) for pattern in _SECRETS):
        # What was found isn't shown.
        raise DataError(f"{where} contains what looks like a key or a password; remove it, and make a new one")


def clean_text(
    text: str, private: Sequence[str], *, where: str, keep_words: bool = False
) -> tuple[str, tuple[str, ...]]:
    """Return a text without paths and private names, and what was replaced, in words.

    Args:
        text: Text of a record.
        private: Names of `private_names`.
        where: Name of the text, for errors.
        keep_words: Whether a private name that is a whole key or a whole value stays: in a configuration such as
            `"model_type": "llama"` it is a word of a library, and not the account of that name.

    Raises:
        DataError: If it contains a secret.
    """
    _check_secrets(text, where)
    replaced: Counter[str] = Counter()

    def last_part(match: re.Match[str]) -> str:
        replaced[f"{match[0]} by {match[1]}"] += 1
        return match[1]

    for pattern in (_WINDOWS_PATH, _POSIX_PATH):
        text = pattern.sub(last_part, text)
    for name in private:

        def hidden(match: re.Match[str], name: str = name) -> str:
            if keep_words and _is_whole(match):
                return match[0]
            replaced[f"{name} by someone"] += 1
            return "someone"

        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", hidden, text, flags=re.IGNORECASE)
    return text, tuple(f"{what} ({count})" if count > 1 else what for what, count in replaced.items())


def _is_whole(match: re.Match[str]) -> bool:
    """Return whether a match is all of a quoted text in JSON, or all of a key or a value in YAML."""
    text, start, end = match.string, match.start(), match.end()
    if text[start - 1 : start] == text[end : end + 1] == '"':
        return True
    before = text[text.rfind("\n", 0, start) + 1 : start]
    after = text[end:].partition("\n")[0]
    return bool(_YAML_BEFORE.fullmatch(before) and _YAML_AFTER.match(after))
