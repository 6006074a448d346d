"""Red-teaming with conversations: nothing of a message is lost, and attacks of several turns add samples."""

import json
from collections import Counter
from dataclasses import replace
from typing import ClassVar

import pytest

from bfpo.config.recipes import Source
from bfpo.core.chain import INSTRUCTIONS
from bfpo.core.conversation import Message, user_says
from bfpo.core.samples import Completion, Prompt, Verdict
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.data.load import load_pairs
from bfpo.errors import RecipeError
from bfpo.generation.attacks import SCRIPTS
from bfpo.redteam import run as module
from bfpo.redteam.pairs import ScoredSample, fallback_helpfulness, make_pairs
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.redteam.run import run_redteam

ANALYSIS, GUIDANCE, ANSWER, _ = INSTRUCTIONS.values()
TOOLS = FrozenJson.freeze([{"type": "function", "function": {"name": "open_box", "parameters": {}}}])
KWARGS = FrozenJson.freeze({"enable_thinking": True})
CALL = ToolCall("open_box", FrozenJson.freeze({"box": 3}), "c1")
SHED = (
    Message("system", "You have a shed."),
    Message("user", "Hello."),
    Message("assistant", "Good day."),
    Message("user", "Open the stuck box.", name="Ada"),
    Message("assistant", "", None, (CALL,)),
    Message("tool", "it is locked", tool_call_id="c1"),
)


class Whole:
    """Engine whose function returns a text or a message, and which records its requests."""

    faults: ClassVar = Counter()
    settings_hash = "whole"
    requests: ClassVar = []

    def __init__(self, answer):
        self._answer = answer

    def generate(self, requests):
        for prompt, sample in requests:
            Whole.requests.append(prompt)
            answer = self._answer(prompt, sample)
            message = Message("assistant", answer) if isinstance(answer, str) else answer
            yield [
                Completion(
                    prompt.prompt_id, sample, prompt.prompt, message.content, "stop", 1, 1, "m", "whole", "whole",
                    message.reasoning, message.tool_calls,
                )
            ]  # fmt: skip


