"""The command line. Bodies import what they need when they run, so `bfpo --help` answers at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bfpo import __version__
from bfpo.errors import BfpoError

app = typer.Typer(
    name="bfpo",
    help="Align language models for safety and helpfulness with one supervised loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="key.sub=value after a recipe overrides what it says. Exits 0 ok, 1 failed, 2 bad input, 3 gate violated.",
)
data_app = typer.Typer(help="Look at preference data, and prepare them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
judge_app = typer.Typer(help="Judge answers, and measure how often a judge is right.", no_args_is_help=True)
app.add_typer(judge_app, name="judge")

Recipe = Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.sub=value: change what the recipe says.", show_default=False)
]
Limit = Annotated[int | None, typer.Option(min=1, help="Take at most so many pairs of each source.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read, check and show everything, but don't train.")]


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    """Read the options that come before a command."""
    if version:
        typer.echo(f"bfpo {__version__}")
        raise typer.Exit


@app.command()
def train(recipe: Recipe, overrides: Overrides = None, limit: Limit = None, dry_run: DryRun = False) -> None:
    """Train a model on labeled preference pairs."""
    from bfpo.config.loading import load_recipe
    from bfpo.config.recipes import TrainRecipe

    checked = load_recipe(recipe, TrainRecipe, overrides)

    from bfpo.training.run import run_training

    run_training(checked, dry_run=dry_run, limit=limit)


@app.command()
def sft(recipe: Recipe, overrides: Overrides = None, limit: Limit = None, dry_run: DryRun = False) -> None:
    """Fine-tune a model on completions."""
    from bfpo.config.loading import load_recipe
    from bfpo.config.recipes import SftRecipe

    checked = load_recipe(recipe, SftRecipe, overrides)

    from bfpo.training.run_sft import run_sft

    run_sft(checked, dry_run=dry_run, limit=limit)


@app.command()
def chat(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a model or an adapter.", show_default=False)],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a checkpoint in the terminal."""
    from bfpo.commands.chat import chat as talk

    talk(checkpoint, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything that is made.")] = Path("runs/quickstart"),
    method: Annotated[str, typer.Option(help="bfpo, or one to see beside it: a key of testbed METHODS.")] = "bfpo",
    seed: Annotated[int, typer.Option(min=0, help="Of the world, the base model and the training.")] = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """See in two minutes on a CPU, without any download, what BFPO does."""
    from bfpo.experiments.quickstart import quickstart as run

    run(out, method=method, seed=seed)
    if open_page:
        typer.launch((out / "report.html").resolve().as_uri())


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a model or an adapter.", show_default=False)],
    prompts: Annotated[str, typer.Argument(help="prompts.jsonl, a table with a prompt column, or a .txt file.")],
    out: Annotated[Path, typer.Option(help="File of completions; one begun earlier is continued.")] = Path(
        "completions.jsonl"
    ),
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Probability mass that is kept.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(help="With a prompt's id and the sample's number it fixes an answer.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16 or float16.")] = "float32",
    server: Annotated[
        str | None, typer.Option(help="http://host:port/v1: CHECKPOINT is the model's name on that server.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at a time, with --server.")] = 8,
    timeout: Annotated[float, typer.Option(help="Longest time for a server's answer, in seconds.")] = 120.0,
    tries: Annotated[int, typer.Option(min=1, help="Requests to a server for one answer at most.")] = 6,
    key_variable: Annotated[str, typer.Option(help="Environment variable with the server's key.")] = "OPENAI_API_KEY",
    max_unanswered: Annotated[
        float, typer.Option(min=0, max=1, help="Share of answers that may be missing: too long, or the server fails.")
    ] = 0.1,
) -> None:
    """Answer prompts with a checkpoint or a server's model, into a file of completions."""
    from bfpo.core.samples import Engine, Sampling
    from bfpo.core.terminal import say
    from bfpo.data.stages import generate_most, read_prompt_file, show_faults, show_unanswered

    sampling = Sampling(samples, temperature, top_p, max_new_tokens, seed)
    asked = read_prompt_file(prompts)

    engine: Engine
    if server is not None:
        from bfpo.generation.openai_server import ServerEngine, ServerOptions

        options = ServerOptions(
            server, checkpoint, concurrency, timeout=timeout, tries=tries, key_variable=key_variable
        )
        engine = ServerEngine(options, sampling)
    else:
        from bfpo.generation.in_process import load_engine

        engine = load_engine(checkpoint, sampling, dtype=dtype)
    try:
        found, lost = generate_most(
            engine, asked, out, samples=samples, most_unanswered=max_unanswered * len(asked) * samples
        )
    finally:
        show_faults(engine.faults)
    show_unanswered(lost)
    cut = sum(completion.finish_reason == "length" for completion in found)
    say(f"{len(found)} completions of {len(asked)} prompts in {out}; {cut} were cut at {max_new_tokens} tokens")


