"""The command line: every command, with its arguments and options. The bodies import their work when they run."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import bfpo
from bfpo.commands.deploy import deploy_app
from bfpo.commands.errors import run_app
from bfpo.commands.groups import GROUPS
from bfpo.commands.options import (
    Checkpoint,
    Concurrency,
    GuardFile,
    Judges,
    KeyVariable,
    Limit,
    MaxNewTokens,
    Overrides,
    Recipe,
    ReplyTokens,
    StepsFile,
    Temperature,
    Timeout,
    Tries,
    judge_servers,
)
from bfpo.commands.panels import DATA, EVALUATE, START, STUDIES, TRAIN, PanelGroup
from bfpo.commands.training import training_app

app = typer.Typer(
    name="bfpo",
    cls=PanelGroup,
    help="Align language models for safety and helpfulness with one supervised loss.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="key.sub=value after a recipe overrides a key. Exit codes: 0 success, 1 failure, 2 bad input, "
    "3 gate violated.",
)
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name, rich_help_panel=_group.rich_help_panel)
app.add_typer(training_app)
app.add_typer(deploy_app)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"bfpo {bfpo.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; accepted anywhere.")] = False,
) -> None:
    """Read the options that come before a command."""


@app.command(rich_help_panel=START)
def quickstart(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/quickstart"),
    method: Annotated[str, typer.Option(help="Training method to compare with the base: bfpo, dpo_h, ...")] = "bfpo",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the world, the base model and the training.")
    ] = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Show what BFPO does, in two minutes on a CPU and without downloads."""
    from bfpo.experiments.quickstart import quickstart as run

    run(out, method=method, seed=seed)
    if open_page:
        typer.launch((out / "report.html").resolve().as_uri())


@app.command(rich_help_panel=EVALUATE)
def chat(
    checkpoint: Checkpoint,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampling.")] = 0,
    guard: GuardFile = None,
    steps: StepsFile = None,
) -> None:
    """Chat with a checkpoint in the terminal."""
    from bfpo.commands.chat import chat as run
    from bfpo.generation.open import load_steps_file
    from bfpo.judging.guarded_engine import load_guard

    run(
        checkpoint,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        guard=None if guard is None else load_guard(guard),
        steps=None if steps is None else load_steps_file(steps),
    )


@app.command(rich_help_panel=DATA)
def generate(
    checkpoint: Checkpoint,
    prompts: Annotated[
        str,
        typer.Argument(help="prompts.jsonl, a table with a prompt column, or a .txt file.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="File of completions; an unfinished one is resumed.")] = Path(
        "completions.jsonl"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Completions per prompt.")] = 1,
    temperature: Temperature = 0.7,
    top_p: Annotated[float, typer.Option(help="Probability mass to sample from, in (0, 1].")] = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sampling; prompts have independent noise.")] = 0,
    dtype: Annotated[str, typer.Option(help="Data type of the weights: float32, bfloat16 or float16.")] = "float32",
    server: Annotated[
        str | None, typer.Option(help="http://host:port/v1: CHECKPOINT is the model's name on that server.")
    ] = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
    tries: Tries = 6,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    guard: GuardFile = None,
    steps: StepsFile = None,
    max_unanswered: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of completions that may be missing because a prompt is too long or the server fails.",
        ),
    ] = 0.1,
    ignore_column: Annotated[
        list[str] | None,
        typer.Option(help="Column of PROMPTS that is left out; repeatable. Else a text that isn't read is an error."),
    ] = None,
    ignore_message_key: Annotated[
        list[str] | None, typer.Option(help="Key of messages that is left out; repeatable.")
    ] = None,
) -> None:
    """Generate completions with a checkpoint or a model on a server."""
    from bfpo.commands.generate import generate_to_file
    from bfpo.core.samples import Sampling
    from bfpo.errors import RecipeError
    from bfpo.generation.open import EngineSection, load_steps_file
    from bfpo.judging.guarded_engine import load_guard

    if server is not None and steps is not None:
        raise RecipeError("--steps switches adapters, which needs the model in this process; leave out --server")
    engine = EngineSection(
        path=checkpoint,
        server=server,
        concurrency=concurrency,
        timeout=timeout,
        tries=tries,
        key_variable=key_variable,
        dtype=dtype,
        steps=None if steps is None else load_steps_file(steps),
    )
    sampling = Sampling(samples, temperature, top_p, max_new_tokens, seed)
    generate_to_file(
        engine,
        sampling,
        prompts,
        out,
        max_unanswered=max_unanswered,
        guard=None if guard is None else load_guard(guard),
        ignore_columns=ignore_column or (),
        ignore_message_keys=ignore_message_key or (),
    )


