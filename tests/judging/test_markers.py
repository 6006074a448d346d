"""Markers in what a judge reads: broken up, for every family of models and any special token."""

import time
from copy import deepcopy

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bfpo.core.markers import MARKERS, MARKERS_BY_FAMILY
from bfpo.generation.in_process import TransformersEngine
from bfpo.judging.formats import GUARDS
from bfpo.judging.guards import GuardJudge
from bfpo.judging.markers import escape_markers
from bfpo.judging.open import open_judge
from bfpo.judging.rubric import render, render_comparison
from bfpo.judging.scorers import ScoreJudge

from .stand_ins import completion, stand_in_tokenizer

CHARACTERS = st.text(alphabet=" \t\nab<|>", max_size=6)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=" \t\nab<|>", max_size=20), special=st.lists(CHARACTERS, max_size=4))
@example(text="yes <tool> no", special=[" <tool>"])
@example(text="a  a  ", special=["a  ", "  a"])
@example(text="aa a", special=["aa", "a a", "a  a"])
def test_no_marker_remains_and_nothing_but_spaces_is_added(text, special):
    started = time.monotonic()
    result, has_markers = escape_markers(text, special)
    assert time.monotonic() - started < 1
    breakable = [marker for marker in (*MARKERS, *special) if len(marker.strip()) > 1]
    assert not any(marker in result for marker in breakable)
    assert has_markers is any(marker in text for marker in breakable)
    assert "".join(result.split()) == "".join(text.split())
    assert escape_markers(result, special) == (result, False)


def test_a_token_that_begins_with_a_blank_is_broken_up():
    assert escape_markers("yes <tool> no", (" <tool>",)) == ("yes < tool> no", True)
    # Where the blank is missing, the tokenizer finds no token.
    assert escape_markers("yes<tool> no", (" <tool>",)) == ("yes<tool> no", False)


@pytest.mark.parametrize("family", MARKERS_BY_FAMILY)
def test_every_judge_escapes_the_markers_of_every_family(family):
    guard_tokenizer = stand_in_tokenizer("llama-guard")
    guards = [GuardJudge(kind, None, stand_in_tokenizer(kind), "toy") for kind in GUARDS]
    scorers = [
        ScoreJudge(kind, None, guard_tokenizer, "toy")
        for kind in ("beaver-cost", "beaver-reward", "reward", "classifier")
    ]
    for marker in MARKERS_BY_FAMILY[family]:
        attack, plain = completion(f"a {marker} b", prompt=f"c {marker}"), completion("a  b", prompt="c ")
        for judge in (*guards, *scorers):
            guideline = [next(iter(judge.guidelines))] if getattr(judge, "name", "") == "shieldgemma" else []
            (text, changed), (expected, _) = judge.render(attack, *guideline), judge.render(plain, *guideline)
            # A judge's own template may have the marker itself.
            assert str(text).count(marker) == str(expected).count(marker), (judge.name, marker)
            assert changed
        assert marker not in render(attack)[0]
        assert marker not in render_comparison(attack, attack)


def test_a_rubric_judge_in_this_process_escapes_its_own_tokens(tmp_path, make_model, tokenizer):
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_tokens(["<|mine|>"], special_tokens=True)
    model = make_model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = open_judge(f"rubric:{tmp_path}")
    assert isinstance(judge.engine, TransformersEngine)
    requests = []
    judge.engine.generate = lambda prompts: requests.extend(prompts) or iter(())
    (verdict,) = judge.judge([completion("a <|mine|> b")])
    assert "markers" in verdict.reason
    ((prompt, _),) = requests
    assert "a < |mine|> b" in prompt.prompt[-1].content
