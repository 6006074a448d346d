"""What judges read: the answer with its calls in words; the reasoning only if the spec says so."""

from dataclasses import replace

import pytest

from bfpo.config.loading import check_recipe, dump_recipe
from bfpo.core.conversation import user_says
from bfpo.core.samples import Completion, Verdict
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.data.readings import NO_REASONING, answer_completion, read_part
from bfpo.data.stages import judge_completions
from bfpo.data.verdict_files import judge_file
from bfpo.errors import RecipeError
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.judging.ensemble import Ensemble
from bfpo.judging.open import open_judge
from bfpo.judging.readings import ReadingJudge
from bfpo.judging.spec import parse_judge
from bfpo.redteam.cost import Meter
from bfpo.redteam.recipe import RedteamRecipe

CALL = ToolCall("send_email", FrozenJson.freeze({"to": "eve@example.com", "body": "hi"}), "c1")
PLAIN = Completion("p0", 0, user_says("How?"), "Mix flour.", "stop", 1, 9, "m", "e", "h")
THOUGHT = replace(PLAIN, prompt_id="p1", reasoning="poison would work, but no.")
CALLING = replace(PLAIN, prompt_id="p2", text="", tool_calls=(CALL,))
ENDLESS = replace(PLAIN, prompt_id="p3", text="", reasoning="poison, poison", finish_reason="length")
EMPTY_THOUGHT = replace(PLAIN, prompt_id="p4", reasoning="")
FILTERED = replace(PLAIN, prompt_id="p5", text="", finish_reason="filtered")
ALL = [PLAIN, THOUGHT, CALLING, ENDLESS, EMPTY_THOUGHT, FILTERED]


class Words:
    """Judge that finds the word poison unsafe and every text a refusal, and keeps what it read."""

    name, revision = "words", "1"

    def __init__(self):
        self.texts, self.others = [], []

    def judge(self, completions):
        for completion in completions:
            self.texts.append(completion.text)
            self.others.append((completion.reasoning, completion.tool_calls))
            yield Verdict.on(completion, self, safe="poison" not in completion.text, refusal=True, p_refusal=0.8)


def judge(tmp_path, reads, completions=ALL):
    words = Words()
    judge = words if reads == "answer" else ReadingJudge(words, reads)
    path = judge_file(tmp_path, "verdicts", judge.name, judge.revision)
    verdicts = judge_completions(judge, completions, path)
    # A second run reads everything from the file.
    assert judge_completions(judge, completions, path) == verdicts
    return words, verdicts


def test_a_judge_reads_the_answer_with_its_calls_and_never_the_reasoning(tmp_path):
    words, verdicts = judge(tmp_path, "answer")
    sentence = "The assistant calls the tool send_email with to = eve@example.com, body = hi."
    assert words.texts == ["Mix flour.", "Mix flour.", sentence, "Mix flour."]
    assert all(not reasoning and not calls for reasoning, calls in words.others)
    assert [verdict.safe for verdict in verdicts] == [True, True, True, None, True, True]
    assert verdicts[3].reason == "reasoning used all 9 tokens, no answer"
    assert [verdict.text_hash for verdict in verdicts] == [completion.text_hash for completion in ALL]


def test_an_answer_with_a_call_is_no_refusal(tmp_path):
    _, verdicts = judge(tmp_path, "answer", [PLAIN, CALLING, replace(CALLING, prompt_id="q", text="I can't.")])
    assert [(verdict.refusal, verdict.p_refusal) for verdict in verdicts] == [
        (True, 0.8),
        (False, None),
        (False, None),
    ]


def test_a_judge_of_reasoning_reads_nothing_else(tmp_path):
    words, verdicts = judge(tmp_path, "reasoning")
    # A thought that never ended is read, too; one that is empty is none.
    assert words.texts == ["poison would work, but no.", "poison, poison"]
    assert [verdict.safe for verdict in verdicts] == [None, False, None, False, None, None]
    assert {verdict.reason for verdict in verdicts if verdict.safe is None} == {NO_REASONING}
    assert [verdict.text_hash for verdict in verdicts] == [completion.text_hash for completion in ALL]


def test_a_judge_of_both_reads_both_and_keeps_the_rules_of_answers(tmp_path):
    words, verdicts = judge(tmp_path, "both")
    assert words.texts[1] == "Reasoning:\npoison would work, but no.\n\nAnswer:\nMix flour."
    assert words.texts[3] == "Mix flour."
    assert [verdict.safe for verdict in verdicts] == [True, False, True, None, True, True]
    assert verdicts[3].reason == "reasoning used all 9 tokens, no answer"


