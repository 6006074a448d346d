"""The command `bfpo init`: asks for model, data and goal, looks at them, and writes a recipe."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import psutil
import torch
import typer
from transformers import PreTrainedTokenizerBase

from bfpo.config.loading import check_recipe, dump_yaml
from bfpo.config.recipes import DataRecipe, ModelSection, Source, TextSection, TrainRecipe
from bfpo.core.files import write_text
from bfpo.core.terminal import say, show_table, timed, warn
from bfpo.data.adapters import ADAPTERS, parse_source, recognize
from bfpo.data.examples import PAIR_EXAMPLES, published_as
from bfpo.data.inspect import show_cell_lengths, show_cells, show_sources, show_token_lengths
from bfpo.data.load import SourceReport
from bfpo.data.prepare import PreparedData, prepare
from bfpo.data.prompts import PROMPT_COLUMNS
from bfpo.data.rows import read_rows
from bfpo.data.tokenize import Encoder
from bfpo.errors import RecipeError, did_you_mean
from bfpo.losses.labeling import LabelingFunction
from bfpo.model.layout_check import VERIFIED
from bfpo.model.load import empty_model, load_tokenizer
from bfpo.model.lora import is_adapter
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.training.first_choices import (
    GOALS,
    DataFacts,
    Goal,
    Machine,
    ModelFacts,
    check_goal,
    choose_beta,
    choose_trained,
    possible_choices,
    possible_goals,
)
from bfpo.training.starter import StarterRecipe, write_starter

Device = Literal["auto", "cpu", "gpu"]
# What a GPU that isn't here is taken to have: that of recipes/1b-24gb.yaml.
_ASSUMED_GPU = 24e9
_NO_LIMIT = 10**9


def init(
    model: str | None,
    data: Sequence[str],
    buffer: Sequence[str],
    goal: str | None,
    device: str,
    out: Path,
) -> None:
    """Ask for what is missing, look at model and data, and write a recipe.

    Args:
        model: Folder or hub id of the model; None to ask.
        data: Sources of the form `[ADAPTER:]PATH`; none to ask.
        buffer: Sources of helpfulness pairs.
        goal: Key of `GOALS`; None to ask.
        device: `cpu`, `gpu`, or `auto` for a GPU if there is one.
        out: Recipe to write; must not exist.

    Raises:
        RecipeError: If something is missing and can't be asked for, `out` exists, or the goal doesn't fit the data.
        DataError: If the data can't be read.
        ModelError: If the model's configuration can't be loaded.
    """
    if out.exists():
        raise RecipeError(f"`out` '{out}' exists; name a file that does not exist")
    for name, value, allowed in (("goal", goal, [*map(str, GOALS)]), ("device", device, ["auto", "cpu", "gpu"])):
        if value is not None and value not in allowed:
            raise RecipeError(f"`{name}` is '{value}'; {did_you_mean(value, allowed)}")
    can_ask = sys.stdin.isatty()
    missing = [name for name, value in (("model", model), ("data", data), ("goal", goal)) if not value]
    if missing and not can_ask:
        flags = ", ".join(f"`{name}`" for name in missing)
        raise RecipeError(f"{flags} missing, and there is no terminal to ask on; goals are {', '.join(GOALS)}")
    model = model or typer.prompt("Model (folder or hub id)")
    if not data:
        data = typer.prompt("Data (files or hub ids, with a space between them)").split()
        buffer = buffer or typer.prompt("Helpfulness pairs besides (Enter for none)", default="").split()
    section = ModelSection(path=model)
    with timed("looking at the model"):
        tokenizer, model_facts = _read_model(section)
    facts = _read_data(data, buffer, tokenizer, can_ask=can_ask)
    chosen = cast(Goal, goal or _ask_goal(facts))
    check_goal(chosen, facts)
    machine = _find_machine(cast(Device, device))
    choice = None
    if chosen != "redteam":
        choices = possible_choices(section, tokenizer, machine, facts.longest)
        choice = choose_trained(choices, machine)
        rows = [
            (
                way.name + (", recomputing activations" if way.checkpointing else ""),
                f"{way.total / 2**30:.1f}",
                f"{way.max_tokens:,}" if way.max_tokens else "none",
                "chosen" if way == choice else "",
            )
            for way in choices
        ]
        columns = ("trained", "GiB", "tokens at a time that fit", "")
        show_table(f"Memory at hand: {machine.memory / 2**30:.1f} GiB ({machine.note})", columns, rows)
    starter = write_starter(chosen, facts, model_facts, machine, choice, str(out))
    check_recipe(starter.content, TrainRecipe if starter.command == "train" else RedteamRecipe, str(out))
    write_text(out, render(starter, chosen))
    _show(starter, model_facts, out)


def render(starter: StarterRecipe, goal: Goal) -> str:
    """Return the text of a recipe: every key after a comment with its reasons, and the next steps at the top."""
    lines = [f"# Written by bfpo init for the goal {goal}: {GOALS[goal]}.", "#", "# Next:"]
    lines += [f"#   {step}" for step in starter.next_steps]
    lines += [f"# Note: {warning}" for warning in starter.warnings]
    for key, value in starter.content.items():
        lines += ["", *(f"# {reason}" for reason in starter.reasons[key]), dump_yaml({key: value}).rstrip()]
    return "\n".join(lines) + "\n"


def _read_model(section: ModelSection) -> tuple[PreTrainedTokenizerBase, ModelFacts]:
    path = str(section.path)
    if is_adapter(path):
        raise RecipeError(
            f"`model` '{path}' is an adapter; give its base model, or write model.path of a recipe yourself to train "
            "the adapter further (docs/training.md)"
        )
    tokenizer = load_tokenizer(section)
    model = empty_model(section)
    config = model.config.get_text_config()
    facts = ModelFacts(
        path=path,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        kind=config.model_type,
        has_template=tokenizer.chat_template is not None,
        max_positions=getattr(config, "max_position_embeddings", None),
        is_verified=config.model_type in VERIFIED,
    )
    if not facts.has_template:
        raise RecipeError(
            f"`model` '{path}' has no chat template; give a chat model, or a recipe with text.chat_template "
            "(docs/recipes.md)"
        )
    return tokenizer, facts


def _read_data(
    data: Sequence[str], buffer: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, can_ask: bool
) -> DataFacts:
    found = [find_source(text, can_ask=can_ask) for text in data]
    if any(source is None for source in found):
        if not all(source is None for source in found) or buffer:
            raise RecipeError("`data` has prompts without answers, and pairs; give one of both")
        return DataFacts([{"path": text} for text in data], has_pairs=False)
    sources = [source for source in found if source is not None]
    buffer_sources = []
    for text in buffer:
        if (source := find_source(text, can_ask=can_ask)) is None:
            raise RecipeError(f"`buffer` '{text}' has prompts without answers; a buffer needs pairs")
        buffer_sources.append(source)
    # What would stop a run is counted here, and the recipe says so.
    recipe = DataRecipe(data=sources, buffer=buffer_sources, max_dropped=0.999)
    prepared = prepare(recipe, log=say)
    show_sources(part.report for part in prepared.parts)
    return _describe(prepared, sources, buffer_sources, tokenizer)


def _describe(
    prepared: PreparedData,
    sources: Sequence[Source],
    buffer: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
) -> DataFacts:
    pairs = prepared.train
    encoder = Encoder(tokenizer, TextSection(max_length=_NO_LIMIT))
    report = SourceReport("all sources", Source(path="-"), taken=len(pairs))
    encoded, examples = encoder.encode(pairs, report)
    report.check_cap(0.999)
    lengths = np.array([[len(ids) for ids in (example.prompt_ids, *example.completions)] for example in examples])
    in_main = [pair for pair in encoded if pair.provenance.stream == "main"]
    in_buffer = [pair for pair in encoded if pair.provenance.stream == "buffer"]
    answer = int(np.median(lengths[:, 1:]))
    # With the targets of the beta that the recipe will have.
    show_cells(encoded, LabelingFunction.from_parameters(), choose_beta(answer)[0])
    show_cell_lengths(encoded)
    show_token_lengths(examples)
    return DataFacts(
        data=[source.model_dump(exclude_defaults=True) for source in sources],
        buffer=[source.model_dump(exclude_defaults=True) for source in buffer],
        cells=Counter(pair.cell or "unlabeled" for pair in in_main),
        buffer_pairs=len(in_buffer),
        unlabeled_buffer=sum(pair.labels is None for pair in in_buffer),
        dropped=max(
            part.report.dropped.total() / max(1, part.report.taken)
            + part.report.faulty.total() / max(1, part.report.read + part.report.faulty.total())
            for part in prepared.parts
        ),
        span=int(np.quantile(lengths[:, 0] + lengths[:, 1:].max(axis=1), 0.99)),
        longest=int(lengths.sum(axis=1).max()),
        answer=answer,
    )


def find_source(text: str, *, can_ask: bool) -> Source | None:
    """Return the source of a text `[ADAPTER:]PATH`, with the adapter that its rows need; None for prompts alone.

    Args:
        text: Source as on the command line.
        can_ask: Whether to ask for an adapter that isn't recognized.

    Raises:
        RecipeError: If the adapter isn't recognized, and can't be asked for.
        DataError: If the first row can't be read.
    """
    source = parse_source(text)
    if source.adapter != "pairs" or text.startswith("pairs:"):
        return source
    path = str(source.path)
    if path.endswith(".txt"):
        return None
    if adapter := published_as(path):
        split = PAIR_EXAMPLES[adapter].split
        return source.model_copy(update={"adapter": adapter, **({"split": split} if split else {})})
    row = next(iter(read_rows(source))).values
    fitting = recognize(row)
    if fitting == ["pairs"] and str(row["chosen"]).startswith("\n\nHuman:"):
        fitting = ["hh_rlhf"]
    if fitting:
        adapter = fitting[0]
    elif any(column in row for column in PROMPT_COLUMNS):
        return None
    elif can_ask:
        say(f"{path} has the columns {', '.join(map(str, row))}; adapters are {', '.join(ADAPTERS)}")
        adapter = typer.prompt("Adapter")
    else:
        raise RecipeError(
            f"`data` {path} has the columns {', '.join(map(str, row))}, which no adapter is recognized by; name it "
            "as ADAPTER:PATH (bfpo data adapters lists them), or write your own (docs/data.md)"
        )
    say(f"{path} is read by the adapter {adapter}")
    return parse_source(f"{adapter}:{path}")


def _ask_goal(facts: DataFacts) -> str:
    goals = possible_goals(facts)
    for goal in goals:
        say(f"  {goal}: {GOALS[goal]}")
    while (answer := typer.prompt("Goal", default=goals[0])) not in goals:
        say(f"'{answer}' is not one of {', '.join(goals)}")
    return str(answer)


def _find_machine(device: Device) -> Machine:
    has_gpu = torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not has_gpu):
        return Machine(False, float(psutil.virtual_memory().available), "free memory of this machine")
    if has_gpu:
        free, _ = torch.cuda.mem_get_info()
        return Machine(True, float(free), f"free on {torch.cuda.get_device_name()}")
    return Machine(True, _ASSUMED_GPU, "assumed: no GPU here; plan others with bfpo train --plan")


def _show(starter: StarterRecipe, model: ModelFacts, out: Path) -> None:
    rows: list[tuple[str, Any]] = [
        (key, reason) for key, reasons in starter.reasons.items() for reason in reasons if reason
    ]
    say("\nWhat was chosen, and why")
    for key, reason in rows:
        say(f"  {key}: {reason}")
    if not model.is_verified:
        say(f"  layout: packed rows aren't tested with {model.kind}; a run checks them first (docs/training.md)")
    for warning in starter.warnings:
        warn(warning)
    say(f"\nwrote {out}; next:")
    for step in starter.next_steps:
        say(f"  {step}")
