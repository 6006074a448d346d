"""Fixtures shared by the tests: a small tokenizer, a small model, neutral pairs in all four cells."""

import gc
import itertools
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from bfpo.config.recipes import NewModel
from bfpo.core import languages
from bfpo.core.conversation import Message
from bfpo.core.pairs import PreferencePair, Provenance, SafetyLabels
from bfpo.model.new import new_model, new_tokenizer

torch.set_num_threads(1)
# Examples may be slow on a busy machine.
settings.register_profile("bfpo", deadline=None)
settings.load_profile("bfpo")

SHAPES, COLORS = ("round", "square", "small", "large"), ("red", "green", "blue")
OBJECTS, PLACES = ("box", "ball", "door", "lamp"), ("near", "under", "behind")
SENTENCES = [" ".join(words) for words in itertools.product(SHAPES, COLORS, OBJECTS, PLACES)]


@pytest.fixture(scope="session", autouse=True)
def frozen_modules():
    """Exclude imported modules from garbage collection, which every `Trainer.train` starts (0.3 s with them)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return new_tokenizer(SENTENCES, vocab_size=400)


@pytest.fixture(scope="session")
def make_model(tokenizer) -> Callable[..., torch.nn.Module]:
    """Return a function that makes a new copy of the same tiny model."""

    def make(**changes):
        return new_model(NewModel(**changes), tokenizer)

    return make


def pair(
    number: int, *, chosen_safe: bool = True, rejected_safe: bool = True, stream: str = "main"
) -> PreferencePair:
    """Return a pair whose texts, of different lengths, depend on a number."""
    prompt = SENTENCES[number % len(SENTENCES)]
    return PreferencePair(
        (Message("user", f"{prompt} {number}"),),
        " ".join(SENTENCES[(3 * number) % 90 : (3 * number) % 90 + 1 + number % 3]),
        " ".join(SENTENCES[(5 * number + 1) % 90 : (5 * number + 1) % 90 + 1 + number % 2]),
        SafetyLabels(chosen_safe, rejected_safe),
        provenance=Provenance("toy", "human", stream),
    )


@pytest.fixture(scope="session")
def main_pairs() -> list[PreferencePair]:
    """12 pairs, three of each cell."""
    cells = [(True, True), (True, False), (False, True), (False, False)] * 3
    return [pair(number, chosen_safe=c, rejected_safe=r) for number, (c, r) in enumerate(cells)]


@pytest.fixture(scope="session")
def buffer_pairs() -> list[PreferencePair]:
    """10 pairs, all safe."""
    return [pair(number, stream="buffer") for number in range(20, 30)]


@pytest.fixture
def without_py3langid(monkeypatch):
    """Make guesses of languages impossible, as without the extra `languages`."""
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    languages._identifier.cache_clear()
    yield
    languages._identifier.cache_clear()