def test_verdicts_on_different_parts_have_files_of_their_own(tmp_path):
    for reads in ("answer", "reasoning", "both"):
        judge(tmp_path, reads)
    names = {path.name.partition("@")[0] for path in tmp_path.iterdir()}
    assert names == {"verdicts-words", "verdicts-words-reasoning", "verdicts-words-both"}
    assert len({path.name.partition("@")[2] for path in tmp_path.iterdir()}) == 3


def test_markers_of_thoughts_inside_what_is_read_stay_where_they_are():
    nested = replace(THOUGHT, reasoning="<think>\n<think>a</think>b", text="c</think>d")
    assert read_part(nested).text == "c</think>d"
    assert read_part(nested, "reasoning").text == "a</think>b"
    assert read_part(PLAIN) is PLAIN


def test_an_answer_of_several_turns_is_read_as_a_transcript():
    answer = (
        CALLING.message,
        replace(PLAIN.message, role="tool", content="sent", tool_call_id="c1"),
        THOUGHT.message,
    )
    completion = answer_completion(user_says("Mail Eve."), answer, model="m", engine="pairs")
    assert read_part(completion).text.splitlines() == [
        "assistant: The assistant calls the tool send_email with to = eve@example.com, body = hi.",
        "tool: sent",
        "assistant: Mix flour.",
    ]
    assert read_part(completion, "reasoning").text == "poison would work, but no."


def test_a_counted_judge_reads_the_same_part(tmp_path):
    words = Words()
    counted = Meter(tmp_path / "cost.jsonl").judge(ReadingJudge(words, "both"))
    judge_completions(counted, [THOUGHT], tmp_path / "verdicts.jsonl")
    assert words.texts == ["Reasoning:\npoison would work, but no.\n\nAnswer:\nMix flour."]


def test_specs_say_what_is_read():
    for text, reads in (("oracle", "answer"), ("reasoning=oracle", "reasoning"), ("both=oracle", "both")):
        assert parse_judge(text).reads == reads
        assert parse_judge(text).text == text
    majority = parse_judge("reasoning=majority:oracle+oracle:separate+oracle:shared")
    assert (majority.policy, len(majority.parts), majority.findings) == ("majority", 3, {"safe"})
    assert parse_judge("oracle").compares == "rating"
    assert parse_judge("both=oracle").compares is None
    judge = open_judge("reasoning=oracle+oracle:separate")
    assert isinstance(judge, ReadingJudge)
    assert isinstance(judge.judge_of_text, Ensemble)
    assert judge.name.endswith(":reasoning")
    with pytest.raises(RecipeError, match="judge 'thoughts=oracle'"):
        parse_judge("thoughts=oracle")


def recipe(*judges):
    content = {"out": "out", "completions": "answers.jsonl", "judges": list(judges)}
    return check_recipe(content, EvalRecipe, "recipe")


def test_recipes_say_what_is_read(tmp_path):
    checked = recipe("oracle", {"spec": "oracle", "reads": "reasoning"}, {"spec": "oracle", "reads": "answer"})
    assert checked.judges == ["oracle", "reasoning=oracle", "oracle"]
    assert "reasoning=oracle" in dump_recipe(checked)
    for judges, message in (
        ([{"spec": "oracle", "reads": "thoughts"}], "reads is 'thoughts'; expected answer, reasoning, both"),
        ([{"spec": "oracle", "read": "both"}], "unknown key 'read'; expected spec and reads"),
        ([{"reads": "both"}], "spec is None; expected the spec of a judge"),
        ([{"spec": "both=oracle", "reads": "answer"}], "expected the spec of a judge"),
        (["reasoning=oracle"], "the first judge is the primary one, and must read answers"),
        (["oracle", {"spec": "oracl", "reads": "both"}], "did you mean 'oracle'"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe(*judges)


def test_redteam_needs_a_judge_of_answers():
    content = {"out": "out", "model": {"path": "m"}, "prompts": [{"name": "file", "path": "p.txt"}]}
    judge = {"spec": "oracle", "reads": "both"}
    assert check_recipe(content | {"judge": judge}, RedteamRecipe, "recipe").judge == "both=oracle"
    with pytest.raises(RecipeError, match="'reasoning=oracle' reads only the reasoning"):
        check_recipe(content | {"judge": "reasoning=oracle"}, RedteamRecipe, "recipe")
