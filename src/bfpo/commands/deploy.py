"""Commands that make something of a checkpoint that others can use; the bodies import their work when they run."""

from pathlib import Path
from typing import Annotated

import typer

from bfpo.commands.panels import DEPLOY

deploy_app = typer.Typer()


@deploy_app.command(rich_help_panel=DEPLOY)
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Output folder.", show_default=False)],
    dtype: Annotated[
        str, typer.Option(help="Data type of the saved weights: float32, bfloat16 or float16.")
    ] = "float32",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the base model.")] = False,
) -> None:
    """Merge a LoRA adapter into its base model."""
    from bfpo.model.merge import merge_checkpoint

    merge_checkpoint(checkpoint, out, dtype=dtype, trust_remote_code=trust_remote_code)
