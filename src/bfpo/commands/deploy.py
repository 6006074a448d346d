"""Commands that make something of a checkpoint that others can use; the bodies import their work when they run."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from bfpo.commands.options import Concurrency, GuardFile, KeyVariable, Timeout, Tries
from bfpo.commands.panels import DEPLOY

deploy_app = typer.Typer()

_ModelFolder = Annotated[Path, typer.Argument(help="Folder of a model or a LoRA adapter.", show_default=False)]
_Out = Annotated[Path, typer.Option(help="Output folder.", show_default=False)]
_TrustCode = Annotated[bool, typer.Option(help="Run code that comes with the base model.")]


@deploy_app.command(rich_help_panel=DEPLOY)
def export(
    checkpoint: _ModelFolder,
    to: Annotated[
        str,
        typer.Option(
            help="merged (a model in safetensors), adapter (LoRA for vLLM) or gguf (for llama.cpp and Ollama).",
            show_default=False,
        ),
    ],
    out: _Out,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type of merged and adapter: float32, bfloat16 or float16.",
            show_default="their own; float32 for a merged adapter",
        ),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Type of the matrices of gguf: f16 or q8_0.", show_default="f16")
    ] = None,
    converter: Annotated[
        Path | None, typer.Option(help="llama.cpp's convert_hf_to_gguf.py, to write gguf with it instead.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare answers of the gguf file with the checkpoint's.")] = True,
    trust_remote_code: _TrustCode = False,
) -> None:
    """Export a checkpoint to files that other programs run."""
    from bfpo.deployment.export import export_checkpoint
    from bfpo.deployment.gguf_export import GgufOptions

    gguf = None
    if to == "gguf" or quantize is not None or converter is not None:
        gguf = GgufOptions(quantize or "f16", converter, check_answers=check)
    export_checkpoint(checkpoint, out, to=to, dtype=dtype, gguf=gguf, trust_remote_code=trust_remote_code)


@deploy_app.command(hidden=True)
def merge(
    checkpoint: _ModelFolder,
    out: _Out,
    dtype: Annotated[str, typer.Option()] = "float32",
    trust_remote_code: _TrustCode = False,
) -> None:
    """Run `bfpo export --to merged` under its former name, for one release."""
    typer.echo("warning: `bfpo merge ADAPTER` is now `bfpo export ADAPTER --to merged`", err=True)
    export(checkpoint, "merged", out, dtype, trust_remote_code=trust_remote_code)


@deploy_app.command(rich_help_panel=DEPLOY)
def serve(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Folder or hub id of a model or an adapter.", show_default=False),
    ] = None,
    guard: GuardFile = None,
    server: Annotated[
        str | None,
        typer.Option(help="http://host:port/v1 of a model that is served already, in place of CHECKPOINT."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model on --server.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 is a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients.", show_default="that of the folder or --model")
    ] = None,
    engine: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="What answers without a guard.")
    ] = "transformers",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Data type of the weights: float32, bfloat16 or float16.", show_default="float32; of vllm its own"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Behind a guard: length of an answer if the request has none, in tokens.")
    ] = 256,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Behind a guard: requests that wait; others get HTTP 503.")
    ] = 64,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
    tries: Tries = 6,
    key_variable: KeyVariable = "OPENAI_API_KEY",
) -> None:
    """Serve a checkpoint, or put a guard in front of a served model."""
    from bfpo.commands.serve import check_target, serve_behind_guard, serve_plain
    from bfpo.errors import RecipeError
    from bfpo.judging.guarded_engine import load_guard

    check_target(checkpoint, server, model, guard, dtype=dtype)
    if guard is None:
        assert checkpoint is not None
        serve_plain(checkpoint, engine=engine, name=name, host=host, port=port, dtype=dtype)
        return
    if engine != "transformers":
        raise RecipeError("--engine vllm has no guard: start vLLM, and put the guard in front of it by --server")

    from bfpo.generation.openai_server import ServerOptions

    target: str | ServerOptions | None = checkpoint
    if server is not None and model is not None:
        target = ServerOptions(server, model, concurrency, timeout=timeout, tries=tries, key_variable=key_variable)
    assert target is not None
    serve_behind_guard(
        target,
        load_guard(guard),
        name=name,
        host=host,
        port=port,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        max_waiting=max_waiting,
    )


@deploy_app.command(rich_help_panel=DEPLOY)
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model or an adapter.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Repository on the hub, owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Folder of an evaluated run; its results go into the model card.", show_default=False),
    ] = None,
    license: Annotated[str | None, typer.Option(help="License of the model, such as apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base model, if it was a folder.")] = None,
    base_license: Annotated[str | None, typer.Option(help="License of the base model, if the hub has none.")] = None,
    data_license: Annotated[
        list[str] | None, typer.Option(help="NAME=ID: license of a set of training data; repeatable.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="Address of another hub.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Upload without asking; a missing license stays an error.")
    ] = False,
) -> None:
    """Upload a checkpoint to a hub, with its model card and licenses."""
    import sys

    from bfpo.deployment.push import PushOptions
    from bfpo.deployment.push import push as run
    from bfpo.errors import RecipeError
    from bfpo.report.card import card_section

    licenses = {}
    for text in data_license or ():
        name, separator, value = text.rpartition("=")
        if not (name and separator and value):
            raise RecipeError(f"--data-license is '{text}'; expected NAME=ID")
        licenses[name] = value
    has_terminal = sys.stdin.isatty()
    if not (has_terminal or yes):
        raise RecipeError("nobody can be asked here whether to upload; add --yes")
    options = PushOptions(repo_id, private, license, base_model, base_license, licenses, endpoint)
    run(
        folder,
        options,
        evaluation=None if evaluation is None else card_section(evaluation),
        ask=(lambda question: str(typer.prompt(question))) if has_terminal else None,
        confirm=lambda: yes or typer.confirm("Upload these files?"),
    )
