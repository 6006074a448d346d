"""The commands `bfpo data inspect`, `bfpo data prepare`, `bfpo data degrade` and `bfpo data adapters`."""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from bfpo.config.loading import check_recipe, read_recipe
from bfpo.config.recipes import DataRecipe, Source, TextSection, TrainRecipe
from bfpo.core.files import check_own_files, is_among, write_json, write_jsonl
from bfpo.core.pairs import PreferencePair
from bfpo.core.terminal import say, show_table, timed
from bfpo.data.adapters import ADAPTERS, DEMONSTRATIONS, parse_source
from bfpo.data.degrade import graded_pairs
from bfpo.data.examples import DEMONSTRATION_EXAMPLES, PAIR_EXAMPLES, AdapterExample
from bfpo.data.inspect import (
    show_cell_lengths,
    show_cells,
    show_markers,
    show_pairs,
    show_parts,
    show_scores,
    show_sources,
    show_text_lengths,
    show_token_lengths,
)
from bfpo.data.load import SourceReport, load_pairs
from bfpo.data.prepare import prepare, write_prepared
from bfpo.data.scan import MAX_HELD
from bfpo.data.stored_pairs import chain_pairs
from bfpo.errors import DataError, RecipeError, did_you_mean
from bfpo.losses.labeling import LabelingFunction

# Lengths are shown before truncation.
_NO_LIMIT = 10**9


def inspect_sources(
    sources: list[str],
    *,
    tokenizer: str | None,
    max_length: int,
    examples: int,
    show_tokens: bool = False,
    limit: int | None,
) -> None:
    """Print tables that describe data.

    Args:
        sources: One recipe, or sources of the form `[ADAPTER:]PATH`.
        tokenizer: Folder or hub id of a tokenizer; None to show lengths in words.
        max_length: Limit in tokens at which truncation is shown, unless a recipe has one.
        examples: Number of pairs to show.
        show_tokens: Whether to show the tokens of these pairs, and which of them are scored.
        limit: Maximum number of pairs from each source.

    Raises:
        RecipeError: If a recipe is combined with other sources, or an adapter is unknown.
        DataError: If the data are malformed.
    """
    labeling: LabelingFunction | None = LabelingFunction.from_parameters()
    beta = 0.01
    if any(_is_recipe(source) for source in sources):
        if len(sources) > 1:
            raise RecipeError("give one recipe, or data sources, not both")
        recipe = read_data_recipe(Path(sources[0]), [])
        if isinstance(recipe, TrainRecipe):
            labeling, beta = _labeling_of(recipe)
    else:
        # A high share of faults doesn't stop an inspection: the tables show it.
        text = TextSection(max_length=max_length)
        recipe = DataRecipe(data=[parse_source(source) for source in sources], text=text, max_dropped=0.999)
    prepared = prepare(recipe, limit=limit)
    show_sources(part.report for part in prepared.parts)
    pairs = [*prepared.train, *prepared.eval]
    show_cells(pairs, labeling, beta)
    show_cell_lengths(pairs)
    show_scores(pairs)
    show_markers(pairs)
    show_parts(pairs)
    if tokenizer is None:
        show_text_lengths(pairs)
        say("--tokenizer shows the lengths in tokens")
    else:
        _show_tokens(pairs, tokenizer, recipe.text, examples if show_tokens else 0)
    show_pairs(pairs, examples)


def prepare_recipe(path: Path, overrides: list[str], out: Path, *, limit: int | None) -> None:
    """Prepare the data of a recipe and write them into a folder; see `write_prepared`."""
    recipe = read_data_recipe(path, overrides)
    # What is known of the rows is kept until the end, so that a killed command goes on from there.
    unfinished = out / ".unfinished"
    is_own = unfinished.exists() or (out / "data_manifest.json").exists()
    check_own_files(out, ("pairs.jsonl", "eval.jsonl"), "bfpo data prepare", is_own=is_own)
    prepared = prepare(recipe, limit=limit, log=say, cache=unfinished, max_held=MAX_HELD)
    show_sources(part.report for part in prepared.parts)
    labeling, beta = _labeling_of(recipe) if isinstance(recipe, TrainRecipe) else (None, 1.0)
    show_cells(chain_pairs([prepared.train, prepared.eval]), labeling, beta)
    _check_not_read(out, [part.report for part in prepared.parts])
    unfinished.mkdir(parents=True, exist_ok=True)
    with timed("writing the pairs"):
        paths = write_prepared(prepared, out)
    shutil.rmtree(unfinished, ignore_errors=True)
    say(f"\nwrote {', '.join(map(str, paths))}")
    lines = [f"data: [{{path: {out / 'pairs.jsonl'}}}]"]
    if prepared.eval:
        lines.append(f"eval: [{{path: {out / 'eval.jsonl'}}}]")
    say("use in a recipe instead of data, buffer, eval and holdout:")
    for line in lines:
        say(f"  {line}")


def _check_not_read(out: Path, reports: Iterable[SourceReport]) -> None:
    """Check that no file that is about to be written is a source.

    Raises:
        RecipeError: If one is.
    """
    sources = [file for report in reports for file in report.files]
    for name in ("pairs.jsonl", "eval.jsonl"):
        if is_among(out / name, sources):
            raise RecipeError(f"`out` is {out}, whose {name} is a source; name another folder")


