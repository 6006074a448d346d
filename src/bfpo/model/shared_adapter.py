"""The record that an adapter was trained beside a shared one, and the check that it is used with that one only."""

from dataclasses import asdict, dataclass
from pathlib import Path

from peft import PeftConfig
from transformers.utils.hub import cached_file

from bfpo.core.files import file_hash, parse_json, write_json
from bfpo.errors import ModelError
from bfpo.model.lora import is_adapter

RECORD = "shared_adapter.json"


@dataclass(frozen=True, slots=True)
class SharedAdapter:
    """An adapter that is active beside others.

    Args:
        path: Folder or hub id.
        sha256: Hash of the file with its weights, which is the same wherever it is copied.
    """

    path: str
    sha256: str

    def write_record(self, folder: Path) -> None:
        """Write into an adapter's folder that it was trained beside this one."""
        write_json(folder / RECORD, asdict(self))


def find_shared(path: str) -> SharedAdapter:
    """Return the shared adapter at a path.

    Args:
        path: Folder or hub id.

    Raises:
        ModelError: If there is no adapter, or it was itself trained beside another one.
    """
    weights = _file(path, "adapter_model.safetensors") if is_adapter(path) else None
    if weights is None:
        raise ModelError(f"'{path}', the shared adapter, has no adapter_config.json with adapter_model.safetensors")
    check_beside(path, None)
    return SharedAdapter(path, file_hash(weights))


def check_same_base(shared: SharedAdapter, base: str | None, revision: str | None) -> None:
    """Check that a shared adapter was trained on the base model of a recipe, which it names in the same way.

    Raises:
        ModelError: If it wasn't.
    """
    config = PeftConfig.from_pretrained(shared.path)
    if (config.base_model_name_or_path, config.revision) != (base, revision):
        raise ModelError(
            f"shared_adapter '{shared.path}' was trained on '{config.base_model_name_or_path}' (revision "
            f"{config.revision}); expected the same path and revision as in model, '{base}' (revision {revision})"
        )


def read_record(path: str, revision: str | None = None) -> SharedAdapter | None:
    """Return the shared adapter that an adapter was trained beside; None if there was none."""
    file = _file(path, RECORD, revision)
    return None if file is None else SharedAdapter(**parse_json(file.read_bytes()))


def check_beside(path: str, shared: SharedAdapter | None, revision: str | None = None) -> None:
    """Check that an adapter is used beside the shared adapter that it was trained beside, or alone if without.

    Args:
        path: Folder or hub id of the adapter.
        shared: Shared adapter that is active beside it; None for none.
        revision: Hub revision.

    Raises:
        ModelError: If it was trained otherwise.
    """
    recorded = read_record(path, revision)
    if recorded is None and shared is not None:
        raise ModelError(
            f"'{path}' wasn't trained beside a shared adapter, and shared is '{shared.path}'; leave out shared, or "
            "train the adapter beside it (`shared_adapter` of bfpo sft)"
        )
    if recorded is not None and (shared is None or shared.sha256 != recorded.sha256):
        got = "it is used without" if shared is None else f"shared is '{shared.path}', which has other weights"
        raise ModelError(
            f"'{path}' was trained beside the shared adapter '{recorded.path}', and {got}; name both as steps, such "
            f"as {{shared: {recorded.path}, answer: {path}}} (docs/redteam.md)"
        )


def _file(path: str, name: str, revision: str | None = None) -> Path | None:
    """Return a file of a folder or hub repository; None if it has none, or the hub can't be reached."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(path, name, revision=revision, **options)
    return None if file is None else Path(file)
