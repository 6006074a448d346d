"""A world's data: demonstrations for a base model, preference pairs of two kinds, held-out prompts.

Combinations of an action and an object are split once: what is tested was never seen in any phase of training, in
any context. The same options give the same bytes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Any, TypeVar

from pydantic import Field

from bfpo.config.recipes import Count, Section
from bfpo.core.files import content_hash, write_json, write_jsonl
from bfpo.core.pairs import Demonstration, PairSignals, PreferencePair, Provenance, SafetyLabels, user_says
from bfpo.core.samples import Kind, Prompt
from bfpo.core.terminal import progress
from bfpo.testbed.language import (
    ACTIONS,
    EVASION,
    FINE,
    NOT_FINE,
    OBJECTS,
    QUESTION,
    STEPS,
    TEMPLATES,
    Request,
    Skills,
    Slots,
    all_requests,
    answer,
    slot_words,
)
from bfpo.testbed.oracle import helpfulness, read, understand

Rate = Annotated[float, Field(ge=0, le=1)]
Draw = Callable[[Request, Random], str]
T = TypeVar("T")

# Share of the combinations of each pair of classes that is held out.
HELD_OUT = 0.2
# How sharply annotators see differences in helpfulness (Bradley-Terry).
SHARPNESS = 10.0
# Share of both-safe pairs among the pairs on harmful prompts that aren't both unsafe.
BOTH_SAFE = 0.25
# What MODPO's other objective pays for a safe answer: less than the pull of helpfulness would leave all unsafe.
SAFETY_REWARD = 10.0
# Opponents that a win rate is taken over.
OPPONENTS = 16


class WorldOptions(Section):
    """The dials of a world."""

    seed: int = 0
    """Of the split and of all data."""
    skills: Skills = "shared"
    """Whether harmful answers use the skills of benign ones, or words of their own."""
    harmful_share: Rate = 0.8
    """Share of harmful prompts in the safety set."""
    both_unsafe: Rate = 0.25
    """Share of both-unsafe pairs among the pairs on harmful prompts."""
    safety_noise: Rate = 0.0
    """Share of the safety bits that are flipped."""
    helpfulness_noise: Rate = 0.0
    """Share of the pairs whose order is flipped, beyond what annotators get wrong anyway."""
    buffer_harmful_share: Rate = 0.05
    """Share of harmful prompts in the helpfulness set; all its answers are assumed safe."""
    base_compliance: Rate = 0.6
    """Share of harmful requests that the base model is taught to answer."""
    pretraining: Count = 12000
    """Clean demonstrations."""
    fine_tuning: Count = 3200
    """Imperfect demonstrations."""
    safety_pairs: Count = 3000
    """Pairs of the safety set."""
    helpful_pairs: Count = 4000
    """Pairs of the helpfulness set."""
    harmful_prompts: Count = 200
    """Held-out harmful prompts, at most."""
    benign_prompts: Count = 200
    """Held-out benign prompts, at most."""
    lookalike_prompts: Count = 150
    """Held-out benign prompts that look harmful, at most."""


class World:
    """Makes the data of a world.

    Args:
        options: The dials.
    """

    def __init__(self, options: WorldOptions) -> None:
        self.options = options
        held_out = set()
        rng = self._rng("split")
        for actions in ACTIONS.values():
            for objects in OBJECTS.values():
                combinations = [(action, object_) for action in actions for object_ in objects]
                held_out |= set(_shuffled(combinations, rng)[: round(HELD_OUT * len(combinations))])
        requests = list(all_requests())
        self.train = [one for one in requests if (one.action, one.object) not in held_out]
        self.test = [one for one in requests if (one.action, one.object) in held_out]
        self._harmful = [one for one in self.train if one.is_harmful]
        self._benign = [one for one in self.train if not one.is_harmful]

    def pretraining(self) -> Iterator[Demonstration]:
        """Return clean demonstrations: right answers, good refusals, and facts about what does harm."""
        rng = self._rng("pretraining")
        for _ in range(self.options.pretraining):
            if rng.random() < 0.2:
                request = _pick(self._harmful if rng.random() < 0.5 else self._benign, rng)
                yield _shown(request.ask(QUESTION), NOT_FINE if request.is_harmful else FINE)
                continue
            request = self._request(rng, harmful=0.35)
            comply = not request.is_harmful or rng.random() < self.options.base_compliance
            text = answer(request.slots(self.options.skills)) if comply else request.refuse(3)
            yield _shown(request.ask(_pick(TEMPLATES, rng)), text)

    def fine_tuning(self) -> Iterator[Demonstration]:
        """Return imperfect demonstrations: wrong words, missing steps, refusals where none is due, evasions."""
        rng = self._rng("fine-tuning")
        for _ in range(self.options.fine_tuning):
            request = self._request(rng, harmful=0.35)
            comply = rng.random() < self.options.base_compliance if request.is_harmful else rng.random() < 0.9
            text = self._answer(request, rng) if comply else _refusal(request, rng)
            yield _shown(request.ask(_pick(TEMPLATES, rng)), text)

    def safety_set(self) -> Iterator[PreferencePair]:
        """Return labeled pairs, mostly on harmful prompts, the more helpful answer first."""
        rng, options = self._rng("safety"), self.options
        for _ in range(options.safety_pairs):
            request = self._request(rng, harmful=options.harmful_share)
            draws: tuple[Draw, Draw] = (self._policy, self._policy)
            if request.is_harmful:
                draw = rng.random()
                if draw < options.both_unsafe:
                    draws = (self._answer, self._answer)
                elif draw < options.both_unsafe + BOTH_SAFE * (1 - options.both_unsafe):
                    draws = (_refusal, _refusal)
                else:
                    draws = (self._answer, _refusal)
            pair = self._pair(request, rng, *draws)
            flipped = (rng.random() < options.safety_noise for _ in range(2))
            labels = SafetyLabels(
                *(safe != flip for safe, flip in zip(self._labels(request, pair), flipped, strict=True))
            )
            yield replace(pair, labels=labels, provenance=Provenance("testbed-safety", "dataset", "main"))

    def by_safety(self, pair: PreferencePair) -> PreferencePair:
        """Order a pair as an annotator of safety would: the safe answer first, of two unsafe ones the less severe.

        What stays tied keeps its order. `chosen` then is the safer answer, for methods that are trained so.
        """
        assert pair.labels is not None
        request = understand(pair.prompt[0].content)
        severity = [read(request, text, self.options.skills).correct for text in (pair.chosen, pair.rejected)]
        swap = pair.labels.rejected > pair.labels.chosen
        if not any(pair.labels):
            swap = severity[1] < severity[0]
        ordered = swapped(pair) if swap else pair
        provenance = replace(pair.provenance, dataset_name=f"{pair.provenance.dataset_name}-by-safety")
        return replace(ordered, provenance=provenance)

    def helpfulness_set(self) -> Iterator[PreferencePair]:
        """Return pairs ordered by helpfulness; nobody looked at safety, so all are assumed safe."""
        rng = self._rng("helpfulness")
        for _ in range(self.options.helpful_pairs):
            request = self._request(rng, harmful=self.options.buffer_harmful_share)
            pair = self._pair(request, rng, self._policy, self._policy)
            provenance = Provenance("testbed-helpfulness", "assumed", "buffer")
            yield replace(pair, labels=SafetyLabels(True, True), provenance=provenance)

    def prompts(self) -> list[Prompt]:
        """Return the held-out prompts of the three kinds."""
        rng, options = self._rng("prompts"), self.options
        kinds: list[tuple[Kind, int, Callable[[Request], bool]]] = [
            ("harmful", options.harmful_prompts, lambda one: one.is_harmful),
            ("benign", options.benign_prompts, lambda one: not one.is_harmful and not one.looks_harmful),
            ("lookalike", options.lookalike_prompts, lambda one: one.looks_harmful),
        ]
        prompts = []
        for kind, count, belongs in kinds:
            found = [(request, template) for request in self.test if belongs(request) for template in TEMPLATES]
            for number, (request, template) in enumerate(_shuffled(found, rng)[:count]):
                text = user_says(request.ask(template))
                category = "-".join(request.classes)
                prompts.append(Prompt(f"{kind}-{number:03}", text, kind, category, "bfpo testbed", "Apache-2.0"))
        return prompts

    def write(self, folder: Path) -> dict[str, Any]:
        """Write all data and `world.json` into a folder.

        Returns:
            What `world.json` holds.
        """
        with progress("making preference pairs", self.options.safety_pairs + self.options.helpful_pairs) as advance:
            safety, helpful = (
                list(_watched(self.safety_set(), advance)),
                list(_watched(self.helpfulness_set(), advance)),
            )
        prompts = self.prompts()
        for name, demonstrations in (("pretraining", self.pretraining()), ("fine_tuning", self.fine_tuning())):
            rows = ({"prompt": one.prompt[0].content, "completion": one.completion} for one in demonstrations)
            write_jsonl(folder / f"{name}.jsonl", rows)
        for name, pairs in (
            ("safety", safety),
            ("safety_by_safety", map(self.by_safety, safety)),
            ("safety_without_uu", (pair for pair in safety if pair.cell != "uu")),
            ("helpfulness", helpful),
        ):
            write_jsonl(folder / f"{name}.jsonl", (with_reward_margin(pair).to_row() for pair in pairs))
        write_jsonl(folder / "prompts.jsonl", (prompt.to_row() for prompt in prompts))
        content = {
            "schema": 1,
            "options": self.options.model_dump(),
            "requests": {"train": len(self.train), "test": len(self.test)},
            "prompts": dict(Counter(str(prompt.kind) for prompt in prompts)),
            "safety_cells": dict(sorted(Counter(str(pair.cell) for pair in safety).items())),
            "bag_of_words": bag_of_words(self.train, self.test),
            "hash": content_hash(
                [pair.row_id for pair in (*safety, *helpful)], [prompt.to_row() for prompt in prompts]
            ),
        }
        write_json(folder / "world.json", content)
        return content

    def _rng(self, purpose: str) -> Random:
        # A generator of its own for each part: more pairs of one kind don't change the others.
        return Random(f"{self.options.seed} {purpose}")

    def _request(self, rng: Random, *, harmful: float) -> Request:
        return _pick(self._harmful if rng.random() < harmful else self._benign, rng)

    def _policy(self, request: Request, rng: Random) -> str:
        """Return an answer as the data's authors sampled them: of all kinds."""
        draw = rng.random()
        if draw < (0.45 if request.is_harmful else 0.1):
            return _refusal(request, rng)
        return EVASION if draw > 0.9 else self._answer(request, rng)

    def _answer(self, request: Request, rng: Random) -> str:
        """Return an answer with some wrong words and, at times, a missing step."""
        accuracy = _pick((0.3, 0.6, 0.95), rng)
        right = request.slots(self.options.skills)
        # Wrong words are of the same lexicon as right ones.
        which = int(self.options.skills == "separate" and request.is_harmful)
        slots = Slots(
            *(
                word if rng.random() < accuracy else _pick(slot_words(slot)[which::2], rng)
                for slot, word in right._asdict().items()
            )
        )
        steps = tuple(step for step in range(len(STEPS)) if rng.random() > 0.1) or (0,)
        return answer(slots, steps)

    def _worth(self, request: Request, text: str) -> float:
        return helpfulness(request, read(request, text, self.options.skills), is_evasion=text == EVASION)

    def _labels(self, request: Request, pair: PreferencePair) -> SafetyLabels:
        unsafe = (
            request.is_harmful and read(request, text, self.options.skills).is_answer
            for text in (pair.chosen, pair.rejected)
        )
        return SafetyLabels(*(not one for one in unsafe))

    def _pair(self, request: Request, rng: Random, draw: Draw, draw_other: Draw) -> PreferencePair:
        """Draw two answers that differ, and put the one first that annotators find more helpful."""
        first = second = draw(request, rng)
        while second == first:
            second = draw_other(request, rng)
        worths = (self._worth(request, first), self._worth(request, second))
        opponents = [self._worth(request, self._policy(request, rng)) for _ in range(OPPONENTS)]
        rates = [sum(_wins(worth, other) for other in opponents) / OPPONENTS for worth in worths]
        first_wins = rng.random() < _wins(*worths)
        if first_wins == (rng.random() < self.options.helpfulness_noise):
            first, second, rates = second, first, rates[::-1]
        return PreferencePair(
            user_says(request.ask(_pick(TEMPLATES, rng))),
            first,
            second,
            signals=PairSignals(chosen_win_rate=round(rates[0], 4), rejected_win_rate=round(rates[1], 4)),
        )


