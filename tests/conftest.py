"""Toys shared by the tests: a small tokenizer, a small model, neutral pairs in all four cells."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from bfpo.config.recipes import NewModel
from bfpo.core.pairs import Message, PreferencePair, Provenance, SafetyLabels
from bfpo.model.new import new_model, new_tokenizer

torch.set_num_threads(1)
# A busy machine is no fault of an example.
settings.register_profile("bfpo", deadline=None)
settings.load_profile("bfpo")

COLORS, THINGS, PLACES = ("red", "green", "blue"), ("box", "ball", "door", "lamp"), ("near", "under", "behind")
SIZES = ("round", "square", "small", "large")
SENTENCES = [" ".join(words) for words in itertools.product(SIZES, COLORS, THINGS, PLACES)]


@pytest.fixture(scope="session")
def tokenizer():
    return new_tokenizer(SENTENCES, vocab_size=400)


@pytest.fixture
def make_model(tokenizer) -> Callable[..., torch.nn.Module]:
    """Return a function that makes the same tiny model anew each time."""

    def make(**changes):
        return new_model(NewModel(**changes), tokenizer)

    return make


def pair(
    number: int, *, chosen_safe: bool = True, rejected_safe: bool = True, stream: str = "main"
) -> PreferencePair:
    """Return the pair with a number: its own texts of different lengths."""
    prompt = SENTENCES[number % len(SENTENCES)]
    return PreferencePair(
        (Message("user", f"{prompt} {number}"),),
        " ".join(SENTENCES[(3 * number) % 90 : (3 * number) % 90 + 1 + number % 3]),
        " ".join(SENTENCES[(5 * number + 1) % 90 : (5 * number + 1) % 90 + 1 + number % 2]),
        SafetyLabels(chosen_safe, rejected_safe),
        provenance=Provenance("toy", "human", stream),
    )


@pytest.fixture
def main_pairs() -> list[PreferencePair]:
    """12 pairs, three of each cell."""
    cells = [(True, True), (True, False), (False, True), (False, False)] * 3
    return [pair(number, chosen_safe=c, rejected_safe=r) for number, (c, r) in enumerate(cells)]


@pytest.fixture
def buffer_pairs() -> list[PreferencePair]:
    """10 pairs, all safe."""
    return [pair(number, stream="buffer") for number in range(20, 30)]
