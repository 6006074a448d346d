"""Commands that train models; the bodies import their work when they run."""

from pathlib import Path
from typing import Annotated

import typer

from bfpo.commands.options import DryRun, Limit, Overrides, Recipe
from bfpo.commands.panels import START, TRAIN

training_app = typer.Typer()


@training_app.command(rich_help_panel=START)
def init(
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the model.", show_default=False)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="[ADAPTER:]PATH of pairs, or of prompts; repeatable.", show_default=False),
    ] = None,
    buffer: Annotated[
        list[str] | None,
        typer.Option(help="[ADAPTER:]PATH of helpfulness pairs; repeatable.", show_default=False),
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(help="safer, at-most, sft-first, label-first or redteam.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Where it will be trained: cpu, gpu or auto.")] = "auto",
    out: Annotated[Path, typer.Option(help="Recipe to write; must not exist.")] = Path("recipe.yaml"),
) -> None:
    """Write a first recipe for your model, data and goal, with the reasons; asks for what is missing."""
    from bfpo.commands.init import init as run

    run(model, data or [], buffer or [], goal, device, out)


@training_app.command(rich_help_panel=TRAIN)
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show the memory of each GPU, micro-batch, time and cost, and stop.")
    ] = False,
    hardware: Annotated[
        str | None,
        typer.Option(help="For --plan: a100-80gb, h100, h200, l4, rtx4090 or cpu.", show_default="h100"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="For --plan: number of GPUs; of threads on a CPU.", show_default="1")
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="For --plan: price of an hour of a GPU.", show_default=False)
    ] = None,
) -> None:
    """Train a model on labeled preference pairs."""
    from bfpo.config.loading import load_recipe
    from bfpo.config.recipes import TrainRecipe
    from bfpo.errors import RecipeError

    checked = load_recipe(recipe, TrainRecipe, overrides)
    if plan:
        from bfpo.training.launch_plan import show_launch_plan

        show_launch_plan(checked, hardware=hardware or "h100", gpus=gpus or 1, price=price, limit=limit)
        return
    for option, value in (("--hardware", hardware), ("--gpus", gpus), ("--price", price)):
        if value is not None:
            raise RecipeError(f"{option} is for --plan; to use several processes, start them by accelerate launch")
    if checked.outer is not None:
        from bfpo.constraints.outer import check_outer, run_outer

        check_outer(checked, limit=limit) if dry_run else run_outer(checked, limit=limit)
        return

    from bfpo.generation.in_process import likeliest_answers
    from bfpo.training.run import run_training

    run_training(checked, dry_run=dry_run, limit=limit, answers=likeliest_answers)


@training_app.command(rich_help_panel=TRAIN)
def sft(recipe: Recipe, overrides: Overrides = None, limit: Limit = None, dry_run: DryRun = False) -> None:
    """Fine-tune a model on completions."""
    from bfpo.config.loading import load_recipe
    from bfpo.config.recipes import SftRecipe

    checked = load_recipe(recipe, SftRecipe, overrides)

    if checked.experts:
        from bfpo.training.run_experts import run_experts

        run_experts(checked, dry_run=dry_run, limit=limit)
        return

    from bfpo.training.run_sft import run_sft

    run_sft(checked, dry_run=dry_run, limit=limit)


@training_app.command(rich_help_panel=TRAIN)
def online(recipe: Recipe, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a policy by RL on scores of its own samples: Safe RLHF, or BFPO's objective."""
    from bfpo.config.loading import load_recipe
    from bfpo.online.recipe import OnlineRecipe

    checked = load_recipe(recipe, OnlineRecipe, overrides)

    from bfpo.online.run import run_online

    run_online(checked, dry_run=dry_run)
