"""Pairs of the benchmark: real ones from local files, synthetic ones with the lengths of other data sets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bfpo.config.recipes import Source, TextSection
from bfpo.core.conversation import Message
from bfpo.core.pairs import PreferencePair, Provenance, SafetyLabels
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
    """Distributions of the lengths of a data set's prompts and completions."""

    prompt: LogNormal
    chosen: LogNormal
    rejected: LogNormal


# Assumed, not measured, because neither data set could be downloaded. The means of the first (148, 332 and 278
# tokens) agree with the size in its card, 6.6 kB per row, at 4.3 bytes per token; those of the second (23, 90 and 90)
# are typical of short questions with answers of a paragraph.
PROFILES = {
    "ultrafeedback": Profile(LogNormal(90, 1.0), LogNormal(260, 0.7), LogNormal(210, 0.75)),
    "pku": Profile(LogNormal(20, 0.5), LogNormal(70, 0.7), LogNormal(70, 0.7)),
}


def make_pairs(name: str, folder: Path, *, count: int, seed: int) -> PairTable:
    """Return a seeded random sample of tokenized pairs, in random order.

    Args:
        name: A key of `REAL` or `PROFILES`.
        folder: Folder of the real data.
        count: Number of pairs.
        seed: Seed of the sample, its order, and synthetic pairs.
    """
    rng = np.random.default_rng(seed)
    if name in PROFILES:
        return synthetic_pairs(PROFILES[name], count, rng)
    options = REAL[name]
    source = Source(**options | {"path": str(folder / options["path"])})
    report, pairs = load_pairs(source, "main")
    # The BPE is trained on these texts, so that they have about as many tokens as with a large vocabulary.
    tokenizer = new_tokenizer(_texts(pairs), VOCABULARY)
    sample = [pairs[index] for index in rng.permutation(len(pairs))[:count]]
    encoded, examples = Encoder(tokenizer, TextSection(max_length=MAX_LENGTH)).encode(sample, report)
    if len(encoded) < count:
        raise SystemExit(f"{name}: {len(encoded)} pairs; expected at least {count}, reduce the number of rounds")
    return pair_table(examples, encoded)


def synthetic_pairs(profile: Profile, count: int, rng: np.random.Generator) -> PairTable:
    """Return pairs of random tokens with lengths drawn from a profile, truncated to `MAX_LENGTH`."""
    examples = []
    for _ in range(count):
        lengths = [round(rng.lognormal(np.log(length.median), length.sigma)) for length in profile]
        prompt = min(max(lengths[0], 4), MAX_LENGTH // 2)
        completions = [min(max(length, 2), MAX_LENGTH - prompt) for length in lengths[1:]]
        ids = [rng.integers(3, VOCABULARY, length, dtype=np.int32) for length in (prompt, *completions)]
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
