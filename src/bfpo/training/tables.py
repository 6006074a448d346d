"""Tokenized tables of the data of a preference run: in memory, or of large data in the cache."""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from bfpo.config.recipes import TrainRecipe
from bfpo.core.pairs import SIDES, PreferencePair
from bfpo.core.terminal import progress, say
from bfpo.data.clean import count_reasons
from bfpo.data.decode import decoded_sample
from bfpo.data.facts import LABELS
from bfpo.data.load import Reason
from bfpo.data.prepare import Pairs, PreparedData, require_labels
from bfpo.data.score_labels import margins_of, score_margins
from bfpo.data.stored_pairs import StoredPairs, tally
from bfpo.data.table import Example, PairTable, pair_table, sampled_rows, table_of_columns
from bfpo.data.token_files import TokenizedPairs, tokenize_stored
from bfpo.data.tokenize import Encoder, check_special_tokens
from bfpo.errors import DataError
from bfpo.losses.dual import Dual
from bfpo.losses.pairwise import PairLoss
from bfpo.training.encode import require_categories, require_signals, trained_categories

_NO_SCORES = "safety: scores needs chosen_safety_score and rejected_safety_score for every pair"


class Tables(NamedTuple):
    """Tokenized data of a run.

    Args:
        train: Training pairs of both streams.
        eval: Evaluation pairs, by stream.
        samples: A few decoded training pairs, to be shown.
    """

    train: PairTable
    eval: dict[str, PairTable]
    samples: list[dict[str, str]]


def remove_untrained(prepared: PreparedData, loss: PairLoss) -> None:
    """Remove the pairs that a loss doesn't train on, and count them.

    Raises:
        DataError: If pairs are unlabeled, or no pairs of the main stream are left.
    """
    require_labels(prepared.train)
    require_labels(prepared.eval)
    reason = f"{type(loss).__name__} doesn't train on this cell"
    is_trained = np.array([labels is not None and loss.keeps(labels) for labels in (*LABELS, None)])

    def trained(pairs: Pairs, counts: Counter[Reason]) -> Pairs:
        if isinstance(pairs, StoredPairs):
            kept = is_trained[pairs.cells]
            count_reasons(counts, (reason,), ~kept, pairs.cells)
            return pairs.take(kept)
        counts.update(Reason(reason, pair.cell) for pair in pairs if pair.labels and not loss.keeps(pair.labels))
        return [pair for pair in pairs if pair.labels and loss.keeps(pair.labels)]

    for part in prepared.parts:
        part.train, part.eval = (trained(pairs, part.report.removed) for pairs in (part.train, part.eval))
    if not any(kind.stream == "main" for kind in tally(prepared.train)):
        raise DataError("no pairs of the main stream are left to train on")


def tokenize_pairs(
    recipe: TrainRecipe,
    prepared: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    loss: PairLoss,
    *,
    cache: Path | None,
    clock: datetime | None = None,
    dual: Dual | None = None,
) -> Tables:
    """Tokenize all pairs, or read them from the cache; pairs that don't fit are dropped and counted.

    Args:
        recipe: Recipe of the run.
        prepared: Cleaned pairs; dropped ones are removed from them.
        tokenizer: Tokenizer of the start model.
        loss: Loss to train with.
        cache: Folder of cached token ids; None to not use it.
        clock: Time that the chat template sees; None for the current time.
        dual: Constraint whose multiplier combines the scores of the pairs; None if the loss doesn't need them.

    Returns:
        Tables; the evaluation tables are named `main` and `buffer`.

    Raises:
        DataError: If more pairs would be dropped than the recipe allows, or pairs lack a column.
    """
    encoder = Encoder(tokenizer, recipe.text, cache, clock)
    if any(isinstance(pairs, StoredPairs) for part in prepared.parts for pairs in (part.train, part.eval)):
        return _stored_tables(recipe, prepared, encoder, loss, dual)
    train: tuple[list[PreferencePair], list[Example]] = ([], [])
    held_out: tuple[list[PreferencePair], list[Example]] = ([], [])
    with progress("tokenizing", len(prepared.train) + len(prepared.eval)) as advance:
        for part in prepared.parts:
            part.train, train_examples = encoder.encode(part.train, part.report, advance)
            part.eval, eval_examples = encoder.encode(part.eval, part.report, advance)
            for (all_pairs, all_examples), pairs, examples in (
                (train, part.train, train_examples),
                (held_out, part.eval, eval_examples),
            ):
                all_pairs += pairs
                all_examples += examples
            part.report.check_cap(recipe.max_dropped)
    train_pairs, train_examples = train
    check_special_tokens(train_examples, tokenizer)
    samples = [decoded_sample(example, tokenizer) for example in train_examples[:3]]
    use_scores = recipe.safety == "scores"
    if use_scores and any(pair.signals.chosen_safety_score is None for pair in (*train_pairs, *held_out[0])):
        raise DataError(_NO_SCORES)

    categories = trained_categories(train_pairs, loss)

    def as_table(examples: Sequence[Example], pairs: Sequence[PreferencePair]) -> PairTable:
        margins = None if dual is None else score_margins(pairs, dual)
        return pair_table(examples, pairs, use_scores=use_scores, score_margins=margins, categories=categories)

    table = as_table(train_examples, train_pairs)
    eval_tables = _evaluation_tables(*held_out, max_eval=recipe.max_eval, as_table=as_table)
    for checked in (table, *eval_tables.values()):
        require_signals(checked, loss)
    return Tables(table, eval_tables, samples)


