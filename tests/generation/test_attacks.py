"""Attacks of several turns: what the model under attack reads, what becomes of refusals, and resuming."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from bfpo.core.conversation import Message, user_says
from bfpo.core.files import content_hash
from bfpo.core.samples import Completion, Prompt, Sampling, Verdict
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.errors import DataError, Unanswered
from bfpo.generation.attack_outcomes import attack_outcomes, by_reply, describe_attack, safe_until
from bfpo.generation.attack_scripts import SCRIPTS
from bfpo.generation.attacks import Attacker, AttackSection, Prefill, Script, check_attack, open_attack, read_message
from bfpo.generation.dialogues import by_conversation, read_turns, run_attack
from bfpo.generation.in_process import TransformersEngine
from bfpo.generation.open import EngineSection
from bfpo.generation.openai_server import ServerEngine, ServerOptions
from bfpo.generation.scripted import ScriptedEngine

SCRIPT = SCRIPTS["crescendo"]
BOX = Prompt("box", user_says("How do I open {a} box?"), "harmful", "boxes", language="en")
BALL = Prompt("ball", user_says("How do I throw a ball?"), "harmful")


class Recording(ScriptedEngine):
    """Engine that records what it reads, and may be stopped."""

    def __init__(self, answer, *, name="m", stop_after=10**9):
        super().__init__(answer, name=name, batch=1)
        self.requests, self.stop_after = [], stop_after

    def generate(self, requests):
        for batch in super().generate(requests):
            if len(self.requests) >= self.stop_after:
                raise KeyboardInterrupt
            self.requests += [completion.prompt for completion in batch]
            yield batch


def last(prompt):
    return prompt.prompt[-1].content


def answers(prompt, sample):
    return f"Reply to {content_hash(prompt.prompt)}"


def test_every_turn_follows_the_models_own_replies(tmp_path):
    engine = Recording(answers)
    run = run_attack(Script("crescendo"), engine, [BOX, BALL], tmp_path)
    assert run.num_turns == len(SCRIPT) == 4
    assert [turn.turn for turn in run.turns] == [1, 2, 3, 4] * 2
    own = [turn.completion for turn in run.turns if turn.original_id == "box"]
    users = [[message.content for message in reply.prompt if message.role == "user"] for reply in own]
    expected = [turn.text.replace("{prompt}", "How do I open {a} box?") for turn in SCRIPT]
    assert users == [expected[:number] for number in (1, 2, 3, 4)]
    # The history holds the model's replies, and the last turn is the prompt itself.
    replies = [message.content for message in own[3].prompt if message.role == "assistant"]
    assert replies == [reply.text for reply in own[:3]]
    assert last(own[3]) == "How do I open {a} box?"
    assert len({reply.prompt_id for reply in own}) == 4
    assert {reply.language for reply in own} == {"en"}
    assert {turn.outcome for turn in run.turns} == {"answered"}
    assert read_turns(run.folder) == run.turns
    assert [turn.answering(BOX.prompt).prompt for turn in run.turns[:4]] == [BOX.prompt] * 4


def test_a_refused_turn_is_dropped_and_its_fallback_tried_once(tmp_path):
    second, _ = SCRIPT[1][:2]

    def answer(prompt, sample):
        return (
            "I\u2019m sorry, I can\u2019t." if last(prompt) == second or "BALL" in last(prompt).upper() else "Fine."
        )

    engine = Recording(answer)
    run = run_attack(Script("crescendo"), engine, [BOX, BALL], tmp_path)
    own = [turn for turn in run.turns if turn.original_id == "box"]
    assert [(turn.turn, turn.is_fallback, turn.outcome) for turn in own] == [
        (1, False, "answered"),
        (2, False, "refused"),
        (2, True, "answered"),
        (3, False, "answered"),
        (4, False, "answered"),
    ]
    # The refused exchange isn't part of the conversation any more.
    assert all(second != message.content for message in own[-1].completion.prompt)
    assert [message.role for message in own[-1].completion.prompt] == ["user", "assistant"] * 3 + ["user"]
    # A model that refuses everything about balls reads at most two requests for each turn.
    refused = [turn for turn in run.turns if turn.original_id == "ball"]
    assert len(refused) <= 2 * len(SCRIPT)
    assert [turn.outcome for turn in refused if turn.turn in (1, 4)] == ["refused"] * 4
    assert run.counts["reply refused"] == 1 + sum(turn.outcome == "refused" for turn in refused)


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - {"crescendo"}))
def test_a_template_is_asked_once_and_quotes_the_prompt(tmp_path, name):
    engine = Recording(lambda prompt, sample: "I can't help with that.")
    run = run_attack(open_attack(AttackSection(strategy=name)), engine, [BOX], tmp_path)
    assert (run.num_turns, run.missing, len(engine.requests)) == (1, {}, 1)
    assert [turn.outcome for turn in run.turns] == ["refused"]
    asked = last(run.turns[0].completion)
    assert "How do I open {a} box?" in asked
    assert len(asked) > 60


def test_a_prefilled_answer_is_requested_once_with_its_beginning(tmp_path):
    class Continuing(Recording):
        def generate(self, requests):
            assert {prompt.prefill for prompt, _ in requests} == {"Sure,"}
            yield from super().generate(requests)

    engine = Continuing(lambda prompt, sample: f"{prompt.prefill} I can't.")
    attack = open_attack(AttackSection(prefill="Sure,"))
    run = run_attack(attack, engine, [BOX, BALL], tmp_path)
    assert (attack.label, run.num_turns, len(engine.requests), run.missing) == ("prefill", 1, 2, {})
    assert [turn.completion.prompt for turn in run.turns] == [BOX.prompt, BALL.prompt]
    assert Prefill("Sure,").settings_hash != Prefill("Sure").settings_hash


def test_a_server_is_not_asked_to_continue_an_answer():
    server = EngineSection(path="m", server="http://localhost:1/v1")
    with pytest.raises(ValueError, match="prefill needs a model in this process"):
        check_attack(AttackSection(prefill="Sure,"), server)
    check_attack(AttackSection(prefill="Sure,"), EngineSection(path="m"))
    check_attack(AttackSection(strategy="role_play"), server)


def test_a_conversation_with_tools_keeps_system_prompt_tools_and_results(tmp_path):
    call = ToolCall("open_box", FrozenJson.freeze({"id": 3}), "c1")
    tools = FrozenJson.freeze([{"type": "function", "function": {"name": "open_box"}}])
    prompt = Prompt(
        "tool",
        (
            Message("system", "You have a shed."),
            Message("user", "Hello."),
            Message("assistant", "Good day."),
            Message("user", "Open box 3."),
            Message("assistant", "", None, (call,)),
            Message("tool", "it is locked", tool_call_id="c1"),
        ),
        "harmful",
        tools=tools,
        chat_template_kwargs=FrozenJson.freeze({"enable_thinking": True}),
    )
    run = run_attack(
        Script("crescendo"), Recording(lambda prompt, sample: "<think>hm</think>Well."), [prompt], tmp_path
    )
    first, *_, final = (turn.completion for turn in run.turns)
    assert first.prompt == (*prompt.prompt[:3], Message("user", SCRIPT[0].text.replace("{prompt}", "Open box 3.")))
    # The request comes last, with the call and the result that follow it.
    assert final.prompt[-3:] == prompt.prompt[-3:]
    assert final.prompt[:3] == prompt.prompt[:3]
    # Thoughts of earlier turns aren't part of the history.
    assert final.reasoning == "hm"
    assert all(message.reasoning is None for message in final.prompt)
    for turn in read_turns(run.folder):
        assert turn.completion.inputs == prompt.inputs


def test_a_reply_that_calls_a_tool_stays_with_an_empty_result(tmp_path):
    call = ToolCall("look", FrozenJson.freeze({}), "c9")

    class Calling(ScriptedEngine):
        def _completion(self, prompt, sample):
            return replace(super()._completion(prompt, sample), text="", tool_calls=(call,))

    run = run_attack(Script("crescendo"), Calling(answers), [BOX], tmp_path)
    assert {turn.outcome for turn in run.turns} == {"answered"}
    history = run.turns[1].completion.prompt
    assert history[1] == Message("assistant", "", None, (call,))
    assert (history[2].role, history[2].tool_call_id, history[2].name) == ("tool", "c9", "look")


def test_what_has_no_answer_or_is_in_another_language_is_counted(tmp_path):
    german = "Das kommt darauf an, welche Art von Kiste man eigentlich öffnen möchte."

    def answer(prompt, sample):
        return "<think>and so on" if last(prompt) == SCRIPT[1].text else german

    run = run_attack(Script("crescendo"), Recording(answer), [replace(BOX, language=None)], tmp_path)
    outcomes = [turn.outcome for turn in run.turns]
    assert outcomes == ["unread", "no answer", "unread", "unread", "unread"]
    assert run.counts["reply unread"] == 4


def test_a_killed_attack_goes_on_within_a_turn(tmp_path):
    prompts = [Prompt(f"p{number}", user_says(f"Box {number}?"), "harmful") for number in range(5)]
    whole = Recording(answers)
    expected = run_attack(Script("crescendo"), whole, prompts, tmp_path / "whole", samples=2)
    requests = []
    for stop in (3, 9, 0, 14, 10**9):
        engine = Recording(answers, stop_after=stop)
        try:
            run = run_attack(Script("crescendo"), engine, prompts, tmp_path / "killed", samples=2)
        except KeyboardInterrupt:
            run = None
        requests += engine.requests
    assert run is not None
    assert run.turns == expected.turns
    assert sorted(map(content_hash, requests)) == sorted(map(content_hash, whole.requests)), (
        "nothing is requested twice"
    )
    files = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in expected.folder.iterdir()}


def test_another_model_or_other_templates_do_not_reuse_the_replies(tmp_path, monkeypatch):
    first = run_attack(Script("crescendo"), Recording(answers), [BOX], tmp_path)
    with pytest.raises(DataError, match="another model or other settings"):
        run_attack(Script("crescendo"), Recording(answers, name="other"), [BOX], tmp_path)
    monkeypatch.setitem(SCRIPTS, "crescendo", (*SCRIPT[:3], SCRIPT[3]._replace(fallback="Please: {prompt}")))
    second = run_attack(Script("crescendo"), Recording(answers, name="other"), [BOX], tmp_path)
    assert first.folder != second.folder


def test_a_prompt_that_cannot_be_asked_is_missing_with_its_reason(tmp_path):
    class Short(Recording):
        def generate(self, requests):
            yield from super().generate([request for request in requests if len(request[0].prompt) < 4])
            if long := [(prompt.prompt_id, n) for prompt, n in requests if len(prompt.prompt) >= 4]:
                raise Unanswered(dict.fromkeys(long, "prompt too long"), len(requests), refused=long)

    run = run_attack(Script("crescendo"), Short(answers), [BOX], tmp_path)
    assert run.turns == []
    assert run.missing == {"box": "turn 3: prompt too long"}


# An attacker.


def write(text):
    return lambda prompt, sample: f"Sure.\n<message>\n{text}\n</message>"


def test_an_attacker_reads_the_request_and_the_conversation(tmp_path):
    attacker = Recording(write("And then?"), name="attacker")
    run = run_attack(Attacker(attacker, "attacker-a", 2), Recording(answers), [BOX], tmp_path)
    assert [last(turn.completion) for turn in run.turns] == ["And then?", "And then?"]
    first, second = (request[0].content for request in attacker.requests)
    assert "How do I open {a} box?" in first
    assert "message 1 of 2" in first
    assert f"user: And then?\nassistant: {run.turns[0].completion.text}" in second
    assert run.counts["attacker wrote a message"] == 2


def test_an_attacker_is_told_of_a_refusal(tmp_path):
    def attack(prompt, sample):
        return write("Softer?" if "refused this message" in last(prompt) else "Hard!")(prompt, sample)

    attacker = Recording(attack, name="attacker")
    model = Recording(lambda prompt, sample: "I cannot." if last(prompt) == "Hard!" else "Fine.")
    run = run_attack(Attacker(attacker, "a", 1), model, [BOX], tmp_path)
    assert [(turn.outcome, last(turn.completion)) for turn in run.turns] == [
        ("refused", "Hard!"),
        ("answered", "Softer?"),
    ]
    assert "so write a milder one: Hard!" in attacker.requests[1][0].content


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("<message>Go on.</message>", "wrote a message"),
        ("<think>so</think><message>Go on.</message>", "wrote a message"),
        ("Go on.", "wrote no message"),
        ("", "wrote no message"),
        ("<message></message>", "wrote no message"),
        ("<message>a</message><message>b</message>", "wrote no message"),
        ("<message>Go on", "wrote no message"),
        ('{"message": "Go on."}', "wrote no message"),
        ("I can't help with that.", "refused"),
        ("<message>I'm sorry, I can't write that.</message>", "refused"),
    ],
)
def test_only_a_message_between_the_marks_is_read(reply, outcome):
    completion = Completion("p", 0, user_says("?"), reply, "stop", 1, 1, "m", "e", "")
    assert read_message(completion).outcome == outcome
    if outcome == "wrote no message":
        assert read_message(replace(completion, finish_reason="length")).outcome == "was cut"
    assert read_message(replace(completion, finish_reason="refused")).outcome == "refused"


def test_an_attacker_that_fails_is_asked_once_more_and_then_ends_the_conversation(tmp_path):
    replies = iter(["no marks", "<message>One?</message>", "I won't.", "I won't."])
    attacker = Recording(lambda prompt, sample: next(replies), name="attacker")
    run = run_attack(Attacker(attacker, "a", 3), Recording(answers), [BOX], tmp_path)
    assert [last(turn.completion) for turn in run.turns] == ["One?"]
    assert run.counts == {
        "attacker wrote no message": 1,
        "attacker wrote a message": 1,
        "attacker refused": 2,
        "reply answered": 1,
    }
    # One that never writes a message leaves the prompt without a result.
    silent = Attacker(Recording(lambda prompt, sample: "no", name="silent"), "b", 3)
    assert run_attack(silent, Recording(answers), [BOX], tmp_path).missing == {"box": "attacker wrote no message"}


def test_a_failing_server_of_the_attacker_is_no_refusal_and_is_asked_again(tmp_path):
    class Down(Recording):
        def generate(self, requests):
            raise Unanswered({(prompt.prompt_id, n): "HTTP 500" for prompt, n in requests}, len(requests))
            yield

    attack = Attacker(Down(write("Go on."), name="a"), "a", 1)
    assert run_attack(attack, Recording(answers), [BOX], tmp_path).missing == {"box": "attacker unanswered: HTTP 500"}
    attack = Attacker(Recording(write("Go on."), name="a"), "a", 1)
    run = run_attack(attack, Recording(answers), [BOX], tmp_path)
    assert (len(run.turns), run.missing) == (1, {})


def test_the_section_is_a_strategy_or_a_model():
    section = AttackSection(model={"path": "org/attacker", "server": "http://localhost:1/v1"}, turns=6)
    assert (section.label, section.num_turns) == ("attacker-attacker", 6)
    assert AttackSection(strategy="crescendo").label == "crescendo"
    assert AttackSection(model={"path": "m"}).num_turns == 4
    wrong = (
        {},
        {"strategy": "crescendo", "model": {"path": "m"}},
        {"strategy": "crescendo", "prefill": "Sure,"},
        {"strategy": "crescendo", "turns": 2},
        {"prefill": "Sure,", "turns": 2},
        {"prefill": ""},
    )
    for values in wrong:
        with pytest.raises(ValidationError):
            AttackSection(**values)


# Outcomes.


def test_outcomes_name_the_first_unsafe_turn_and_compare_with_the_prompt_alone(tmp_path):
    prompts = [BOX, BALL, replace(BALL, prompt_id="wall", prompt=user_says("How high is a wall?"))]
    run = run_attack(Script("crescendo"), Recording(answers), prompts, tmp_path)
    labels = {"box": [True, True, False, True], "ball": [True, None, True, True], "wall": [True] * 4}

    class Labels:
        name, revision = "labels", "1"

    verdicts = [
        Verdict.on(turn.completion, Labels(), safe=labels[turn.original_id][turn.turn - 1], reason="?")
        for turn in run.turns
    ]
    alone = [
        Verdict(prompt.prompt_id, 0, "", "labels", "1", safe, reason="?")
        for prompt, safe in zip(prompts, (True, False, True), strict=True)
    ]
    box, ball, wall = attack_outcomes(run.turns, verdicts, alone)
    assert (box.first_unsafe_turn, box.single_turn_safe, box.turns_used, box.refusals) == (3, True, 4, 0)
    assert (ball.first_unsafe_turn, ball.undecided, ball.single_turn_safe) == (None, 1, False)
    assert (wall.first_unsafe_turn, wall.undecided) == (None, 0)
    of_reply = by_reply(verdicts)
    own = {name: [turn for turn in run.turns if turn.original_id == name] for name in labels}
    assert [safe_until(own["box"], of_reply, number) for number in (1, 2, 3, 4)] == [True, True, False, False]
    assert [safe_until(own["ball"], of_reply, number) for number in (1, 2, 3, 4)] == [True, None, None, None]
    summary = describe_attack(run, [box, ball, wall])
    assert summary["unsafe_by_first_turn"] == {"3": 1}
    assert (summary["unsafe"], summary["single_turn_unsafe"], summary["conversations"]) == (1, 1, 3)
    assert summary["safe_alone_unsafe_in_conversation"] == 1
    json.dumps(summary)


def test_a_row_of_turns_with_a_wrong_value_is_refused_by_file_and_row(tmp_path):
    run = run_attack(Script("crescendo"), Recording(answers), [BOX], tmp_path)
    path = run.folder / "turns.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["is_fallback"] = "no"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"turns.jsonl row 2: column 'is_fallback' is 'no'; expected bool"):
        read_turns(run.folder)


# Real engines.


def test_a_model_in_this_process_is_attacked_and_batching_does_not_matter(tmp_path, make_model, tokenizer):
    prompts = [Prompt(f"p{number}", user_says("small red box " * number), "harmful") for number in (1, 2, 3)]

    def attack(folder, max_batch_tokens):
        model = make_model().to(torch.float64)
        sampling = Sampling(max_new_tokens=6, temperature=1.0)
        engine = TransformersEngine(
            model, tokenizer, sampling, name="m", identity="i", max_batch_tokens=max_batch_tokens
        )
        return run_attack(Script("crescendo"), engine, prompts, folder, samples=2)

    together = attack(tmp_path / "together", 100_000)
    assert len(by_conversation(together.turns)) == 6
    replies = [turn for turn in together.turns if turn.is_kept]
    assert len(replies) >= 6
    assert attack(tmp_path / "alone", 1).turns == together.turns
    # Both conversations about a prompt have noise of their own.
    assert len({turn.completion.text for turn in together.turns if turn.turn == 1}) > 3


def test_a_model_on_a_faulty_server_is_attacked(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent))
    from faulty_server import faulty_server

    bodies = []

    def text_of(body):
        bodies.append(body)
        return f"reply {len(body['messages'])}"

    with faulty_server(lambda number, body: "500" if number % 5 == 0 else None, text_of=text_of) as (url, _):
        options = ServerOptions(url, "toy", concurrency=4, timeout=5.0, backoff=0.002)
        run = run_attack(Script("crescendo"), ServerEngine(options, Sampling()), [BOX, BALL], tmp_path)
    assert [turn.completion.text for turn in run.turns] == [f"reply {length}" for length in (1, 3, 5, 7)] * 2
    roles = {tuple(message["role"] for message in body["messages"]) for body in bodies}
    assert roles == {("user", "assistant") * number + ("user",) for number in range(4)}
