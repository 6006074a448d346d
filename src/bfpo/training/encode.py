"""Tokenizing data given in Python: preference pairs or rows of a data set to tables.

Data of recipes are tokenized by `bfpo.training.run` and `bfpo.training.run_sft`, which count what is dropped. Here no
recipe allows dropping, so a row that doesn't fit is an error.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from bfpo.config.recipes import Source, TextSection
from bfpo.core.pairs import Demonstration, PreferencePair
from bfpo.data.load import SourceReport
from bfpo.data.pair_formats import read_demonstration, read_pair
from bfpo.data.prepare import require_labels
from bfpo.data.rows import SourceRow, without_padding
from bfpo.data.table import Example, PairTable, TokenTable, harm_categories, pair_table, token_table
from bfpo.data.tokenize import Encoder, check_special_tokens
from bfpo.errors import DataError
from bfpo.losses.pairwise import PairLoss

logger = logging.getLogger(__name__)

Value = TypeVar("Value", PreferencePair, Demonstration)
Pairs = Iterable[PreferencePair | Mapping[str, Any]]
Demonstrations = Iterable[Demonstration | Mapping[str, Any]]


def as_pairs(rows: Pairs, name: str) -> list[PreferencePair]:
    """Return labeled preference pairs from pairs, or from rows with the columns of a pair file.

    Args:
        rows: Pairs or rows, such as those of a `datasets.Dataset`.
        name: Name of the data set, for messages.

    Raises:
        DataError: If a row is malformed or unlabeled; the message names it.
        TypeError: If the rows are neither pairs nor mappings.
    """
    columns = "prompt, chosen, rejected, is_chosen_safe and is_rejected_safe"
    pairs = _as_values(rows, name, PreferencePair, read_pair, columns)
    for number, pair in enumerate(pairs, start=1):
        if pair.labels is None:
            raise DataError(
                f"{name} row {number} has no safety labels; add the columns is_chosen_safe and is_rejected_safe"
            )
    return pairs


def as_demonstrations(rows: Demonstrations, name: str) -> list[Demonstration]:
    """Return demonstrations from demonstrations, or from rows with `prompt` and `completion`, or `messages`.

    Args:
        rows: Demonstrations or rows, such as those of a `datasets.Dataset`.
        name: Name of the data set, for messages.

    Raises:
        DataError: If a row is malformed; the message names it.
        TypeError: If the rows are neither demonstrations nor mappings.
    """
    return _as_values(rows, name, Demonstration, read_demonstration, "prompt and completion, or messages")


def _as_values(
    rows: Iterable[Any], name: str, value_type: type[Value], read: Callable[[SourceRow], Value], columns: str
) -> list[Value]:
    if not isinstance(rows, Iterable) or isinstance(rows, str | bytes | Mapping):
        raise TypeError(
            f"{name} is a {type(rows).__name__}; expected a data set or a list of rows with the columns {columns}"
        )
    is_table = not isinstance(rows, list | tuple)
    values = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, value_type):
            values.append(row)
        elif isinstance(row, Mapping):
            where = f"{name} row {number}"
            try:
                # A data set gives every object the keys of all of them.
                values.append(read(SourceRow(without_padding(row) if is_table else row, where)))
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
        else:
            raise TypeError(
                f"{name} row {number} is a {type(row).__name__}; expected a {value_type.__name__}, or a dict with "
                f"the columns {columns}"
            )
    return values


def named_datasets(eval_dataset: Any) -> dict[str, Any]:
    """Return evaluation data sets by name; a single one is named ""."""
    if eval_dataset is None:
        return {}
    return dict(eval_dataset) if isinstance(eval_dataset, Mapping) else {"": eval_dataset}


def as_buffer(pair: PreferencePair) -> PreferencePair:
    """Return the pair as one of the buffer stream."""
    return replace(pair, provenance=replace(pair.provenance, stream="buffer"))


def encode_pairs(
    pairs: Sequence[PreferencePair],
    loss: PairLoss,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSection | None = None,
    categories: Sequence[str] | None = None,
    row_names: Sequence[str] | None = None,
) -> PairTable:
    """Tokenize labeled pairs; pairs that the loss doesn't train on are left out, and truncation is logged.

    Args:
        pairs: Pairs of both streams.
        loss: Loss to train with.
        tokenizer: Tokenizer with a chat template.
        text: Maximum length, truncation and chat template.
        categories: Harm categories that the loss distinguishes; None for those of the pairs.
        row_names: Name of each pair for messages; None to number them.

    Raises:
        DataError: If a pair is unlabeled or doesn't fit, no pairs are left, or none has a category and the loss needs
            them.
    """
    require_labels(pairs)
    names = numbered("pairs", len(pairs)) if row_names is None else row_names
    trained = {
        name: pair
        for name, pair in zip(names, pairs, strict=True)
        if pair.labels is not None and loss.keeps(pair.labels)
    }
    if len(trained) < len(pairs):
        logger.warning("%s leaves out %d of %d pairs", type(loss).__name__, len(pairs) - len(trained), len(pairs))
    encoded, examples = _encode(trained, tokenizer, text, "pairs")
    return pair_table(
        examples, encoded, categories=trained_categories(encoded, loss) if categories is None else categories
    )


def encode_demonstrations(
    demonstrations: Sequence[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    text: TextSection | None = None,
    name: str = "demonstrations",
) -> TokenTable:
    """Tokenize demonstrations; truncation is logged.

    Args:
        demonstrations: Prompts with the completions to imitate.
        tokenizer: Tokenizer with a chat template.
        text: Maximum length, truncation and chat template.
        name: Name of the data set, for messages.

    Raises:
        DataError: If a demonstration doesn't fit, or there are none.
    """
    named = dict(zip(numbered(name, len(demonstrations)), demonstrations, strict=True))
    encoded, examples = _encode(named, tokenizer, text, "completions")
    return token_table(examples, [demonstration.row_id for demonstration in encoded])


def numbered(name: str, count: int) -> list[str]:
    """Return the names of a data set's rows, for messages."""
    return [f"{name} row {number}" for number in range(1, count + 1)]