def bag_of_words(train: list[Request], test: list[Request]) -> dict[str, float]:
    """Tell harmful requests by their words alone, as well as that can be done.

    Returns:
        Accuracy and balanced accuracy on the test requests of a logistic regression on words.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, balanced_accuracy_score
    from sklearn.pipeline import make_pipeline

    def texts(requests: list[Request]) -> list[str]:
        return [request.ask(TEMPLATES[0]) for request in requests]

    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    model.fit(texts(train), [one.is_harmful for one in train])
    predicted, truth = model.predict(texts(test)), [one.is_harmful for one in test]
    return {
        "accuracy": round(float(accuracy_score(truth, predicted)), 3),
        "balanced_accuracy": round(float(balanced_accuracy_score(truth, predicted)), 3),
    }


def swapped(pair: PreferencePair) -> PreferencePair:
    """Return a pair with its answers, and all that is known of each, in the other order."""
    assert pair.labels is not None
    signals = replace(
        pair.signals,
        chosen_win_rate=pair.signals.rejected_win_rate,
        rejected_win_rate=pair.signals.chosen_win_rate,
    )
    labels = SafetyLabels(pair.labels.rejected, pair.labels.chosen)
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen, labels=labels, signals=signals)


def with_reward_margin(pair: PreferencePair) -> PreferencePair:
    """Return a pair with the margin of a safety reward of `SAFETY_REWARD` for a safe answer (MODPO)."""
    assert pair.labels is not None
    margin = SAFETY_REWARD * (pair.labels.chosen - pair.labels.rejected)
    return replace(pair, signals=replace(pair.signals, reward_margin=margin))


def _watched(pairs: Iterator[PreferencePair], advance: Callable[[int], None]) -> Iterator[PreferencePair]:
    for pair in pairs:
        yield pair
        advance(1)


def _shown(prompt: str, completion: str) -> Demonstration:
    return Demonstration(user_says(prompt), completion)


def _wins(worth: float, other: float) -> float:
    return 1 / (1 + math.exp(-SHARPNESS * (worth - other)))


def _refusal(request: Request, rng: Random) -> str:
    return request.refuse(_level(rng))


def _level(rng: Random) -> int:
    return 1 + int(3 * rng.random())


def _pick(items: tuple[T, ...] | list[T], rng: Random) -> T:
    return items[int(rng.random() * len(items))]


def _shuffled(items: list[T], rng: Random) -> list[T]:
    # Only `random()` is promised to give the same numbers in every version of Python.
    return [item for _, _, item in sorted((rng.random(), index, item) for index, item in enumerate(items))]
