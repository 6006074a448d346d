"""Hashed n-grams of words, and of characters inside words.

A judge's file contains 64-bit hashes of n-grams and no text. They hide the text from readers, not from guesses:
whoever has a word can look up whether it is among the n-grams.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Unit = Literal["word", "char_wb"]
"""Unit of n-grams: words, or characters inside words, with the spaces around them."""
Hashes = NDArray[np.uint64]

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SPACE = np.uint64(ord(" "))


class Ngrams(NamedTuple):
    """All occurrences of n-grams in texts.

    Args:
        rows: Index of the text of each occurrence, (occurrences,).
        hashes: Hash of each n-gram, (occurrences,).
    """

    rows: NDArray[np.int64]
    hashes: Hashes


def hash_ngrams(texts: Sequence[Sequence[str]], unit: Unit, min_n: int, max_n: int) -> Ngrams:
    """Return the hashes of all n-grams of texts.

    Args:
        texts: Words of each text.
        unit: Unit of the n-grams.
        min_n: n of the shortest n-gram.
        max_n: n of the longest n-gram.
    """
    if unit == "word":
        lengths = [len(words) for words in texts]
        units = _hash_words([word for words in texts for word in words])
    else:
        padded = [f" {' '.join(words)} " if words else "" for words in texts]
        lengths = [len(text) for text in padded]
        units = _code_points("".join(padded))
    row = np.repeat(np.arange(len(texts)), lengths)
    is_space = units == _SPACE if unit == "char_wb" else np.zeros(len(units), dtype=bool)
    spaces = np.concatenate([[0], np.cumsum(is_space)])
    rows, hashes, window = [], [], _mix(units)
    for n in range(1, max_n + 1):
        count = len(units) - n + 1
        if count <= 0:
            break
        if n > 1:
            window = _mix(window[:count] * _FACTOR + units[n - 1 :])
        if n < min_n:
            continue
        is_inside = row[:count] == row[n - 1 :]
        if n > 2:
            # An n-gram of characters has a space at its ends only.
            is_inside &= spaces[n - 1 : n - 1 + count] == spaces[1 : count + 1]
        rows.append(row[:count][is_inside])
        hashes.append(window[is_inside])
    if not rows:
        return Ngrams(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64))
    return Ngrams(np.concatenate(rows), np.concatenate(hashes))


def hash_terms(terms: Sequence[str], unit: Unit) -> Hashes:
    """Return the hash of each n-gram, given as text; words are separated by one space."""
    units = [term.split(" ") if unit == "word" else list(term) for term in terms]
    lengths = np.array([len(term_units) for term_units in units], dtype=np.int64)
    hashes = np.zeros(len(terms), dtype=np.uint64)
    for n in np.unique(lengths[lengths > 0]).tolist():
        of_length = np.flatnonzero(lengths == n)
        flat = [part for index in of_length for part in units[index]]
        columns = (_hash_words(flat) if unit == "word" else _code_points("".join(flat))).reshape(-1, n).T
        window = _mix(columns[0])
        for column in columns[1:]:
            window = _mix(window * _FACTOR + column)
        hashes[of_length] = window
    return hashes


def _hash_words(words: Sequence[str]) -> Hashes:
    return np.fromiter(map(hash_text, words), dtype=np.uint64, count=len(words))


@lru_cache(maxsize=100_000)
def hash_text(text: str) -> int:
    """Return a 64-bit hash of a text that is the same in every process."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _code_points(text: str) -> Hashes:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)


def _mix(values: Hashes) -> Hashes:
    """Return a bijective scramble of 64-bit values (the finalizer of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