def _encode(
    values: Mapping[str, Value], tokenizer: PreTrainedTokenizerBase, text: TextSection | None, name: str
) -> tuple[list[Value], list[Example]]:
    text = text or TextSection()
    report = SourceReport(name, Source(path="-"), taken=len(values))
    encoded, examples = Encoder(tokenizer, text).encode(list(values.values()), report)
    if len(encoded) < len(values):
        kept = set(map(id, encoded))
        row = next(row for row, value in values.items() if id(value) not in kept)
        reasons = ", ".join(sorted({reason.text for reason in report.dropped}))
        raise DataError(
            f"{row} can't be encoded in {text.max_length} tokens, as {len(values) - len(encoded)} of {len(values)} "
            f"{name} ({reasons}); shorten or remove them, or pass text=TextSection(max_length=...)"
        )
    report.check_cap(0.0)
    if not encoded:
        raise DataError(f"there are no {name} to train on")
    notes: Counter[str] = Counter()
    for reason, count in report.noted.items():
        notes[reason.text] += count
    for note, count in notes.items():
        logger.warning("%d of %d %s: %s (text.max_length: %d)", count, len(values), name, note, text.max_length)
    check_special_tokens(examples, tokenizer)
    return encoded, examples


def trained_categories(pairs: Sequence[PreferencePair], loss: PairLoss) -> tuple[str, ...]:
    """Return the names of the harm categories of pairs; none if the loss doesn't distinguish them.

    Raises:
        DataError: If the loss does, and no pair has one.
    """
    return require_categories(harm_categories(pairs), loss) if "categories" in loss.needs else ()


def require_categories(names: tuple[str, ...], loss: PairLoss) -> tuple[str, ...]:
    """Return the harm categories of pairs if the loss distinguishes them; else none.

    Raises:
        DataError: If the loss does, and there are none.
    """
    if "categories" not in loss.needs:
        return ()
    if not names:
        raise DataError(
            f"{type(loss).__name__} needs pairs with `harm_categories`, and no pair has any; add the column to the "
            "data, or choose another loss"
        )
    return names


def require_signals(table: PairTable, loss: PairLoss) -> None:
    """Check that every pair has the columns that the loss needs.

    Raises:
        DataError: If a column is missing; the message names it.
    """
    missing = [name for name in loss.needs if name not in table.signals]
    if missing:
        raise DataError(
            f"{type(loss).__name__} needs {' and '.join(missing)} for every pair of both streams, and some pairs "
            "have no such value; add the columns to the data, or choose another loss"
        )
