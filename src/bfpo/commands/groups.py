"""Groups of commands, `bfpo judge run` and so on; the bodies import their work when they run, as in `app`."""

from pathlib import Path
from typing import Annotated

import typer

from bfpo.commands.options import (
    Concurrency,
    DryRun,
    Judges,
    KeyVariable,
    LabeledAnswers,
    LabeledSources,
    Limit,
    Overrides,
    Recipe,
    ReplyTokens,
    Threshold,
    Timeout,
    Tries,
    judge_servers,
)
from bfpo.commands.panels import DATA, DEPLOY

data_app = typer.Typer(help="Inspect and prepare preference data.", no_args_is_help=True, rich_help_panel=DATA)
judge_app = typer.Typer(
    help="Judge completions, and evaluate judges against human labels.", no_args_is_help=True, rich_help_panel=DATA
)
score_app = typer.Typer(help="Give every answer a reward and a cost.", no_args_is_help=True, rich_help_panel=DATA)
model_app = typer.Typer(help="Convert models.", no_args_is_help=True, rich_help_panel=DEPLOY)
GROUPS = {"data": data_app, "judge": judge_app, "score": score_app, "model": model_app}
"""Name → its commands, in the order of the help."""


@judge_app.command("run")
def run_judge(
    completions: Annotated[Path, typer.Argument(help="completions.jsonl.", show_default=False)],
    judge: Annotated[str, typer.Option(help="KIND or KIND:PATH, e.g. linear:judge.npz.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File of verdicts; an unfinished one is resumed.")] = Path(
        "verdicts.jsonl"
    ),
    threshold: Threshold = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
    tries: Tries = 6,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    reply_tokens: ReplyTokens = 128,
) -> None:
    """Judge completions."""
    from bfpo.commands.judge import run_judge as run

    servers = judge_servers(concurrency, timeout, tries, key_variable, reply_tokens)
    run(completions, judge, out, threshold=threshold, server=servers)


@judge_app.command("fit")
def fit_judge(
    labeled: LabeledSources,
    out: Annotated[Path, typer.Option(help="File of the judge; its card is written beside it.")] = Path("judge.npz"),
    doubt: Annotated[
        float, typer.Option(help="Abstain on safety where the estimated error probability exceeds this.")
    ] = 0.3,
) -> None:
    """Fit a linear judge to labeled completions, and evaluate it on other sources and on held-out prompts."""
    from bfpo.commands.judge import fit_judge as run

    run(labeled, out, abstain_threshold=doubt)


@judge_app.command("eval")
def evaluate_judges(
    labeled: LabeledAnswers,
    judge: Judges,
    threshold: Threshold = None,
    false_safe: Annotated[
        float, typer.Option(min=0, max=1, help="Target share of unsafe answers that pass as safe.")
    ] = 0.05,
    out: Annotated[Path, typer.Option(help="File of the results.")] = Path("judge-eval.json"),
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
    tries: Tries = 6,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    reply_tokens: ReplyTokens = 128,
) -> None:
    """Evaluate judges against human labels: confusion, calibration, agreement, thresholds."""
    from bfpo.judging.evaluate import evaluate_judges as run

    servers = judge_servers(concurrency, timeout, tries, key_variable, reply_tokens)
    run(labeled, judge, threshold=threshold, max_false_safe=false_safe, out=out, server=servers)


@judge_app.command("annotate")
def annotate_completions(
    completions: Annotated[Path, typer.Argument(help="completions.jsonl.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File of labels; an unfinished one is resumed.", show_default=False)],
    annotator: Annotated[str, typer.Option(help="Name of the annotator.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Seed of the order of the answers.")] = 0,
    is_program: Annotated[
        bool, typer.Option("--program", help="The annotator is a program that reads, not a person.")
    ] = False,
) -> None:
    """Label completions in the terminal, one by one, without knowing their model; resumable."""
    from bfpo.commands.annotate import annotate

    annotate(completions, out, annotator=annotator, seed=seed, is_program=is_program)


@judge_app.command("agreement")
def show_annotator_agreement(
    labels: Annotated[
        list[str], typer.Argument(help="Files of `bfpo judge annotate`.", metavar="LABELS...", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="File of the results.", show_default=False)] = None,
) -> None:
    """Compare the labels of two or more annotators: Cohen's kappa, and the answers on which they differ."""
    from bfpo.commands.judge import show_annotator_agreement as run

    run(labels, out)


@score_app.command("train")
def train_scores(recipe: Recipe, overrides: Overrides = None, limit: Limit = None, dry_run: DryRun = False) -> None:
    """Train a model that gives answers a reward and a cost, on labeled pairs; or a cost head for guards."""
    from bfpo.config.loading import check_recipe, read_recipe
    from bfpo.config.per_token import PerTokenRecipe
    from bfpo.config.recipes import ScoreRecipe
    from bfpo.errors import RecipeError

    content = read_recipe(recipe, overrides)
    if content.get("per_token") is True:
        per_token = check_recipe(content, PerTokenRecipe, str(recipe))
        if limit is not None:
            raise RecipeError("--limit counts pairs, and per_token: true has none; use max_prefixes")

        from bfpo.judging.prefix_run import run_per_token

        run_per_token(per_token, dry_run=dry_run)
        return
    checked = check_recipe(content, ScoreRecipe, str(recipe))

    from bfpo.judging.score_run import run_score

    run_score(checked, dry_run=dry_run, limit=limit)


