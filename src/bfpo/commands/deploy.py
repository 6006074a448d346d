"""Commands that make something of a checkpoint that others can use; the bodies import their work when they run."""

from pathlib import Path
from typing import Annotated

import typer

deploy_app = typer.Typer()

_ModelFolder = Annotated[Path, typer.Argument(help="Folder of a model or a LoRA adapter.", show_default=False)]
_Out = Annotated[Path, typer.Option(help="Output folder.", show_default=False)]
_TrustCode = Annotated[bool, typer.Option(help="Run code that comes with the base model.")]


@deploy_app.command()
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
