"""`bfpo serve`: a checkpoint, or a model on another server, behind the OpenAI chat protocol."""

from pathlib import Path
from typing import Literal

from bfpo.config.recipes import is_gguf
from bfpo.deployment.listening import check_packages, listen
from bfpo.errors import RecipeError, did_you_mean
from bfpo.generation.openai_server import ServerOptions
from bfpo.judging.guarded_engine import Guard


def serve_plain(
    checkpoint: str,
    *,
    engine: Literal["transformers", "vllm"],
    name: str | None,
    host: str,
    port: int,
    dtype: str | None,
) -> None:
    """Serve a checkpoint without a guard, by a server of others, until SIGINT or SIGTERM.

    Args:
        checkpoint: Folder or hub id of a model or an adapter.
        engine: The server.
        name: Name of the model; None is the name of the folder, or the hub id.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Data type of the weights; None is float32, and for vLLM its own choice.

    Raises:
        RecipeError: If an argument is wrong, or vLLM isn't installed.
        ModelError: If the checkpoint can't be served.
        DeploymentError: If the server ends by itself.
    """
    from bfpo.deployment.plain_servers import serve_by_transformers, serve_by_vllm
    from bfpo.model.merge import DTYPES

    name = name or default_name(checkpoint)
    dtypes = [*DTYPES, "auto", "half", "float"] if engine == "vllm" else [*DTYPES]
    if dtype is not None and dtype not in dtypes:
        raise RecipeError(f"`dtype` is '{dtype}'; {did_you_mean(dtype, dtypes)}")
    if engine == "vllm":
        serve_by_vllm(checkpoint, name=name, host=host, port=port, dtype=dtype or "auto")
    else:
        serve_by_transformers(checkpoint, name=name, host=host, port=port, dtype=dtype or "float32")


def serve_behind_guard(
    target: str | ServerOptions,
    guard: Guard,
    *,
    name: str | None,
    host: str,
    port: int,
    dtype: str | None,
    max_new_tokens: int,
    max_waiting: int,
) -> None:
    """Serve a model behind a guard until SIGINT or SIGTERM.

    Args:
        target: Folder or hub id of a model or an adapter, or a GGUF file; or a model on a server.
        guard: The guard.
        name: Name of the model; None is that of the folder or hub id, or the one on the server.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Data type of the weights; None is float32.
        max_new_tokens: Maximum length of an answer if the request has none, in tokens.
        max_waiting: Maximum number of requests that wait.

    Raises:
        MissingExtra: If packages for serving are missing.
        RecipeError: If an argument is wrong, or the guard isn't possible here.
        DataError: If the file of the judge or the head is missing or malformed.
        ModelError: If a model can't be loaded.
    """
    check_packages("fastapi", "uvicorn")
    with listen(host, port) as listening:
        from bfpo.deployment.guard_server import serve_guarded
        from bfpo.deployment.guarded_model import GuardedModel, open_local, open_served

        if isinstance(target, ServerOptions):
            concurrency, name = target.concurrency, name or target.model
            model = GuardedModel(open_served(target), guard, name=name)
        else:
            # A model in this process answers one request at a time.
            concurrency, name = 1, name or default_name(target)
            model = GuardedModel(open_local(target, dtype=dtype or "float32"), guard, name=name)
        serve_guarded(
            model, listening, concurrency=concurrency, max_waiting=max_waiting, max_new_tokens=max_new_tokens
        )


def default_name(checkpoint: str) -> str:
    """Return the name under which a checkpoint is served: that of its folder or file, or its hub id."""
    path = Path(checkpoint)
    if is_gguf(checkpoint):
        return path.stem
    return path.resolve().name if path.is_dir() else checkpoint


def check_target(
    checkpoint: str | None, server: str | None, model: str | None, guard: Path | None, *, dtype: str | None
) -> None:
    """Check that the arguments name one model, and a guard and no data type if it is on a server.

    Raises:
        RecipeError: If they don't.
    """
    if (checkpoint is None) == (server is None):
        raise RecipeError("name a CHECKPOINT, or a server by --server and --model; not both")
    if (server is None) != (model is None):
        raise RecipeError("--server and --model belong together: the address, and the model's name there")
    if server is not None and guard is None:
        raise RecipeError("--server without --guard does nothing that the server doesn't; add --guard guard.yaml")
    if server is not None and dtype is not None:
        raise RecipeError("--dtype is for a CHECKPOINT; the server has chosen that of its weights")