def _stored_tables(
    recipe: TrainRecipe, prepared: PreparedData, encoder: Encoder, loss: PairLoss, dual: Dual | None
) -> Tables:
    """Return the tables of `tokenize_pairs` for data that aren't held; their token ids stay on disk."""
    state = PartialState()
    share = (state.process_index, state.num_processes)
    with progress("tokenizing", len(prepared.train) + len(prepared.eval)) as advance:
        train, held_out = (
            tokenize_stored(encoder, sources, share=share, advance=advance)
            for sources in (
                [(part.train, part.report) for part in prepared.parts],
                [(part.eval, part.report) for part in prepared.parts],
            )
        )
    for part, kept, kept_eval in zip(prepared.parts, train.kept, held_out.kept, strict=True):
        part.train, part.eval = _select(part.train, kept), _select(part.eval, kept_eval)
        part.report.check_cap(recipe.max_dropped)
    use_scores = recipe.safety == "scores"
    scores = (part.columns.signal("chosen_safety_score") for part in (train, held_out))
    if use_scores and any(np.isnan(values).any() for values in scores):
        raise DataError(_NO_SCORES)
    categories = require_categories(train.columns.harm_categories, loss)

    def as_table(tokens: TokenizedPairs) -> PairTable:
        columns = tokens.columns
        margins = None
        if dual is not None:
            rewards, costs = (
                np.stack([columns.signal(f"{side}_{name}") for side in SIDES], axis=1) for name in ("reward", "cost")
            )
            margins = margins_of(rewards, costs, dual)
        return table_of_columns(
            tokens.ids,
            tokens.bounds,
            columns,
            use_scores=use_scores,
            score_margins=margins,
            categories=categories,
        )

    table = as_table(train)
    first = [table[row] for row in range(min(3, len(table)))]
    check_special_tokens(first, encoder.tokenizer)
    eval_tables = {}
    for stream, in_stream in (("main", ~held_out.columns.is_buffer), ("buffer", held_out.columns.is_buffer)):
        rows = _evaluated(np.flatnonzero(in_stream).tolist(), recipe.max_eval, stream)
        if rows:
            eval_tables[stream] = as_table(held_out.take(rows))
    for checked in (table, *eval_tables.values()):
        require_signals(checked, loss)
    return Tables(table, eval_tables, [decoded_sample(example, encoder.tokenizer) for example in first])


def _select(pairs: Pairs, kept: NDArray[np.bool_]) -> Pairs:
    if isinstance(pairs, StoredPairs):
        return pairs.take(kept)
    return [pairs[row] for row in np.flatnonzero(kept)]


def _evaluated(in_stream: list[int], max_eval: int | None, stream: str) -> list[int]:
    """Return the rows of a stream that are evaluated, and say so if they are a sample."""
    rows = sampled_rows(in_stream, max_eval)
    if len(rows) < len(in_stream):
        say(f"evaluating on a sample of {len(rows):,} of {len(in_stream):,} {stream} pairs (max_eval)")
    return rows


def _evaluation_tables(
    pairs: Sequence[PreferencePair],
    examples: Sequence[Example],
    *,
    max_eval: int | None,
    as_table: Callable[[Sequence[Example], Sequence[PreferencePair]], PairTable],
) -> dict[str, PairTable]:
    tables = {}
    for stream in ("main", "buffer"):
        in_stream = [row for row, pair in enumerate(pairs) if pair.provenance.stream == stream]
        rows = _evaluated(in_stream, max_eval, stream)
        if rows:
            tables[stream] = as_table([examples[row] for row in rows], [pairs[row] for row in rows])
    return tables
