"""Servers of others, which answer without a guard: `transformers serve` and vLLM."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bfpo.core.files import write_json
from bfpo.core.terminal import say
from bfpo.deployment.child import run_until_stopped
from bfpo.deployment.listening import check_packages, listen
from bfpo.deployment.served_model import ServedModel, find_model
from bfpo.deployment.vllm import adapter_faults, adapter_options
from bfpo.errors import ModelError, RecipeError

# The name of a commit has this form; there is only one.
_COMMIT = "0" * 40
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def serve_by_transformers(checkpoint: str, *, name: str, host: str, port: int, dtype: str) -> None:
    """Serve a checkpoint by `transformers serve`, until SIGINT or SIGTERM.

    The server gets a hub cache in which this model is the only one, offline: so it has the name that clients ask for,
    lists itself and no other, and downloads nothing. An adapter is loaded onto its base model.

    Args:
        checkpoint: Folder or hub id of a model or an adapter.
        name: Name of the model, in the form of a hub id.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Data type of the weights.

    Raises:
        MissingExtra: If packages for serving are missing.
        RecipeError: If the name isn't in the form of a hub id.
        ModelError: If the checkpoint can't be served.
        DeploymentError: If the server ends by itself.
    """
    check_packages("fastapi", "openai", "uvicorn")
    model = find_model(checkpoint)
    if not _HUB_NAME.fullmatch(name) or "--" in name or ".." in name:
        raise RecipeError(
            f"`name` is '{name}'; expected letters, digits and single -_. with at most one /, as in org/my-model"
        )
    # Whether the port is free is known before the model is loaded.
    listen(host, port).close()
    with TemporaryDirectory(prefix="bfpo-serve-") as folder:
        cache = Path(folder) / "hub"
        _write_cache(model, name, cache)
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", name]
        # In an empty folder: one of the model's name would be taken for the model.
        run_until_stopped(
            [*command, "--host", host, "--port", str(port), "--dtype", dtype],
            environment={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
            folder=Path(folder),
        )


def _write_cache(model: ServedModel, name: str, cache: Path) -> None:
    """Write a hub cache with one repository: links to the model's files, and some files that differ for a server."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / _COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_COMMIT, encoding="utf-8")
    for file in model.folder.iterdir():
        if file.is_file():
            (snapshot / file.name).symlink_to(file.resolve())
    settings_file = (model.base or model.folder) / "generation_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    _replace(snapshot / "generation_config.json", _generation_config(settings))
    if model.adapter is not None:
        _replace(snapshot / "adapter_config.json", {**model.adapter, "base_model_name_or_path": str(model.base)})
        _replace(snapshot / "config.json", model.config)
        _add_tokenizer(model, snapshot)


def _replace(file: Path, content: dict[str, Any]) -> None:
    file.unlink(missing_ok=True)
    write_json(file, content)


def _generation_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings by which requests get samples of the model itself, as in `bfpo generate`.

    `transformers serve` (5.23) ignores a request's temperature unless `do_sample` is set, and by default leaves out
    all but the 50 likeliest tokens.
    """
    tokens = {key: value for key, value in settings.items() if key.endswith("token_id")}
    return {**tokens, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def _add_tokenizer(model: ServedModel, snapshot: Path) -> None:
    """Link the base model's tokenizer if the adapter has none."""
    assert model.base is not None
    if (model.folder / "tokenizer_config.json").is_file():
        return
    for file in model.base.iterdir():
        if file.is_file() and (file.name.startswith(("tokenizer", "vocab", "merges")) or file.suffix == ".jinja"):
            (snapshot / file.name).symlink_to(file.resolve())


def serve_by_vllm(checkpoint: str, *, name: str, host: str, port: int, dtype: str) -> None:
    """Print the command by which vLLM serves a checkpoint, and run it until SIGINT or SIGTERM.

    Args:
        checkpoint: Folder or hub id of a model or an adapter.
        name: Name of the model.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Data type of the weights.

    Raises:
        RecipeError: If vLLM isn't installed.
        ModelError: If the checkpoint can't be served.
        DeploymentError: If the server ends by itself.
    """
    command = vllm_command(find_model(checkpoint), name=name, host=host, port=port, dtype=dtype)
    if shutil.which(command[0]) is None:
        raise RecipeError(f"vLLM isn't installed; where it is (https://docs.vllm.ai), run: {shlex.join(command)}")
    say(shlex.join(command))
    run_until_stopped(command)


def vllm_command(model: ServedModel, *, name: str, host: str, port: int, dtype: str) -> list[str]:
    """Return the command by which vLLM serves a checkpoint, an adapter as an adapter.

    Raises:
        ModelError: If vLLM can't load the adapter.
    """
    rest = ["--host", host, "--port", str(port), "--dtype", dtype]
    if model.adapter is None:
        return ["vllm", "serve", str(model.folder), "--served-model-name", name, *rest]
    if faults := adapter_faults(model.adapter):
        raise ModelError(
            f"'{model.folder}' can't be loaded by vLLM beside its base model ({'; '.join(faults)}); merge it "
            "(bfpo export --to merged)"
        )
    own_tokenizer = (model.folder / "tokenizer_config.json").is_file()
    tokenizer = ["--tokenizer", str(model.folder)] if own_tokenizer else []
    options = adapter_options(model.folder, name, model.adapter["r"])
    return ["vllm", "serve", str(model.base), *tokenizer, *options, *rest]
