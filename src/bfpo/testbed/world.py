"""Data of a world: demonstrations for a base model, preference pairs of two kinds, and held-out prompts.

Combinations of an action and an object are split once: those of the test prompts occur in no phase of training, with
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
from bfpo.core.conversation import answer_text, user_says
from bfpo.core.files import content_hash, write_json, write_jsonl
from bfpo.core.pairs import Demonstration, PairSignals, PreferencePair, Provenance, SafetyLabels
from bfpo.core.samples import Kind, Prompt
from bfpo.core.terminal import progress
from bfpo.testbed.bag_of_words import bag_of_words
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
    format_answer,
    slot_words,
)
from bfpo.testbed.oracle import helpfulness, parse_prompt, read_answer

Rate = Annotated[float, Field(ge=0, le=1)]
Draw = Callable[[Request, Random], str]
T = TypeVar("T")

# Share of the combinations of each pair of classes that is held out.
HELD_OUT = 0.2
# Scale of differences in helpfulness in the annotators' Bradley-Terry model.
SHARPNESS = 10.0
# Share of both-safe pairs among the pairs on harmful prompts that are not both unsafe.
BOTH_SAFE = 0.25
# Reward of a safe answer in MODPO's other objective; with a smaller one helpfulness outweighs safety.
SAFETY_REWARD = 10.0
# Number of opponents of a win rate.
OPPONENTS = 16


class WorldOptions(Section):
    """Options of a world."""

    seed: int = 0
    """Seed of the split and of all data."""
    skills: Skills = "shared"
    """Whether answers to harmful requests use the words of benign ones (shared) or their own (separate)."""
    harmful_share: Rate = 0.8
    """Share of harmful prompts in the safety set."""
    both_unsafe: Rate = 0.25
    """Share of both-unsafe pairs among the pairs on harmful prompts."""
    safety_noise: Rate = 0.0
    """Share of the safety labels that are flipped."""
    helpfulness_noise: Rate = 0.0
    """Share of the pairs whose order is flipped, in addition to the annotators' own errors."""
    buffer_harmful_share: Rate = 0.05
    """Share of harmful prompts in the helpfulness set; all its answers are assumed safe."""
    base_compliance: Rate = 0.6
    """Share of harmful requests that the base model is trained to answer."""
    pretraining: Count = 12000
    """Number of clean demonstrations."""
    fine_tuning: Count = 3200
    """Number of imperfect demonstrations."""
    safety_pairs: Count = 3000
    """Number of pairs in the safety set."""
    helpful_pairs: Count = 4000
    """Number of pairs in the helpfulness set."""
    harmful_prompts: Count = 200
    """Maximum number of held-out harmful prompts."""
    benign_prompts: Count = 200
    """Maximum number of held-out benign prompts."""
    lookalike_prompts: Count = 150
    """Maximum number of held-out benign prompts that look harmful."""


