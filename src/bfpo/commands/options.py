"""Arguments and options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bfpo.generation.open import JudgeServerSection

Recipe = Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key.sub=value: override keys of the recipe.", show_default=False),
]
Checkpoint = Annotated[
    str, typer.Argument(help="Folder or hub id of a model or an adapter, or a GGUF file.", show_default=False)
]
Limit = Annotated[int | None, typer.Option(min=1, help="Maximum number of pairs of each source.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read, check and show everything, but don't train.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy decoding.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of a completion, in tokens.")]
LabeledAnswers = Annotated[
    str,
    typer.Argument(
        help="Completions with human labels: columns prompt, text, refusal, safe; XSTest's; or LABELS@COMPLETIONS.",
        show_default=False,
    ),
]
LabeledSources = Annotated[
    list[str],
    typer.Argument(
        help="Completions with human labels: columns prompt, text, refusal, safe; XSTest's; or LABELS@COMPLETIONS. "
        "Each is a source.",
        metavar="LABELED...",
        show_default=False,
    ),
]
Judges = Annotated[
    list[str],
    typer.Option(
        help="KIND or KIND:PATH, e.g. linear:judge.npz; reasoning=SPEC judges the reasoning; repeatable.",
        show_default=False,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Probability from which an answer counts as safe.",
        show_default="0.5, or the undecided band of a linear judge",
    ),
]
Concurrency = Annotated[int, typer.Option(min=1, help="Maximum number of concurrent requests to a server.")]
Timeout = Annotated[float, typer.Option(help="Maximum time for one completion of a server, in seconds.")]
Tries = Annotated[int, typer.Option(min=1, help="Maximum number of requests to a server for one completion.")]
ReplyTokens = Annotated[
    int,
    typer.Option(min=1, help="Maximum length of a rubric judge's reply, in tokens; reasoning needs 1,024 or more."),
]
GuardFile = Annotated[
    Path | None,
    typer.Option("--guard", help="File with a guard in front of the model; see docs/guards.md.", show_default=False),
]
StepsFile = Annotated[
    Path | None,
    typer.Option(
        "--steps",
        help="File with a chain of steps and their adapters, CHECKPOINT being their base; see docs/redteam.md.",
        show_default=False,
    ),
]
KeyVariable = Annotated[str, typer.Option(help="Environment variable that holds the server's key.")]


def judge_servers(
    concurrency: int, timeout: float, tries: int, key_variable: str, reply_tokens: int
) -> "JudgeServerSection":
    """Return how the servers of judges are queried, from the options of a command."""
    from bfpo.generation.open import JudgeServerSection

    return JudgeServerSection(
        concurrency=concurrency,
        timeout=timeout,
        tries=tries,
        key_variable=key_variable,
        max_new_tokens=reply_tokens,
    )
