"""Opening the engine that a recipe section or the command line describes, in one place."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from bfpo.config.loading import load_recipe
from bfpo.config.recipes import Count, Section, join_gguf_file
from bfpo.core.chain import EXPERTS, SHARED, Expert
from bfpo.core.samples import Engine, Sampling


class ServerSection(Section):
    """How a server is queried."""

    concurrency: Count = 8
    """Maximum number of concurrent requests."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Maximum time for one completion, in seconds."""
    tries: Count = 6
    """Maximum number of requests for one completion."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key."""


class JudgeServerSection(ServerSection):
    """How rubric judges are queried."""

    max_new_tokens: Count = 128
    """Maximum length of a rubric judge's reply, in tokens, also without a server; reasoning needs 1,024 or more."""


def _check_steps(steps: dict[Expert, str | None]) -> dict[Expert, str | None]:
    """Return the steps in the order of the chain, after the shared adapter."""
    if steps.get(SHARED, "") is None:
        raise ValueError("the steps have no shared adapter (null); leave out shared")
    if "answer" not in steps or ("analysis" in steps) != ("guidance" in steps):
        names = ", ".join(steps) or "none"
        raise ValueError(f"the steps are {names}; expected answer, alone or with both analysis and guidance")
    return {name: steps[name] for name in EXPERTS if name in steps}


Steps = Annotated[dict[Expert, str | None], AfterValidator(_check_steps)]


class EngineSection(ServerSection):
    """A model that answers prompts: a checkpoint in this process, with or without steps, or a model on a server."""

    path: str
    """Folder, hub id or GGUF file; with `server`, the model's name there."""
    gguf_file: str | None = None
    """GGUF file in the folder or hub repository `path`, without `server`."""
    revision: str | None = None
    """Hub revision, without `server`."""
    server: str | None = None
    """http://host:port/v1 of a server that speaks the OpenAI chat protocol; the keys above are for it."""
    dtype: str = "float32"
    """Data type of the weights, without `server`."""

    steps: Steps | None = None
    """Chain of steps that an answer is made in, without `server`: the folder or hub id of the adapter of each step on
    the base model `path`, null for none. `answer` alone, or after `analysis` and `guidance`; with
    `check`, an answer that it doesn't call safe becomes a refusal. The adapter `shared` is active in every step,
    beside the step's own or alone (docs/redteam.md)."""

    @model_validator(mode="after")
    def _check_steps_are_local(self) -> "EngineSection":
        if self.steps is not None and self.server is not None:
            raise ValueError("steps switches adapters, which needs the model in this process; leave out server")
        return self

    @model_validator(mode="before")
    @classmethod
    def _join_gguf_file(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("server") is not None:
            for key in ("gguf_file", "revision"):
                if values.get(key) is not None:
                    raise ValueError(f"{key} is {values[key]!r}; with server, path is the model's name there")
        return join_gguf_file(values)


def open_engine(section: EngineSection, sampling: Sampling) -> Engine:
    """Open an engine.

    Args:
        section: The model, and how a server is queried.
        sampling: How completions are sampled.

    Raises:
        ModelError: If the checkpoint can't be loaded, or the address of the server is malformed.
    """
    if section.server is not None:
        from bfpo.generation.openai_server import ServerEngine, ServerOptions

        options = ServerOptions(
            section.server,
            section.path,
            section.concurrency,
            timeout=section.timeout,
            tries=section.tries,
            key_variable=section.key_variable,
        )
        return ServerEngine(options, sampling)
    if section.steps is not None:
        from bfpo.generation.steps import load_steps

        return load_steps(section.path, section.steps, sampling, dtype=section.dtype, revision=section.revision)
    from bfpo.generation.in_process import load_engine

    return load_engine(section.path, sampling, dtype=section.dtype, revision=section.revision)


class StepsFile(Section):
    """File of `--steps`: the key of model sections with its value; `bfpo sft` with `experts:` writes one."""

    steps: Steps
    """Steps with their adapters."""


def load_steps_file(path: Path) -> dict[Expert, str | None]:
    """Read the steps in a file.

    Raises:
        RecipeError: If the file is missing or malformed.
    """
    return load_recipe(path, StepsFile).steps