@app.command(rich_help_panel=DATA)
def label(
    pairs: Annotated[
        str, typer.Argument(help="[ADAPTER:]PATH of a file, a pattern or a hub id.", show_default=False)
    ],
    judge: Judges,
    out: Annotated[Path, typer.Option(help="Output folder; an unfinished one is resumed.")] = Path("labels"),
    conflicts: Annotated[
        str, typer.Option(help="What to do if judges disagree or are undecided: drop, unsafe, first or error.")
    ] = "drop",
    beta: Annotated[float, typer.Option(help="Beta of the displayed targets.")] = 0.01,
    limit: Limit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Estimate the time, and stop.")] = False,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
    tries: Tries = 6,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    reply_tokens: ReplyTokens = 128,
) -> None:
    """Label the safety of preference pairs with judges."""
    from bfpo.data.adapters import parse_source
    from bfpo.judging.label_pairs import label_pairs
    from bfpo.judging.open import open_judge

    source = parse_source(pairs)
    servers = judge_servers(concurrency, timeout, tries, key_variable, reply_tokens)
    judges = [open_judge(spec, server=servers) for spec in judge]
    label_pairs(source, judges, out, conflicts=conflicts, limit=limit, beta=beta, estimate_only=dry_run)


@app.command(rich_help_panel=DATA)
def redteam(recipe: Recipe, overrides: Overrides = None) -> None:
    """Build a preference set from a model's own completions; resumable."""
    from bfpo.config.loading import load_recipe
    from bfpo.redteam.recipe import RedteamRecipe

    checked = load_recipe(recipe, RedteamRecipe, overrides)

    from bfpo.redteam.run import run_redteam

    run_redteam(checked)


@app.command("eval", rich_help_panel=EVALUATE)
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts of each task.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count prompts and tokens, estimate time and cost, and stop.")
    ] = False,
    gate: Annotated[Path | None, typer.Option(help="File of bounds; exit code 3 if one is violated.")] = None,
) -> None:
    """Run suites on a model: generate, judge, score, compare; resumable."""
    from bfpo.config.loading import load_recipe
    from bfpo.evaluation.recipe import EvalRecipe

    checked = load_recipe(recipe, EvalRecipe, [*(overrides or []), *([f"limit={limit}"] if limit else [])])
    if dry_run:
        from bfpo.evaluation.plan import show_plan

        show_plan(checked)
        return

    from bfpo.evaluation.pipeline import run_eval

    run_eval(checked, gate=None if gate is None else str(gate))


@app.command(rich_help_panel=EVALUATE)
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of evaluated runs, baseline first.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("report"),
) -> None:
    """Write a report on evaluated runs: report.html, report.md, figures and tables."""
    from bfpo.core.terminal import say
    from bfpo.report.html import write_report

    say(str(write_report(out, runs)))


@app.command(rich_help_panel=EVALUATE)
def card(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run.", show_default=False)],
    into: Annotated[
        Path | None,
        typer.Option(help="Model card to insert the section into; default: print it.", show_default=False),
    ] = None,
) -> None:
    """Write the evaluation section of a model card."""
    from bfpo.core.terminal import say
    from bfpo.report.card import card_section, insert_card

    section = card_section(run)
    if into is None:
        say(section)
        return
    insert_card(section, into)
    say(str(into))


