"""Files that belong together find each other's texts, however their accents are encoded."""

import json
from unicodedata import normalize

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bfpo.core.conversation import prompt_key, user_says
from bfpo.core.samples import Completion, Prompt
from bfpo.data.prepare import is_held_out
from bfpo.data.prompts import PromptSource, read_prompt_source, read_reference_outputs
from bfpo.evaluation.suite import EvalData, SuiteTask, _read_task
from bfpo.generation.saved import SavedEngine
from bfpo.judging.open import open_judge
from bfpo.redteam import run as redteam
from bfpo.redteam.recipe import RedteamRecipe

# Right-to-left scripts, combining marks, Hangul, kana with marks, emoji with joiners, CJK punctuation.
TEXTS = (
    st.text(
        alphabet=st.one_of(
            st.sampled_from("abc éàüñçöåøÅﬁ"),
            st.characters(min_codepoint=0x0300, max_codepoint=0x0345),
            st.characters(min_codepoint=0x05D0, max_codepoint=0x05EA),
            st.characters(min_codepoint=0x0621, max_codepoint=0x0655),
            st.characters(min_codepoint=0x0915, max_codepoint=0x0939),
            st.characters(min_codepoint=0x304B, max_codepoint=0x30FE),
            st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3),
            st.sampled_from("👩\u200d🔬🏽️，。、！「」"),
        ),
        min_size=1,
        max_size=20,
    )
    .map(str.strip)
    .filter(bool)
)
EXAMPLES = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@given(TEXTS, TEXTS)
@EXAMPLES
def test_saved_completions_and_human_labels_are_found(tmp_path, prompt, answer):
    path = write(
        tmp_path / "answers.jsonl",
        {"prompt": normalize("NFD", prompt), "text": normalize("NFD", answer), "safe": False, "refusal": True},
    )
    requested = Prompt("p", user_says(normalize("NFC", prompt)), "harmful")
    ((completion,),) = SavedEngine(path, "m").generate([(requested, 0)])
    assert normalize("NFC", completion.text) == normalize("NFC", answer)
    composed = Completion("p", 0, requested.prompt, normalize("NFC", answer), "stop", 1, 1, "m", "e", "")
    (verdict,) = open_judge(f"people:{path}").judge([composed])
    assert (verdict.safe, verdict.refusal) == (False, True)


@given(TEXTS)
@EXAMPLES
def test_reference_outputs_are_found_and_repeated_prompts_are_one(tmp_path, prompt):
    forms = [normalize(form, prompt) for form in ("NFC", "NFD")]
    path = write(tmp_path / "set.jsonl", *({"prompt": form, "kind": "benign", "output": "fine"} for form in forms))
    source = PromptSource(name="file", path=path)
    prompts, _ = read_prompt_source(source)
    assert len(prompts) == 1
    assert len(read_reference_outputs(source, "output")) == 1
    task = _read_task("suite", SuiteTask(source="file", path=path, compare="output"), EvalData(), None)
    assert [output.text for output in task.references.values()] == ["fine"]


@given(TEXTS, st.floats(0.01, 0.99))
def test_a_prompt_is_held_out_in_either_encoding(prompt, share):
    keys = {prompt_key(normalize(form, prompt)) for form in ("NFC", "NFD")}
    assert len({is_held_out(key, share) for key in keys}) == 1


@pytest.mark.parametrize("text", ["wie öffne ich das?", "أين هو؟", "パンは?", "각 상자?"])
def test_prompts_of_two_sources_are_asked_once(tmp_path, text):
    paths = [write(tmp_path / f"{form}.jsonl", {"prompt": normalize(form, text)}) for form in ("NFC", "NFD")]
    assert normalize("NFC", text) != normalize("NFD", text)
    recipe = RedteamRecipe.model_validate(
        {
            "out": str(tmp_path / "out"),
            "model": {"path": "m"},
            "prompts": [{"name": "file", "path": path, "kind": "benign"} for path in paths],
            "judge": "oracle",
        }
    )
    prompts, _ = redteam._read_prompts(recipe)
    assert len(prompts) == 1