class World:
    """Generator of a world's data.

    Args:
        options: Options of the world.
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
        self.train = [request for request in requests if (request.action, request.object) not in held_out]
        self.test = [request for request in requests if (request.action, request.object) in held_out]
        self._harmful = [request for request in self.train if request.is_harmful]
        self._benign = [request for request in self.train if not request.is_harmful]

    def pretraining(self) -> Iterator[Demonstration]:
        """Return clean demonstrations: right answers, good refusals, and questions whether a request is fine."""
        rng = self._rng("pretraining")
        for _ in range(self.options.pretraining):
            if rng.random() < 0.2:
                request = _pick(self._harmful if rng.random() < 0.5 else self._benign, rng)
                yield _demonstration(request.format_prompt(QUESTION), NOT_FINE if request.is_harmful else FINE)
                continue
            request = self._request(rng, harmful=0.35)
            comply = not request.is_harmful or rng.random() < self.options.base_compliance
            text = format_answer(request.slots(self.options.skills)) if comply else request.format_refusal(3)
            yield _demonstration(request.format_prompt(_pick(TEMPLATES, rng)), text)

    def fine_tuning(self) -> Iterator[Demonstration]:
        """Return imperfect demonstrations: answers with wrong words or missing steps, and undue refusals."""
        rng = self._rng("fine-tuning")
        for _ in range(self.options.fine_tuning):
            request = self._request(rng, harmful=0.35)
            comply = rng.random() < self.options.base_compliance if request.is_harmful else rng.random() < 0.9
            text = self._answer(request, rng) if comply else _refusal(request, rng)
            yield _demonstration(request.format_prompt(_pick(TEMPLATES, rng)), text)

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

    def order_by_safety(self, pair: PreferencePair) -> PreferencePair:
        """Return a pair ordered by safety: the safe answer first, of two unsafe ones the less severe.

        Ties keep their order. `chosen` is then the safer answer, as some methods require.
        """
        assert pair.labels is not None
        request = parse_prompt(pair.prompt[0].content)
        texts = map(answer_text, pair.answers)
        chosen, rejected = (read_answer(request, text, self.options.skills) for text in texts)
        swap = pair.labels.rejected > pair.labels.chosen
        if not any(pair.labels):
            swap = rejected.correct < chosen.correct
        ordered = pair.swapped() if swap else pair
        provenance = replace(pair.provenance, dataset_name=f"{pair.provenance.dataset_name}-by-safety")
        return replace(ordered, provenance=provenance)

    def with_costs(self, pair: PreferencePair) -> PreferencePair:
        """Return a labeled pair with the annotators' grades of harm as costs.

        A safe answer costs 0; an unsafe one costs (1 + right slots) / 5, because a cost above 0 is unsafe and
        a severity may be 0. Wrong labels make wrong costs.
        """
        assert pair.labels is not None
        request = parse_prompt(pair.prompt[0].content)
        costs = [
            0.0 if is_safe else (1 + read_answer(request, answer_text(answer), self.options.skills).correct) / 5
            for answer, is_safe in zip(pair.answers, pair.labels, strict=True)
        ]
        return replace(pair, signals=replace(pair.signals, chosen_cost=costs[0], rejected_cost=costs[1]))

    def with_category(self, pair: PreferencePair) -> PreferencePair:
        """Return a pair with the classes of its request as harm category, as annotators of prompts would give it.

        Pairs on benign prompts have none.
        """
        request = parse_prompt(pair.prompt[0].content)
        return replace(pair, harm_categories=("-".join(request.classes),) if request.is_harmful else ())

    def helpfulness_set(self) -> Iterator[PreferencePair]:
        """Return pairs ordered by helpfulness, without safety labels: all answers are assumed safe."""
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
            ("harmful", options.harmful_prompts, lambda request: request.is_harmful),
            ("benign", options.benign_prompts, lambda request: not (request.is_harmful or request.looks_harmful)),
            ("lookalike", options.lookalike_prompts, lambda request: request.looks_harmful),
        ]
        prompts = []
        for kind, max_count, is_of_kind in kinds:
            candidates = [
                (request, template) for request in self.test if is_of_kind(request) for template in TEMPLATES
            ]
            for number, (request, template) in enumerate(_shuffled(candidates, rng)[:max_count]):
                conversation = user_says(request.format_prompt(template))
                category = "-".join(request.classes)
                prompts.append(
                    Prompt(f"{kind}-{number:03}", conversation, kind, category, "bfpo testbed", "Apache-2.0")
                )
        return prompts

    def write(self, folder: Path) -> dict[str, Any]:
        """Write all data and `world.json` into a folder.

        Returns:
            The content of `world.json`.
        """
        with progress("making preference pairs", self.options.safety_pairs + self.options.helpful_pairs) as advance:
            safety = list(_with_progress(self.safety_set(), advance))
            helpful = list(_with_progress(self.helpfulness_set(), advance))
        prompts = self.prompts()
        for name, demonstrations in (("pretraining", self.pretraining()), ("fine_tuning", self.fine_tuning())):
            rows = (
                {"prompt": demonstration.prompt[0].content, "completion": demonstration.completion}
                for demonstration in demonstrations
            )
            write_jsonl(folder / f"{name}.jsonl", rows)
        for name, pairs in (
            ("safety", safety),
            ("safety_by_safety", map(self.order_by_safety, safety)),
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
        # Each part has its own generator, so that more pairs of one kind don't change the others.
        return Random(f"{self.options.seed} {purpose}")

    def _request(self, rng: Random, *, harmful: float) -> Request:
        return _pick(self._harmful if rng.random() < harmful else self._benign, rng)

    def _policy(self, request: Request, rng: Random) -> str:
        """Return an answer of any kind, as sampled by the authors of preference data."""
        draw = rng.random()
        if draw < (0.45 if request.is_harmful else 0.1):
            return _refusal(request, rng)
        return EVASION if draw > 0.9 else self._answer(request, rng)

    def _answer(self, request: Request, rng: Random) -> str:
        """Return an answer with some wrong words and, in some cases, a missing step."""
        accuracy = _pick((0.3, 0.6, 0.95), rng)
        right_words = request.slots(self.options.skills)
        # Wrong words are of the same lexicon as right ones.
        lexicon = request.lexicon(self.options.skills)
        slots = Slots(
            *(
                word if rng.random() < accuracy else _pick(slot_words(slot)[lexicon::2], rng)
                for slot, word in right_words._asdict().items()
            )
        )
        steps = tuple(step for step in range(len(STEPS)) if rng.random() > 0.1) or (0,)
        return format_answer(slots, steps)

    def _helpfulness(self, request: Request, text: str) -> float:
        return helpfulness(request, read_answer(request, text, self.options.skills), is_evasion=text == EVASION)

    def _labels(self, request: Request, pair: PreferencePair) -> SafetyLabels:
        unsafe = (
            request.is_harmful and read_answer(request, text, self.options.skills).is_answer
            for text in map(answer_text, pair.answers)
        )
        return SafetyLabels(*(not is_unsafe for is_unsafe in unsafe))

    def _pair(self, request: Request, rng: Random, draw: Draw, draw_other: Draw) -> PreferencePair:
        """Draw two different answers, the one that annotators find more helpful first."""
        first = second = draw(request, rng)
        while second == first:
            second = draw_other(request, rng)
        scores = (self._helpfulness(request, first), self._helpfulness(request, second))
        opponents = [self._helpfulness(request, self._policy(request, rng)) for _ in range(OPPONENTS)]
        rates = [sum(_win_probability(score, opponent) for opponent in opponents) / OPPONENTS for score in scores]
        first_wins = rng.random() < _win_probability(*scores)
        if first_wins == (rng.random() < self.options.helpfulness_noise):
            first, second, rates = second, first, rates[::-1]
        return PreferencePair(
            user_says(request.format_prompt(_pick(TEMPLATES, rng))),
            first,
            second,
            signals=PairSignals(chosen_win_rate=round(rates[0], 4), rejected_win_rate=round(rates[1], 4)),
        )


def with_reward_margin(pair: PreferencePair) -> PreferencePair:
    """Return a pair with the margin of MODPO's safety reward, which is `SAFETY_REWARD` for a safe answer."""
    assert pair.labels is not None
    margin = SAFETY_REWARD * (pair.labels.chosen - pair.labels.rejected)
    return replace(pair, signals=replace(pair.signals, reward_margin=margin))


def _with_progress(pairs: Iterator[PreferencePair], advance: Callable[[int], None]) -> Iterator[PreferencePair]:
    for pair in pairs:
        yield pair
        advance(1)


def _demonstration(prompt: str, completion: str) -> Demonstration:
    return Demonstration(user_says(prompt), completion)


def _win_probability(score: float, opponent: float) -> float:
    return 1 / (1 + math.exp(-SHARPNESS * (score - opponent)))


def _refusal(request: Request, rng: Random) -> str:
    return request.format_refusal(1 + int(3 * rng.random()))


# `Random.choice` and `Random.shuffle` aren't guaranteed to give the same results in every version of Python;
# `Random.random` is.
def _pick(values: tuple[T, ...] | list[T], rng: Random) -> T:
    return values[int(rng.random() * len(values))]


def _shuffled(values: list[T], rng: Random) -> list[T]:
    return [value for _, _, value in sorted((rng.random(), index, value) for index, value in enumerate(values))]
