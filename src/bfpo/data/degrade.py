"""Graded pairs: a safe answer against versions of itself that lack known shares of its key words.

The *degree* of a version is the share of the answer's key words that it keeps. The idea is that of self-supervised
preference optimization (arXiv 2409.17791), but the form here is our own.

Only safe answers are degraded. Removing words from an unsafe answer makes it less harmful, so that the degree would
run against safety.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from bfpo.core.pairs import CutAnswers, PairSignals, PreferencePair, SafetyLabels

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
# What ends a run of key words besides stop words.
_BREAK = re.compile(r"[^\w \t'\u2019-]")
_STOP_WORDS = (
    "a about above after again against all also am an and any are aren't as at be because been before being below "
    "between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each "
    "else ever every few first for from further get had hadn't has hasn't have haven't having he her here hers "
    "herself him himself his how however i i'm if in into is isn't it it's its itself just let let's may me might "
    "more most must my myself no nor not now of off on once only or other our ours ourselves out over own please "
    "rather same shall she should shouldn't since so some such than that that's the their theirs them themselves "
    "then there there's these they they're this those though through thus to too under until up us very was "
    "wasn't we we're were weren't what what's when where which while who whom why will with won't would wouldn't "
    "yes yet you you're your yours yourself yourselves"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True, slots=True)
class Version:
    """A version of an answer.

    Args:
        text: Text without some of the key words.
        degree: Share of the key words that it keeps, in [0, 1]; 1 for the answer itself.
    """

    text: str
    degree: float


def key_words(text: str) -> list[str]:
    """Return the distinct key words of a text in lower case, the most important first.

    Key words are all words but stop words. A word's score is its degree over its frequency: the mean length of the
    runs of key words, between stop words and punctuation, that it occurs in. Ties are ordered by their place.

    Source:
        Rose et al. 2010, Automatic keyword extraction from individual documents (RAKE), with its word scores.
    """
    frequency: Counter[str] = Counter()
    degree: Counter[str] = Counter()
    for run in _runs(text):
        for word in run:
            frequency[word] += 1
            degree[word] += len(run)
    # `sorted` keeps the order of first occurrence.
    return sorted(frequency, key=lambda word: -degree[word] / frequency[word])


def _runs(text: str) -> Iterator[list[str]]:
    for part in _BREAK.split(text):
        run: list[str] = []
        for match in _WORD.finditer(part):
            word = _normalize(match.group())
            if word in STOP_WORDS:
                if run:
                    yield run
                run = []
            else:
                run.append(word)
        if run:
            yield run


def _normalize(word: str) -> str:
    return word.lower().replace("\u2019", "'")


def degrade(text: str, count: int) -> list[Version]:
    """Return an answer and its degraded versions; each version removes more key words than the previous one.

    Version k of `count` lacks the most important k/(count + 1) of the key words, rounded; its degree is exact.

    Args:
        text: The answer.
        count: Number of versions besides the answer, at least 1.

    Returns:
        The answer and its versions by falling degree; nothing if it has too few key words for that many.
    """
    words = key_words(text)
    if len(words) <= count:
        return []
    versions = [Version(text, 1.0)]
    for number in range(1, count + 1):
        removed = round(number * len(words) / (count + 1))
        versions.append(Version(_without(text, frozenset(words[:removed])), 1 - removed / len(words)))
    return versions


def _without(text: str, words: frozenset[str]) -> str:
    """Return a text without some words, and without the white space in front of each."""
    return re.sub(rf"[^\S\n]*({_WORD.pattern})", lambda match: _kept(match, words), text).strip()


def _kept(match: re.Match[str], words: frozenset[str]) -> str:
    return "" if _normalize(match.group(1)) in words else match.group()


def graded_pairs(pairs: Iterable[PreferencePair], count: int, outcomes: Counter[str]) -> Iterator[PreferencePair]:
    """Yield all pairs of a safe answer and its versions, for the chosen answer of each pair.

    Args:
        pairs: Labeled pairs.
        count: Number of versions of an answer.
        outcomes: Counter that is increased: answers that were degraded, and those that weren't, by reason.
    """
    seen = set()
    for pair in pairs:
        answer = pair.chosen
        reason = _reason_not_to(pair)
        key = (pair.prompt_key, pair.inputs, answer)
        if reason is None and key in seen:
            reason = "occurs before"
        versions = degrade(answer, count) if reason is None and isinstance(answer, str) else []
        outcomes[reason or ("degraded" if versions else f"fewer than {count + 1} key words")] += 1
        seen.add(key)
        for better, worse in combinations(versions, 2):
            yield replace(
                pair,
                chosen=better.text,
                rejected=worse.text,
                labels=SafetyLabels(True, True),
                reasoning_labels=None,
                signals=PairSignals(degree_difference=better.degree - worse.degree),
                # It may be used in either stream, and scores of the answers don't hold for their versions.
                provenance=replace(pair.provenance, stream=None, reward_scorer=None, cost_scorer=None),
                cut=CutAnswers(pair.cut.chosen, pair.cut.chosen),
            )


def _reason_not_to(pair: PreferencePair) -> str | None:
    if pair.labels is None:
        return "unlabeled"
    if not pair.labels.chosen:
        return "unsafe"
    if not isinstance(pair.chosen, str):
        return "not a plain text"
    return None