@score_app.command("apply")
def apply_scores(
    answers: Annotated[
        str,
        typer.Argument(
            help="completions.jsonl, or pairs: [ADAPTER:]PATH of a file, a pattern or a hub id.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output file; an unfinished one is resumed.")] = Path("scored.jsonl"),
    reward: Annotated[
        str | None, typer.Option(help="Judge of helpfulness, e.g. reward:PATH.", show_default=False)
    ] = None,
    cost: Annotated[
        str | None, typer.Option(help="Judge of safety that gives a number, e.g. cost:PATH.", show_default=False)
    ] = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
    tries: Tries = 6,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    reply_tokens: ReplyTokens = 128,
) -> None:
    """Write the rewards and costs of answers into columns, by any judge that gives a number."""
    from bfpo.judging.score_columns import apply_scores as run

    servers = judge_servers(concurrency, timeout, tries, key_variable, reply_tokens)
    run(answers, out, reward=reward, cost=cost, server=servers)


@data_app.command("inspect")
def inspect_data(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Recipe, or [ADAPTER:]PATH of a file, a pattern or a hub id.", metavar="SRC...", show_default=False
        ),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id: show lengths in tokens, and truncation.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=8, help="Maximum length of prompt and completion, in tokens.")
    ] = 1024,
    examples: Annotated[int, typer.Option(min=0, help="Number of pairs to show (may be harmful text).")] = 3,
    show_tokens: Annotated[
        bool, typer.Option("--show-tokens", help="With --tokenizer: show which tokens of the examples are scored.")
    ] = False,
    limit: Limit = None,
) -> None:
    """Show preference data: cells, labels, lengths, conflicts, examples."""
    from bfpo.commands.data import inspect_sources

    if show_tokens and tokenizer is None:
        raise typer.BadParameter("it needs --tokenizer", param_hint="--show-tokens")
    inspect_sources(
        sources,
        tokenizer=tokenizer,
        max_length=max_length,
        examples=examples,
        show_tokens=show_tokens,
        limit=limit,
    )


@data_app.command("prepare")
def prepare_data(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("prepared"),
    limit: Limit = None,
) -> None:
    """Read, clean and split the data of a recipe: pairs.jsonl, eval.jsonl, data_manifest.json."""
    from bfpo.commands.data import prepare_recipe

    prepare_recipe(recipe, overrides or [], out, limit=limit)


@data_app.command("degrade")
def degrade_data(
    source: Annotated[
        str,
        typer.Argument(help="[ADAPTER:]PATH of a file, a pattern or a hub id.", metavar="SRC", show_default=False),
    ],
    versions: Annotated[int, typer.Option(min=1, help="Number of degraded versions of an answer.")] = 2,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("degraded"),
    limit: Limit = None,
) -> None:
    """Make graded pairs of safe answers and versions without some of their key words: pairs.jsonl, degrade.json."""
    from bfpo.commands.data import degrade_source

    degrade_source(source, out, versions=versions, limit=limit)


@data_app.command("adapters")
def show_adapters(
    show: Annotated[
        str | None, typer.Option(help="Adapter whose example to print as JSON, one row a line.", show_default=False)
    ] = None,
) -> None:
    """List the adapters: the rows that each reads, and the columns that they need."""
    from bfpo.commands.data import show_adapters as run

    run(show)


@model_app.command("import")
def import_model(
    file: Annotated[str, typer.Argument(help="GGUF file, or org/name/file.gguf on the hub.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Output folder.", show_default=False)],
    dtype: Annotated[
        str, typer.Option(help="Data type of the saved weights: float32, bfloat16 or float16.")
    ] = "float32",
) -> None:
    """Convert a GGUF file into a checkpoint of transformers."""
    from bfpo.model.import_gguf import import_gguf

    import_gguf(file, out, dtype=dtype)


@model_app.command()
def interpolate(
    first: Annotated[str, typer.Argument(help="Folder or hub id of a model or LoRA adapter.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another model of this architecture.", show_default=False)],
    weight: Annotated[float, typer.Option(help="Weight of the second model, from 0 to 1.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Output folder.", show_default=False)],
    dtype: Annotated[
        str, typer.Option(help="Data type of the saved weights: float32, bfloat16 or float16.")
    ] = "float32",
) -> None:
    """Save the weighted mean of the weights of two models."""
    from bfpo.model.interpolate import interpolate_checkpoints

    interpolate_checkpoints(first, second, out, weight=weight, dtype=dtype)