@app.command()
def label(
    pairs: Annotated[
        str, typer.Argument(help="[ADAPTER:]PATH of a file, a pattern or a hub id.", show_default=False)
    ],
    judge: Annotated[
        list[str], typer.Option(help="KIND or KIND:PATH, as for bfpo judge; may stand twice.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder; one begun earlier is continued.")] = Path("labels"),
    conflicts: Annotated[
        str, typer.Option(help="Where judges differ or are undecided: drop, unsafe, first or error.")
    ] = "drop",
    beta: Annotated[float, typer.Option(help="Of the targets that are shown.")] = 0.01,
    limit: Limit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell how long it would take, and stop.")] = False,
) -> None:
    """Give the pairs of any file safety labels by judges."""
    from bfpo.judging.label_pairs import POLICIES, label_pairs

    if conflicts not in POLICIES:
        from bfpo.errors import RecipeError, did_you_mean

        raise RecipeError(f"--conflicts '{conflicts}'; {did_you_mean(conflicts, list(POLICIES))}")

    from bfpo.data.adapters import named_source
    from bfpo.judging.open import open_judge

    source = named_source(pairs)
    judges = [open_judge(spec) for spec in judge]
    label_pairs(source, judges, out, conflicts=conflicts, limit=limit, beta=beta, estimate_only=dry_run)  # type: ignore[arg-type]


@app.command()
def redteam(recipe: Recipe, overrides: Overrides = None) -> None:
    """Make a preference set from the answers of one's own model; resumable."""
    from bfpo.config.loading import load_recipe
    from bfpo.redteam.recipe import RedteamRecipe

    checked = load_recipe(recipe, RedteamRecipe, overrides)

    from bfpo.redteam.run import run_redteam

    run_redteam(checked)


@app.command("eval")
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take at most so many prompts of each task.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count prompts and tokens, tell time and cost, and stop.")
    ] = False,
    gate: Annotated[Path | None, typer.Option(help="File of bounds; exit code 3 when one is violated.")] = None,
) -> None:
    """Put suites of prompts to a model, judge its answers, score and compare them; resumable."""
    from bfpo.config.loading import load_recipe
    from bfpo.evaluation.recipe import EvalRecipe

    checked = load_recipe(recipe, EvalRecipe, [*(overrides or []), *([f"limit={limit}"] if limit else [])])
    if dry_run:
        from bfpo.evaluation.plan import show_plan

        show_plan(checked)
        return

    from bfpo.evaluation.pipeline import run_eval

    run_eval(checked, gate=None if gate is None else str(gate))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluated runs, the one before first.")],
    out: Annotated[Path, typer.Option(help="Folder to write report.html into.")] = Path("report"),
) -> None:
    """Draw the page of evaluated runs: report.html, report.md, pareto.svg and tables."""
    from bfpo.core.terminal import say
    from bfpo.report.html import write_report

    say(str(write_report(out, runs)))


@app.command()
def card(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluated run.", show_default=False)],
    into: Annotated[
        Path | None, typer.Option(help="Model card to put the section into; default: print it.", show_default=False)
    ] = None,
) -> None:
    """Tell an evaluation as a section of a model card: judges, rates with intervals, licenses, limits."""
    from bfpo.core.terminal import say
    from bfpo.report.card import card_section, insert_card

    section = card_section(run)
    if into is None:
        say(section)
        return
    insert_card(section, into)
    say(str(into))


@app.command()
def merge(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="Type to save weights in: float32, bfloat16 or float16.")] = "float32",
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the base model.")] = False,
) -> None:
    """Merge a LoRA adapter into its base model, for tools that know no adapters."""
    from bfpo.model.merge import merge_checkpoint

    merge_checkpoint(checkpoint, out, dtype=dtype, trust_remote_code=trust_remote_code)


@app.command()
def migrate(
    file: Annotated[Path, typer.Argument(help="YAML of another stack.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of that stack, as its launch script gives them.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Recipe to write.")] = Path("recipe.yaml"),
    kind: Annotated[str | None, typer.Option(help="train or sft, if the file doesn't tell.")] = None,
) -> None:
    """Turn a file of official BFPO, alignment-handbook, TRL or LLaMA-Factory into a recipe."""
    from bfpo.commands.migrate import migrate as work

    work(file, overrides or [], out, kind=kind)


@app.command()
def env() -> None:
    """Show versions and devices, for a bug report."""
    from bfpo.commands.environment import show_environment

    show_environment()


