"""Which answers and prompts are unlike those that a `linear` judge was fitted on.

Its probabilities are calibrated on answers to other prompts of the same data, and mean little elsewhere. Two numbers
say where that is, each compared with its values on held-out answers of the data that the judge was fitted on:

- the cosine similarity of an answer's words and word pairs to those of the most similar fitting answer;
- the share of a prompt's words and word pairs that occur in fewer than two fitting answers' prompts.

Beyond the most extreme twentieth of the held-out answers, an answer or a prompt counts as unlike.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from bfpo.core.samples import Verdict
from bfpo.judging.features import VIEWS, Features, Floats, weight_counts

ANSWER_WORDS, PROMPT_WORDS = VIEWS["safe"][2:]
UNLIKE_BAND = (0.02, 0.98)
"""Undecided band of `p_safe` on unlike prompts; on unlike answers the judge is always undecided."""
MAX_REFERENCES = 2000
"""Maximum number of fitting answers that a judge's file holds for comparison."""
# Share of held-out answers, and of held-out prompts, that count as unlike.
_EXTREME = 0.05
# Answers that are compared with all references at once.
_BATCH = 256

_UNLIKE = "unlike those that the judge was fitted on"


class Comparison(NamedTuple):
    """N answers compared with those that a judge was fitted on.

    Args:
        similarity: Cosine similarity to the most similar fitting answer, (N,).
        unknown: Share of the prompt's words and word pairs that are new, (N,).
    """

    similarity: Floats
    unknown: Floats


@dataclass(frozen=True, slots=True)
class Likeness:
    """Rule that finds unlike answers and prompts.

    Args:
        references: Counts of the words and word pairs of some fitting answers, (references, n-grams).
        weighted: The same, weighted and scaled to norm 1, transposed.
        min_similarity: Similarity below which an answer is unlike.
        max_unknown: Share of new words above which a prompt is unlike.
        band: Undecided band of `p_safe` on unlike prompts.
    """

    references: csr_matrix
    weighted: csr_matrix
    min_similarity: float
    max_unknown: float
    band: tuple[float, float] = UNLIKE_BAND

    def compare(self, features: Features) -> Comparison:
        """Compare answers with the fitting answers."""
        return compare(self.weighted, features)

    def describe_answer(self, similarity: float) -> str | None:
        """Return why an answer is unlike, None if it isn't."""
        if similarity >= self.min_similarity:
            return None
        return (
            f"the answer is {_UNLIKE}: similarity {similarity:.2f} to the nearest, at least "
            f"{self.min_similarity:.2f} for 95 % of held-out ones"
        )

    def describe_prompt(self, unknown: float) -> str | None:
        """Return why a prompt is unlike, None if it isn't."""
        if unknown <= self.max_unknown:
            return None
        return (
            f"the prompt is {_UNLIKE}: {unknown:.0%} of its words are new, at most "
            f"{self.max_unknown:.0%} for 95 % of held-out ones"
        )


def compare(references: csr_matrix, features: Features) -> Comparison:
    """Compare answers with weighted fitting answers, (n-grams, references)."""
    words = features.blocks[ANSWER_WORDS]
    nearest = [
        (words[start : start + _BATCH] @ references).toarray().max(axis=1)
        for start in range(0, words.shape[0], _BATCH)
    ]
    return Comparison(np.concatenate(nearest), features.unknown[PROMPT_WORDS])


def make_likeness(references: csr_matrix, idf: Floats, limits: tuple[float, float]) -> Likeness:
    """Return the rule of a judge.

    Args:
        references: Counts of the words and word pairs of fitting answers, (references, n-grams).
        idf: Inverse document frequency of each, (n-grams,).
        limits: Limits as `find_limits` returns them.
    """
    return Likeness(references, transpose(weight_counts(references.copy(), idf)), *limits)


def transpose(references: csr_matrix) -> csr_matrix:
    """Return the transpose as a matrix by rows."""
    return csr_matrix(references.T)


def find_limits(held_out: Comparison) -> tuple[float, float]:
    """Return the least similarity and the greatest share of new words of 95 % of the held-out answers."""
    return float(np.quantile(held_out.similarity, _EXTREME)), float(np.quantile(held_out.unknown, 1 - _EXTREME))


def choose_references(count: int) -> NDArray[np.int64]:
    """Return the indices of the fitting answers to compare with: all, or some at random that are always the same."""
    if count <= MAX_REFERENCES:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:MAX_REFERENCES])


def is_unlike(verdict: Verdict) -> bool:
    """Return whether a verdict is on an answer, or to a prompt, unlike those that its judge was fitted on."""
    return verdict.reason is not None and _UNLIKE in verdict.reason
