"""Adapters: how the rows of a data set are converted into preference pairs.

An adapter is a function from a row to a pair, and an entry of `ADAPTERS`. A custom adapter needs no entry: a recipe
names it as `module:function`. The function raises `SkipRow` for a row without a pair, which is counted, and
`DataError` for a malformed row, which stops the run.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bfpo.config.recipes import Source
from bfpo.core.chain import STEPS
from bfpo.core.imports import import_object
from bfpo.core.pairs import Demonstration, PreferencePair
from bfpo.data import agent_sets, guided_answers, published_sets
from bfpo.data.pair_formats import SkipRow, read_demonstration, read_pair_rows
from bfpo.data.rows import MissingColumn, SourceRow
from bfpo.errors import DataError, RecipeError, did_you_mean

PairReader = Callable[[Iterable[SourceRow], Source], Iterator[PreferencePair | SkipRow]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """How to read one kind of data set.

    Args:
        read: Function from rows and their source to pairs; a `SkipRow` stands for a row without a pair.
        license: License of the data; "" if unknown.
        note: Caution for users who train on the data.
        columns: Columns by which rows of this kind are recognized.
    """

    read: PairReader
    license: str = ""
    note: str = ""
    columns: tuple[str, ...] = ()


def read_pairs(adapter: Adapter, rows: Iterable[SourceRow], source: Source) -> Iterator[PreferencePair | SkipRow]:
    """Yield the pairs of rows, and a `SkipRow` for each row without a pair.

    Args:
        adapter: Adapter of the source.
        rows: Raw rows.
        source: Source of the rows.

    Raises:
        DataError: If a row is malformed; if it lacks a column, the message says how such rows can be read.
    """
    try:
        yield from adapter.read(rows, source)
    except MissingColumn as error:
        raise DataError(f"{error}; {_how_to_read(error.columns, source.adapter)}") from None


def find_adapter(name: str) -> Adapter:
    """Return an adapter by its name.

    Args:
        name: Key of `ADAPTERS`, or `module:function` of a function from a row to a pair.

    Raises:
        RecipeError: If it is unknown or can't be imported.
    """
    if ":" in name:
        return _custom_adapter(name)
    if name not in ADAPTERS and name in DEMONSTRATIONS:
        raise RecipeError(f"adapter '{name}' reads one answer to a prompt, for `bfpo sft`; expected pairs of answers")
    if name not in ADAPTERS:
        raise RecipeError(f"adapter is '{name}'; {did_you_mean(name, list(ADAPTERS))}, or 'module:function'")
    return ADAPTERS[name]


def parse_source(text: str) -> Source:
    """Return the source that `[ADAPTER:]PATH` names; a custom adapter is `module:function:PATH`.

    Raises:
        RecipeError: If the adapter is unknown and there is no file of this name.
    """
    name, colon, path = text.partition(":")
    if not colon:
        return Source(path=text)
    if name in ADAPTERS:
        return Source(adapter=name, path=path)
    if Path(text).exists():
        return Source(path=text)
    function, colon, path = path.partition(":")
    if colon:
        return Source(adapter=f"{name}:{function}", path=path)
    known = ", ".join(sorted(ADAPTERS))
    raise RecipeError(f"source '{text}': '{name}' is not an adapter; known: {known}, or module:function:PATH")


def _each_row(convert: Callable[[SourceRow], PreferencePair]) -> PairReader:
    def read(rows: Iterable[SourceRow], source: Source) -> Iterator[PreferencePair | SkipRow]:
        for row in rows:
            pair: PreferencePair | SkipRow
            with row.locate_errors():
                try:
                    pair = convert(row)
                except SkipRow as skip:
                    pair = skip
            yield pair

    return read


def _custom_adapter(path: str) -> Adapter:
    function = import_object(path, "adapter")
    if not callable(function):
        raise RecipeError(f"adapter is '{path}', which is not a function")

    def convert(row: SourceRow) -> PreferencePair:
        pair = function(row)
        if not isinstance(pair, PreferencePair):
            raise DataError(f"adapter '{path}' returned {pair!r}; expected a PreferencePair")
        return pair

    return Adapter(_each_row(convert))


def recognize(columns: Collection[str]) -> list[str]:
    """Return the adapters of pairs whose rows have these columns, in the order of `ADAPTERS`."""
    return [name for name, adapter in ADAPTERS.items() if adapter.columns and {*adapter.columns} <= {*columns}]


def _how_to_read(columns: Collection[str], adapter: str) -> str:
    """Return a hint how rows with these columns can be read."""
    if other := next((name for name in recognize(columns) if name != adapter), None):
        return f"adapter '{other}' reads such rows: `adapter: {other}` in a recipe, {other}:PATH on the command line"
    return "to rename columns, set `columns: {OURS: THEIRS}` of the source in a recipe"


NON_COMMERCIAL = "CC-BY-NC-4.0"

ADAPTERS: dict[str, Adapter] = {
    "pairs": Adapter(read_pair_rows, columns=("chosen", "rejected")),
    "ultrafeedback": Adapter(
        _each_row(published_sets.read_ultrafeedback), "MIT", "safety labels are assumed, not annotated"
    ),
    "pku_saferlhf": Adapter(
        _each_row(published_sets.read_pku_saferlhf),
        NON_COMMERCIAL,
        columns=("response_0", "response_1", "better_response_id"),
    ),
    "pku_saferlhf_by_safety": Adapter(
        _each_row(published_sets.read_pku_by_safety), NON_COMMERCIAL, "'chosen' is the safer answer"
    ),
    "pku_saferlhf_safe_first": Adapter(
        _each_row(published_sets.read_pku_safe_first),
        NON_COMMERCIAL,
        "'chosen' is the safer answer, unless both are safe",
    ),
    "hh_rlhf": Adapter(
        _each_row(published_sets.read_hh_rlhf),
        "MIT",
        "the harmless subsets are ordered by harmlessness, so 'chosen' isn't the more helpful one",
    ),
    "bfpo_redteam": Adapter(
        _each_row(published_sets.read_bfpo_redteam),
        "none stated",
        columns=("modeloutput1", "modeloutput2", "better_modelout"),
    ),
    "xstest_completions": Adapter(
        published_sets.pair_xstest_completions,
        "CC-BY-4.0 (prompts), the models' own (completions)",
        columns=("completion", "final_label"),
    ),
    "alpaca_eval": Adapter(
        _each_row(published_sets.read_alpaca_eval),
        NON_COMMERCIAL,
        "safety labels are assumed, not annotated",
        columns=("output_1", "output_2", "preference"),
    ),
    "atbench": Adapter(
        agent_sets.pair_trajectories,
        "Apache-2.0",
        "'chosen' is the safe trajectory, which isn't always the more helpful one",
        columns=("tool_used", "contents", "label"),
    ),
}

# How rows are converted into demonstrations where they aren't pairs, and the license of the data.
DEMONSTRATIONS: dict[str, tuple[Callable[[SourceRow], Demonstration], str]] = {
    "demonstrations": (read_demonstration, ""),
    "pku_safer": (published_sets.read_safer_response, NON_COMMERCIAL),
    "agent_align": (agent_sets.read_agent_align, "Apache-2.0; ToolACE and Glaive: their own"),
    "atbench": (agent_sets.read_safe_trajectory, "Apache-2.0"),
    guided_answers.ADAPTER: (guided_answers.read_guided_answer, ""),
    **{
        guided_answers.step_adapter(step): (partial(guided_answers.read_guided_step, step=step), "") for step in STEPS
    },
}