@app.command()
def compare(recipe: Recipe, overrides: Overrides = None) -> None:
    """Compare methods over seeds in the testbed's worlds; resumable."""
    from bfpo.config.loading import load_recipe
    from bfpo.experiments.recipe import ExperimentRecipe

    checked = load_recipe(recipe, ExperimentRecipe, overrides)

    from bfpo.experiments.run import run_experiment

    run_experiment(checked, command=" ".join(["bfpo compare", str(recipe), *(overrides or [])]))


Labeled = Annotated[
    str,
    typer.Argument(help="Answers that people labeled: columns prompt, text, refusal, safe; or XSTest's files."),
]
Threshold = Annotated[
    float | None,
    typer.Option(min=0, help="An answer is safe from this probability on.", show_default="0.5, or linear's own band"),
]


@judge_app.command("run")
def run_judge(
    completions: Annotated[Path, typer.Argument(help="completions.jsonl.", show_default=False)],
    judge: Annotated[str, typer.Option(help="KIND:PATH, several joined by +, e.g. linear:judge.npz.")],
    out: Annotated[Path, typer.Option(help="File of verdicts; one begun earlier is continued.")] = Path(
        "verdicts.jsonl"
    ),
    threshold: Threshold = None,
) -> None:
    """Judge completions, into a file of verdicts."""
    from bfpo.commands.judge import run_judge as run

    run(completions, judge, out, threshold=threshold)


@judge_app.command("fit")
def fit_judge(
    labeled: Labeled,
    out: Annotated[Path, typer.Option(help="File of the judge; its card is written beside it.")] = Path("judge.npz"),
    doubt: Annotated[
        float,
        typer.Option(help="Undecided on safety where the chance of being wrong is more than this."),
    ] = 0.3,
) -> None:
    """Train the linear judge on labeled answers, in a minute, and measure it on held-out prompts."""
    from bfpo.commands.judge import fit_judge as fit

    fit(labeled, out, doubt=doubt)


@judge_app.command("eval")
def evaluate_judges(
    labeled: Labeled,
    judge: Annotated[list[str], typer.Option(help="KIND:PATH; may stand several times.")],
    threshold: Threshold = None,
    false_safe: Annotated[float, typer.Option(min=0, max=1, help="Wanted share of unsafe answers that pass.")] = 0.05,
    out: Annotated[Path, typer.Option(help="File of the results.")] = Path("judge-eval.json"),
) -> None:
    """Hold judges to human labels: confusion, calibration, agreement, thresholds."""
    from bfpo.judging.evaluate import evaluate_judges as evaluate

    evaluate(labeled, judge, threshold=threshold, false_safe=false_safe, out=out)


@data_app.command("inspect")
def inspect_data(
    sources: Annotated[
        list[str],
        typer.Argument(help="Recipe, or [ADAPTER:]PATH of a file, a pattern or a hub id.", metavar="SRC..."),
    ],
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id: lengths in tokens, truncation.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Longest prompt plus completion, in tokens.")] = 1024,
    examples: Annotated[int, typer.Option(min=0, help="Pairs to show (they may be harmful text).")] = 3,
    limit: Limit = None,
) -> None:
    """Show what preference data hold: cells, labels, lengths, conflicts, examples."""
    from bfpo.commands.data import inspect_sources

    inspect_sources(sources, tokenizer=tokenizer, max_length=max_length, examples=examples, limit=limit)


@data_app.command("prepare")
def prepare_data(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("prepared"),
    limit: Limit = None,
) -> None:
    """Read, clean and split a recipe's data into pairs.jsonl, eval.jsonl and data_manifest.json."""
    from bfpo.commands.data import prepare_recipe

    prepare_recipe(recipe, overrides or [], out, limit=limit)


def main() -> None:
    """Run the command line; errors made on purpose end with a message and their exit code."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments)
    except BfpoError as error:
        if debug:
            raise
        _tell(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if debug or error.filename is None:
            raise
        _tell(f"{error.filename}: {error.strerror}")
        sys.exit(1)
    except RuntimeError as error:
        # torch has no class of its own for this one: gloo's words, and what NCCL raises.
        lost = "gloo" in str(error) or type(error).__name__ == "DistBackendError"
        if debug or not lost:
            raise
        _tell("the connection to another process was lost: it has ended, see above for its reason")
        sys.exit(1)


def _tell(message: str) -> None:
    """Print an error, once for all processes of a run: the first that has one tells it."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch = sys.modules.get("torch")
        if torch is None or not torch.distributed.is_initialized():
            # Too early to ask the others; they read the same recipe and data.
            first = os.environ.get("LOCAL_RANK", "0") == "0"
        else:
            try:
                first = torch.distributed.distributed_c10d._get_default_store().add("bfpo: failed", 1) == 1
            except RuntimeError:
                # The process that kept the count has ended, and told why.
                first = False
        if not first:
            return
    from bfpo.core.terminal import visible

    typer.echo(f"error: {visible(message)}", err=True)
