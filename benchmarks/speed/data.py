"""Pairs to step on: real ones from local files, and synthetic ones with the lengths of sets that are not at hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bfpo.config.recipes import Source, TextSection
from bfpo.core.pairs import Message, PreferencePair, Provenance, SafetyLabels
from bfpo.data.load import load_pairs
from bfpo.data.table import Example, PairTable, pair_table
from bfpo.data.tokenize import Encoder
from bfpo.model.new import new_tokenizer

VOCABULARY = 8192
MAX_LENGTH = 1024

REAL: dict[str, dict[str, Any]] = {
    "hh": {"path": "hh_harmless/*.jsonl.gz", "adapter": "hh_rlhf", "assume_safe": True},
    "xstest": {"path": "xstest/completions_*.csv", "adapter": "xstest_completions"},
    "alpaca": {"path": "alpaca_eval/*.jsonl.gz", "adapter": "alpaca_eval"},
}


class LogNormal(NamedTuple):
    """Distribution of a length, in tokens."""

    median: float
    sigma: float


class Profile(NamedTuple):
    """Lengths of a set's prompts and answers."""

    prompt: LogNormal
    chosen: LogNormal
    rejected: LogNormal


# Assumed, not measured: neither set can be downloaded here. The means of the first (148, 332 and 278 tokens) agree
# with the size that its card states, 6.6 kB a row, at 4.3 bytes a token; those of the second (23, 90 and 90) are
# those of short questions with answers of a paragraph.
PROFILES = {
    "ultrafeedback": Profile(LogNormal(90, 1.0), LogNormal(260, 0.7), LogNormal(210, 0.75)),
    "pku": Profile(LogNormal(20, 0.5), LogNormal(70, 0.7), LogNormal(70, 0.7)),
}


def make_pairs(name: str, folder: Path, *, count: int, seed: int) -> PairTable:
    """Return a seeded random sample of tokenized pairs, in random order.

    Args:
        name: A key of `REAL` or `PROFILES`.
        folder: Where the real data are.
        count: Number of pairs.
        seed: Of the sample, the order, and all that is drawn.
    """
    rng = np.random.default_rng(seed)
    if name in PROFILES:
        return synthetic_pairs(PROFILES[name], count, rng)
    options = REAL[name]
    source = Source(**options | {"path": str(folder / options["path"])})
    report, pairs = load_pairs(source, "main")
    # Byte pairs learned from the very texts: about as many tokens as a large vocabulary would need for them.
    tokenizer = new_tokenizer(_texts(pairs), VOCABULARY)
    sample = [pairs[index] for index in rng.permutation(len(pairs))[:count]]
    kept, examples = Encoder(tokenizer, TextSection(max_length=MAX_LENGTH)).encode(sample, report)
    if len(kept) < count:
        raise SystemExit(f"{name}: {len(kept)} pairs, and {count} are needed; ask for fewer rounds")
    return pair_table(examples, kept)


def synthetic_pairs(profile: Profile, count: int, rng: np.random.Generator) -> PairTable:
    """Return pairs of random tokens with lengths drawn from a profile, cut to `MAX_LENGTH`."""
    examples = []
    for _ in range(count):
        lengths = [round(rng.lognormal(np.log(drawn.median), drawn.sigma)) for drawn in profile]
        prompt = min(max(lengths[0], 4), MAX_LENGTH // 2)
        answers = [min(max(length, 2), MAX_LENGTH - prompt) for length in lengths[1:]]
        ids = [rng.integers(3, VOCABULARY, length, dtype=np.int32) for length in (prompt, *answers)]
        examples.append(Example(ids[0], (ids[1], ids[2])))
    pair = PreferencePair(
        (Message("user", "-"),),
        "-",
        "-",
        SafetyLabels(chosen=True, rejected=True),
        provenance=Provenance("synthetic", "assumed", "main"),
    )
    return pair_table(examples, [pair] * count)


def _texts(pairs: list[PreferencePair]) -> Iterator[str]:
    for pair in pairs:
        yield from (message.content for message in pair.prompt)
        yield from (pair.chosen, pair.rejected)