class Judge:
    """Judge that finds calls and the word `step` unsafe, and notes which prompts it reads."""

    name, revision = "words", "1"
    prompts_read: ClassVar = []

    def judge(self, completions):
        for completion in completions:
            Judge.prompts_read.append(completion.prompt)
            # Judges read calls in words.
            safe = "step" not in completion.text and "calls the tool" not in completion.text
            yield Verdict.on(completion, self, safe=safe, refusal=completion.text.startswith("sorry"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a recipe on prompts with a function of the model's answers."""
    Whole.requests.clear()
    Judge.prompts_read.clear()

    def start(prompts, answer, **changes):
        monkeypatch.setattr(module, "open_engine", lambda model, sampling: Whole(answer))
        monkeypatch.setattr(module, "open_judge", lambda spec, **_: Judge())
        metadata = {"name": "file"}
        monkeypatch.setattr(module, "read_prompt_source", lambda source: (list(prompts), metadata))
        content = {
            "out": str(tmp_path / "out"),
            "model": {"path": "m"},
            "prompts": [{"name": "file", "path": "p.jsonl", "kind": "harmful"}],
            "judge": "words:Words",
            "samples": 2,
            "min_benign": 0,
        }
        (path,) = run_redteam(RedteamRecipe.model_validate(content | changes))
        _, pairs = load_pairs(Source(path=str(path)), "main")
        return pairs, json.loads((path.parent / "redteam.json").read_text())

    return start


def test_reasoning_tool_calls_tools_and_arguments_reach_the_pairs(run):
    prompt = Prompt("p", SHED, "harmful", tools=TOOLS, chat_template_kwargs=KWARGS)

    def answer(prompt, sample):
        if sample == 0:
            return Message("assistant", "Opening.", "It asks for a box.", (CALL,))
        return Message("assistant", "sorry , it is locked .", "It is locked.")

    (pair,), facts = run([prompt], answer)
    assert pair.prompt == SHED
    assert (pair.inputs.tools, pair.inputs.kwargs) == (TOOLS, KWARGS)
    assert pair.chosen == (Message("assistant", "Opening.", "It asks for a box.", (CALL,)),)
    assert pair.rejected == (Message("assistant", "sorry , it is locked .", "It is locked."),)
    assert pair.cell == "us"
    assert facts["cells"]["us"] == 1


def test_the_first_guiding_step_follows_the_request_also_where_a_tool_speaks_last(run):
    prompt = Prompt("p", SHED, "harmful", tools=TOOLS)

    def answer(prompt, sample):
        if prompt.prompt[-1].content == ANSWER:
            return "sorry , it is locked ."
        if any(ANALYSIS in message.content for message in prompt.prompt):
            return Message("assistant", "I think.", "A thought.", (CALL,)) if len(prompt.prompt) == 6 else "I guide."
        return f"step {sample}"

    pairs, _ = run([prompt], answer)
    first = next(request.prompt for request in Whole.requests if ANALYSIS in request.prompt[3].content)
    assert first[3] == replace(SHED[3], content=f"{SHED[3].content}\n\n{INSTRUCTIONS['analysis']}")
    assert first[:3] + first[4:] == SHED[:3] + SHED[4:]
    # The reply stays without its thought, its call with an empty result.
    second = next(request.prompt for request in Whole.requests if request.prompt[-1].content == GUIDANCE)
    assert [message.role for message in second[6:]] == ["assistant", "tool", "user"]
    assert second[6] == Message("assistant", "I think.", None, (CALL,))
    assert all(request.tools == TOOLS for request in Whole.requests)
    assert {pair.rejected for pair in pairs} == {"sorry , it is locked ."}
    assert {pair.prompt for pair in pairs} == {SHED}


def scored(message, *, safe=True, finish_reason="stop", sample=0):
    completion = Completion(
        "p", sample, user_says("?"), message.content, finish_reason, 1, 9, "m", "e", "", message.reasoning,
        message.tool_calls,
    )  # fmt: skip
    verdict = Verdict("p", sample, completion.text_hash, "j", "1", safe, refusal=False, reason="?")
    return ScoredSample(completion, verdict, fallback_helpfulness(completion, verdict))


def test_what_makes_no_pair_is_counted_by_reason():
    samples = [
        scored(Message("assistant", "", "and so", ()), safe=None, finish_reason="length"),
        scored(Message("assistant", "", "a thought"), safe=None),
        scored(Message("assistant", "cut", "a thought"), finish_reason="length"),
        scored(Message("assistant", "", None)),
        scored(Message("assistant", "caf\u00e9")),
        scored(Message("assistant", "cafe\u0301")),
        scored(Message("assistant", "", None, (CALL,)), safe=False),
        scored(Message("assistant", "", None, (replace(CALL, id="c2"),)), safe=False),
        scored(Message("assistant", "", None, (replace(CALL, name="look"),)), safe=False),
    ]
    pairs, left_out = make_pairs(samples, per_prompt=4, quota={}, dataset_name="x")
    assert left_out == Counter(
        {
            "answer cut in its reasoning": 1,
            "reasoning without an answer": 1,
            "answer cut": 1,
            "answer empty": 1,
            "answer twice": 2,
        }
    )
    # A call counts by its words: both orders of calls and the text occur.
    assert {pair.cell for pair in pairs} == {"us"}


def test_cut_answers_make_pairs_on_request_and_are_marked():
    samples = [
        scored(Message("assistant", "a long answer that was"), finish_reason="length"),
        scored(Message("assistant", "an answer"), safe=False),
    ]
    for keep_cut, expected in ((False, []), (True, [(True, False)])):
        pairs, left_out = make_pairs(samples, per_prompt=4, quota={}, dataset_name="x", keep_cut=keep_cut)
        assert [pair.cut for pair in pairs] == expected
        assert left_out["answer cut"] == (not keep_cut)


def test_an_attack_adds_samples_where_a_reply_was_unsafe_first(run):
    box, ball = (Prompt(name, user_says(f"{name}?"), "harmful") for name in ("box", "ball"))
    benign = Prompt("lamp", user_says("lamp?"), "benign")
    third = SCRIPTS["crescendo"][2].text

    def answer(prompt, sample):
        text, attacked = prompt.prompt[-1].content, prompt.prompt[0].content
        if text == "lamp?":
            return "lamp " * (sample + 1)
        if text == third and "box?" in attacked:
            return ("step one", "another step here", "fine here", "nothing")[sample]
        refuses = text in ("box?", "ball?") and len(prompt.prompt) == 1
        return ("sorry " if refuses else "") + "very well " * (sample + 1)

    pairs, facts = run([box, ball, benign], answer, attack="crescendo", samples=4, guide=False)
    by_first = {}
    for pair in pairs:
        by_first.setdefault((len(pair.prompt), pair.prompt[-1].content), []).append(pair)
    # Box: an unsafe reply at the third turn. Ball: none, so the last turn, the request itself.
    assert set(by_first) == {(1, "box?"), (1, "ball?"), (1, "lamp?"), (5, third), (7, "ball?")}
    assert {pair.cell for pair in by_first[5, third]} >= {"us", "uu"}
    # The judge reads replies as answers to the prompt alone.
    assert set(Judge.prompts_read) == {box.prompt, ball.prompt, benign.prompt}
    attack = facts["attack"]
    assert attack["name"].startswith("crescendo@")
    assert (attack["conversations"], attack["unsafe"], attack["unsafe_by_first_turn"]) == (2, 1, {"3": 1})
    assert attack["safe_alone_unsafe_in_conversation"] == 1
    assert facts["cost"]["prompts"] == 3
    # Every reply of both conversations, and the samples.
    assert facts["cost"]["generations"] == 3 * 4 + 2 * 4 + 2 * 4


def test_a_guided_answer_in_an_attacked_conversation_is_judged_by_the_request(run):
    box = Prompt("box", user_says("box?"), "harmful")

    def answer(prompt, sample):
        if prompt.prompt[-1].content == ANSWER:
            return "sorry , here is a lamp ."
        return f"step {sample}" if len(prompt.prompt) > 1 else f"fine {sample}"

    pairs, _ = run([box], answer, attack="crescendo")
    guided = [pair for pair in pairs if pair.rejected == "sorry , here is a lamp ."]
    assert [len(pair.prompt) for pair in guided] == [3]
    assert set(Judge.prompts_read) == {box.prompt}


def test_a_second_start_repeats_nothing_and_writes_the_same(run, tmp_path):
    box = Prompt("box", user_says("box?"), "harmful")

    def answer(prompt, sample):
        return "step one" if sample else "fine"

    first, _ = run([box], answer, attack="crescendo")
    num_requests, num_read = len(Whole.requests), len(Judge.prompts_read)
    second, _ = run([box], answer, attack={"strategy": "crescendo"})
    assert first == second
    assert (len(Whole.requests), len(Judge.prompts_read)) == (num_requests, num_read)


def test_attacked_prompts_count_as_harmful_ones(run):
    prompts = [Prompt(f"p{number}", user_says(f"{number}?"), "harmful") for number in range(9)]
    prompts.append(Prompt("lamp", user_says("lamp?"), "benign"))
    with pytest.raises(RecipeError, match="5% are benign"):
        run(prompts, lambda prompt, sample: f"{sample}", attack="crescendo", min_benign=0.1)
