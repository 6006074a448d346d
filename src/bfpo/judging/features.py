"""Features of the `linear` judge: word and character n-grams of an answer and of its prompt."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, hstack
from sklearn.preprocessing import normalize as normalize_rows

from bfpo.judging.ngrams import Hashes, Ngrams, Unit, hash_ngrams

_WORD = re.compile(r"\w+|[^\w\s]")
_QUOTES = str.maketrans("\u2019\u2018\u201c\u201d", "''\"\"")
# Models differ in whether they contract: one writes "can't", another "cannot".
_CONTRACTIONS = (
    (re.compile(r"\bcan't\b|\bcannot\b"), "can not"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"'m\b"), " am"),
    (re.compile(r"'re\b"), " are"),
    (re.compile(r"'ve\b"), " have"),
    (re.compile(r"'ll\b"), " will"),
)
# Words that occur in every text: one that occurs in the prompt too says nothing about the topic.
_COMMON_WORDS = (
    "a am an and are as at be been but by can could did do does for from had has have he her his how i if in is it "
    "its me my no not of on or our she should so sorry that the their them they this to was we were what when where "
    "which who why will with would you your"
)
_COMMON = frozenset(_COMMON_WORDS.split())


# An n-gram that occurs in a single answer says nothing about others.
_MIN_ANSWERS = 2

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


class View(NamedTuple):
    """One family of features.

    Args:
        text: Text that the features are taken from, the `answer` or the `prompt`.
        unit: `word` for n-grams of words, `char_wb` for n-grams of characters inside words.
        min_n: n of the shortest n-gram.
        max_n: n of the longest n-gram.
        max_chars: Number of characters read from the start of the text; None reads all.
    """

    text: Literal["answer", "prompt"]
    unit: Unit
    min_n: int
    max_n: int
    max_chars: int | None


# A refusal is recognized at the start of an answer. Later words belong to the topic and differ between data sets.
ANSWER_VIEWS = (
    View("answer", "word", 1, 3, 200),
    View("answer", "char_wb", 2, 5, 300),
    View("answer", "word", 1, 2, None),
)
# Whether an answer is harmful depends on the prompt; whether it refuses doesn't.
VIEWS = {"refusal": ANSWER_VIEWS, "safe": (*ANSWER_VIEWS, View("prompt", "word", 1, 2, None))}


def normalize(text: str) -> str:
    """Return a text in lower case, with straight quotes and contractions written out."""
    text = text.translate(_QUOTES).lower()
    if "'" in text or "cannot" in text:
        for pattern, full in _CONTRACTIONS:
            text = pattern.sub(full, text)
    return text


@lru_cache(maxsize=1024)
def _words(prompt: str) -> tuple[str, ...]:
    """Return the words of a prompt, which usually has several answers."""
    return tuple(_WORD.findall(normalize(prompt)))


def mask_prompt_words(prompt: str, answer: str) -> str:
    """Return the words of an answer, with those that also occur in the prompt masked by `_`.

    Without the mask a judge learns which topics were refused in its training data.
    """
    prompt_words = frozenset(_words(prompt)) - _COMMON
    return " ".join("_" if word in prompt_words else word for word in _WORD.findall(normalize(answer)))


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """N-grams of one view that a judge was fitted on, by their hashes.

    Args:
        hashes: Hash of the n-gram of each column, (n-grams,).
        idf: Inverse document frequency of each n-gram, (n-grams,).
    """

    hashes: Hashes
    idf: Floats
    _columns: Rows = field(init=False)
    _ordered: Hashes = field(init=False)
    _starts: Rows = field(init=False)
    _shift: np.uint64 = field(init=False)

    def __post_init__(self) -> None:
        # The hashes in order, and where those with each beginning start: a search in memory that is near.
        order = np.argsort(self.hashes)
        bits = max(1, len(order).bit_length())
        shift = np.uint64(64 - bits)
        ordered = self.hashes[order]
        beginnings = np.arange(2**bits, dtype=np.uint64) << shift
        object.__setattr__(self, "_columns", np.append(order, -1))
        object.__setattr__(self, "_ordered", np.append(ordered, np.uint64(2**64 - 1)))
        object.__setattr__(self, "_starts", np.searchsorted(ordered, beginnings))
        object.__setattr__(self, "_shift", shift)

    def count(self, ngrams: Ngrams, num_texts: int) -> tuple[csr_matrix, Floats]:
        """Return the counts of n-grams in texts, (N, n-grams), and the share of each text's that are unknown, (N,).

        The share is 0 for a text without n-grams.
        """
        columns = self._find(ngrams.hashes)
        is_known = columns >= 0
        shape = num_texts, len(self.hashes)
        counts = _count(ngrams.rows[is_known], columns[is_known], shape)
        totals = np.bincount(ngrams.rows, minlength=num_texts)
        unknown = np.bincount(ngrams.rows[~is_known], minlength=num_texts)
        return counts, unknown / np.maximum(totals, 1)

    def _find(self, hashes: Hashes) -> Rows:
        """Return the column of each hash; -1 for unknown ones."""
        columns = np.full(len(hashes), -1)
        positions = self._starts[(hashes >> self._shift).astype(np.int64)]
        rest = np.arange(len(hashes))
        while len(rest):
            stored, searched = self._ordered[positions], hashes[rest]
            is_found = stored == searched
            columns[rest[is_found]] = self._columns[positions[is_found]]
            is_further = stored < searched
            rest, positions = rest[is_further], positions[is_further] + 1
        return columns


Vocabularies = tuple[tuple[View, Vocabulary], ...]


class Features(NamedTuple):
    """Features of N answers, by view.

    Args:
        blocks: Weighted n-grams, (N, n-grams) each.
        unknown: Share of an answer's n-grams that aren't in the vocabulary, (N,) each.
    """

    blocks: dict[View, csr_matrix]
    unknown: dict[View, Floats]

    @property
    def x(self) -> csr_matrix:
        """Weighted n-grams of all views, (N, n-grams)."""
        return csr_matrix(hstack(list(self.blocks.values())))


class Texts:
    """Answers to judge, whose n-grams are extracted once for all heads of a judge.

    Args:
        prompts: N last user turns.
        answers: N answers.
        views: Families of features.
    """

    def __init__(self, prompts: Sequence[str], answers: Sequence[str], views: Iterable[View]) -> None:
        self._num_texts = len(answers)
        self._ngrams = _extract_ngrams(prompts, answers, views)
        self._blocks: dict[int, tuple[csr_matrix, Floats]] = {}

    def features(self, vocabularies: Vocabularies) -> Features:
        """Return the features by the vocabularies of a head; heads may share them."""
        blocks = {view: self._block(view, vocabulary) for view, vocabulary in vocabularies}
        return Features(
            {view: block for view, (block, _) in blocks.items()},
            {view: unknown for view, (_, unknown) in blocks.items()},
        )

    def _block(self, view: View, vocabulary: Vocabulary) -> tuple[csr_matrix, Floats]:
        if id(vocabulary) not in self._blocks:
            counts, unknown = vocabulary.count(self._ngrams[view], self._num_texts)
            self._blocks[id(vocabulary)] = weight_counts(counts, vocabulary.idf), unknown
        return self._blocks[id(vocabulary)]


class Corpus:
    """Labeled answers, whose n-grams are counted once for all fits on parts of the answers.

    Args:
        prompts: N last user turns.
        answers: N answers.
    """

    def __init__(self, prompts: Sequence[str], answers: Sequence[str]) -> None:
        self._hashes: dict[View, Hashes] = {}
        self._counts: dict[View, csr_matrix] = {}
        for view, ngrams in _extract_ngrams(prompts, answers, VIEWS["safe"]).items():
            self._hashes[view], columns = np.unique(ngrams.hashes, return_inverse=True)
            self._counts[view] = _count(ngrams.rows, columns, (len(answers), len(self._hashes[view])))

    def learn(self, views: Sequence[View], rows: Rows) -> Vocabularies:
        """Return the vocabularies of some answers: the n-grams that occur in at least two of them."""
        vocabularies = []
        for view in views:
            frequency = np.bincount(self._counts[view][rows].indices, minlength=len(self._hashes[view]))
            columns = np.flatnonzero(frequency >= _MIN_ANSWERS)
            idf = np.log((1 + len(rows)) / (1 + frequency[columns])) + 1
            vocabularies.append((view, Vocabulary(self._hashes[view][columns], idf)))
        return tuple(vocabularies)

    def features(self, vocabularies: Vocabularies, rows: Rows) -> Features:
        """Return the features of some answers by vocabularies that were learned here."""
        blocks, unknown = {}, {}
        for view, vocabulary in vocabularies:
            counts = self._counts[view][rows]
            totals = np.asarray(counts.sum(axis=1)).ravel()
            counts = counts[:, np.searchsorted(self._hashes[view], vocabulary.hashes)]
            known = np.asarray(counts.sum(axis=1)).ravel()
            unknown[view] = (totals - known) / np.maximum(totals, 1)
            blocks[view] = weight_counts(counts, vocabulary.idf)
        return Features(blocks, unknown)

    def counts(self, view: View, vocabulary: Vocabulary, rows: Rows) -> csr_matrix:
        """Return the counts of the n-grams of some answers, (answers, n-grams)."""
        return self._counts[view][rows][:, np.searchsorted(self._hashes[view], vocabulary.hashes)]


def _extract_ngrams(prompts: Sequence[str], answers: Sequence[str], views: Iterable[View]) -> dict[View, Ngrams]:
    """Return the n-grams of each view of N answers, given with their prompts."""
    texts = {
        "answer": [mask_prompt_words(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)],
        "prompt": [" ".join(_words(prompt)) for prompt in prompts],
    }
    return {
        view: hash_ngrams(
            [text[: view.max_chars].split() for text in texts[view.text]], view.unit, view.min_n, view.max_n
        )
        for view in views
    }


def _count(rows: Rows, columns: Rows, shape: tuple[int, int]) -> csr_matrix:
    """Return how often each column occurs in each row; the rows come in order."""
    cells, counts = np.unique(rows * shape[1] + columns, return_counts=True)
    starts = np.searchsorted(cells, np.arange(shape[0] + 1) * shape[1])
    # Products of matrices are faster with indices of 32 bits.
    columns = (cells % max(shape[1], 1)).astype(np.int32)
    return csr_matrix((counts.astype(np.float64), columns, starts.astype(np.int32)), shape=shape)


def weight_counts(counts: csr_matrix, idf: Floats) -> csr_matrix:
    """Return log counts times the inverse document frequency, scaled to norm 1: the length of a text doesn't matter.

    Args:
        counts: Counts of n-grams, (N, n-grams); changed in place.
        idf: Inverse document frequency of each n-gram, (n-grams,).
    """
    counts.data = (np.log(counts.data) + 1) * idf[counts.indices]
    return normalize_rows(counts, copy=False)