def degrade_source(source: str, out: Path, *, versions: int, limit: int | None) -> None:
    """Write graded pairs of the safe chosen answers of a source, and counts: `pairs.jsonl` and `degrade.json`.

    Args:
        source: Source of the form `[ADAPTER:]PATH`.
        out: Output folder.
        versions: Number of degraded versions of an answer.
        limit: Maximum number of pairs that are read.

    Raises:
        DataError: If the data are malformed, or no answer can be degraded.
    """
    check_own_files(out, ("pairs.jsonl",), "bfpo data degrade", is_own=(out / "degrade.json").exists())
    report, pairs = load_pairs(parse_source(source), "main", limit=limit)
    _check_not_read(out, [report])
    outcomes: Counter[str] = Counter()
    graded = list(graded_pairs(pairs, versions, outcomes))
    show_table(f"Chosen answers of {report.name}", ("outcome", "answers"), outcomes.most_common())
    if not graded:
        raise DataError(
            f"{report.name}: no answer can be degraded ({dict(outcomes)}); it needs chosen answers that are labeled "
            "safe, are plain texts and have more key words than versions"
        )
    write_jsonl(out / "pairs.jsonl", (pair.to_row() for pair in graded))
    content = {"schema": 1, "source": source, "files": report.files, "versions": versions, "answers": dict(outcomes)}
    write_json(out / "degrade.json", content | {"skipped_rows": dict(report.skipped), "pairs": len(graded)})
    say(f"wrote {len(graded):,} pairs to {out / 'pairs.jsonl'}; train with them and the others, and loss.graded=true")


def show_adapters(name: str | None) -> None:
    """Print the adapters with the columns that they need, or the example rows of one, one JSON object a line.

    Args:
        name: Adapter whose example is printed; None for all of them.

    Raises:
        RecipeError: If there is no such adapter.
    """
    if name is not None:
        examples = DEMONSTRATION_EXAMPLES | PAIR_EXAMPLES
        if name not in examples:
            raise RecipeError(f"`show` is '{name}'; {did_you_mean(name, list(examples))}")
        for row in examples[name].rows:
            say(json.dumps(row, ensure_ascii=False))
        return
    pair_licenses = {adapter: entry.license for adapter, entry in ADAPTERS.items()}
    say("Pairs, for `bfpo train` and every command that reads pairs")
    _list_adapters(PAIR_EXAMPLES, pair_licenses)
    say("\nOne answer to a prompt, for `bfpo sft`")
    _list_adapters(DEMONSTRATION_EXAMPLES, {adapter: license for adapter, (_, license) in DEMONSTRATIONS.items()})
    say("\nan example: bfpo data adapters --show NAME; your own adapter: module:function (docs/data.md)")


def _list_adapters(examples: Mapping[str, AdapterExample], licenses: Mapping[str, str]) -> None:
    for adapter, example in examples.items():
        origin = ", ".join(text for text in (example.hub, licenses[adapter]) if text)
        say(f"  {adapter}{f' ({origin})' if origin else ''}")
        optional = f"; if present {', '.join(example.optional)}" if example.optional else ""
        say(f"      {', '.join(example.columns)}{optional}")


def read_data_recipe(path: Path, overrides: list[str]) -> DataRecipe:
    """Read a recipe for training, or one with only the data sections.

    Raises:
        RecipeError: If a key or a value is wrong.
    """
    content = read_recipe(path, overrides)
    return check_recipe(content, TrainRecipe if "model" in content else DataRecipe, str(path))


def _labeling_of(recipe: TrainRecipe) -> tuple[LabelingFunction | None, float]:
    from bfpo.losses.build import make_loss
    from bfpo.losses.pairwise import BFPO

    loss = make_loss(recipe.loss.model_dump())
    return (loss.labeling if isinstance(loss, BFPO) else None), loss.beta


def _is_recipe(source: str) -> bool:
    return source.endswith((".yaml", ".yml"))


def _show_tokens(pairs: list[PreferencePair], tokenizer: str, text: TextSection, num_shown: int) -> None:
    from bfpo.config.recipes import ModelSection
    from bfpo.data.decode import shown_tokens
    from bfpo.data.tokenize import Encoder, check_special_tokens
    from bfpo.model.load import load_tokenizer

    loaded = load_tokenizer(ModelSection(path=tokenizer))
    report = SourceReport("all sources", Source(path=tokenizer))
    encoder = Encoder(loaded, text.model_copy(update={"max_length": _NO_LIMIT}))
    encoded_pairs, examples = encoder.encode(pairs, report)
    check_special_tokens(examples, loaded)
    if len(encoded_pairs) < len(pairs) or report.noted:
        show_sources([report])
    show_token_lengths(examples, text.max_length)
    if num_shown:
        say(f"\nreasoning: {encoder.format.describe_reasoning()}")
    for row in _first_of_each_cell(encoded_pairs)[:num_shown]:
        say(f"\ntokens of row {encoded_pairs[row].row_id}, unscored ones in brackets")
        for name, tokens in shown_tokens(examples[row], loaded).items():
            say(f"  {name:<10} {tokens}")


def _first_of_each_cell(pairs: list[PreferencePair]) -> list[int]:
    first = {pair.cell: row for row, pair in reversed(list(enumerate(pairs)))}
    return sorted(first.values())