@app.command(rich_help_panel=TRAIN)
def dual(
    samples: Annotated[
        Path,
        typer.Argument(
            help="Scored samples of the base model: a folder with completions and verdicts, or a table with "
            "prompt_id, reward and cost.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value: override keys of --recipe.", show_default=False)
    ] = None,
    max: Annotated[float | None, typer.Option(help="Largest allowed value, e.g. 0.02 for 2 % unsafe.")] = None,
    gain: Annotated[float | None, typer.Option(help="How much lower than the base model's value, instead.")] = None,
    measure: Annotated[
        str, typer.Option(help="unsafe (share of unsafe answers), cost (mean) or cvar (mean of the worst share).")
    ] = "unsafe",
    share: Annotated[float, typer.Option(help="Share of the answers in the tail of cvar.")] = 0.1,
    kind: Annotated[str | None, typer.Option(help="Kind of the prompts that count, e.g. harmful.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe of the training, whose loss the multiplier is for.")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="Beta of the loss, without a recipe.", show_default="0.1")
    ] = None,
    reward_scale: Annotated[float, typer.Option(help="Factor for the rewards.")] = 1.0,
    temperature: Annotated[
        float | None,
        typer.Option(help="Temperature of the samples.", show_default="that of the evaluation, or 1"),
    ] = None,
    reward_judge: Annotated[str | None, typer.Option(help="Judge whose verdicts are the rewards.")] = None,
    cost_judge: Annotated[str | None, typer.Option(help="Judge whose verdicts are the costs.")] = None,
    pecan: Annotated[
        bool,
        typer.Option(
            "--pecan",
            help="The table has base_logp, helpful_logp and safe_logp, log-probabilities under three models.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Find the setting that meets a constraint such as "at most 2 % unsafe", and what it costs."""
    from bfpo.commands.dual import solve_dual

    solve_dual(
        samples,
        out,
        measure=measure,
        max=max,
        gain=gain,
        share=share,
        kind=kind,
        recipe=recipe,
        overrides=overrides or [],
        beta=beta,
        reward_scale=reward_scale,
        temperature=temperature,
        reward_judge=reward_judge,
        cost_judge=cost_judge,
        pecan=pecan,
        seed=seed,
    )


@app.command(rich_help_panel=STUDIES)
def certify(recipe: Recipe, overrides: Overrides = None) -> None:
    """Prove on which side of its threshold a small head is over boxes of hidden states; resumable."""
    from bfpo.certificates.recipe import CertifyRecipe
    from bfpo.config.loading import load_recipe

    checked = load_recipe(recipe, CertifyRecipe, overrides)

    from bfpo.commands.certify import certify as run

    run(checked)


@app.command(rich_help_panel=STUDIES)
def experiment(recipe: Recipe, overrides: Overrides = None) -> None:
    """Compare training methods over seeds in the testbed's worlds; resumable."""
    from bfpo.config.loading import load_recipe
    from bfpo.experiments.recipe import ExperimentRecipe

    checked = load_recipe(recipe, ExperimentRecipe, overrides)

    from bfpo.experiments.units import make_units

    # Refuses an impossible variant before torch is loaded.
    make_units(checked)

    from bfpo.experiments.run import run_experiment as run

    run(checked, command=" ".join(["bfpo experiment", str(recipe), *(overrides or [])]))


@app.command(hidden=True)
def compare(recipe: Recipe, overrides: Overrides = None) -> None:
    """Run `bfpo experiment` under its former name, for one release."""
    typer.echo("warning: `bfpo compare RECIPE` is now `bfpo experiment RECIPE`", err=True)
    experiment(recipe, overrides)


@app.command(rich_help_panel=START)
def migrate(
    file: Annotated[Path, typer.Argument(help="YAML of another stack.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of that stack, as in its launch script.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Recipe to write.")] = Path("recipe.yaml"),
    kind: Annotated[str | None, typer.Option(help="train or sft, if the file doesn't say which.")] = None,
) -> None:
    """Convert a recipe of official BFPO, alignment-handbook, TRL or LLaMA-Factory."""
    from bfpo.commands.migrate import migrate as run

    run(file, overrides or [], out, kind=kind)


@app.command(rich_help_panel=START)
def env() -> None:
    """Show versions and devices, for a bug report."""
    from bfpo.commands.environment import show_environment

    show_environment()


def main() -> None:
    """Run the command line."""
    run_app(app, sys.argv[1:])
