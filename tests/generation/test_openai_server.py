"""The openai engine against a faulty local server: no completion is lost or repeated, and no key is shown."""

import json
import socketserver
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.core.conversation import Message, user_says
from bfpo.core.samples import Prompt, Sampling
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.data.stages import generate_completions, read_completions
from bfpo.data.unread_answers import describe_missing_answers
from bfpo.errors import ModelError, Unanswered
from bfpo.generation.open import EngineSection
from bfpo.generation.openai_server import ServerEngine, ServerOptions, warn_of_missing_model

sys.path.insert(0, str(Path(__file__).parent))
from faulty_server import FAULTS, faulty_server

PROMPTS = [Prompt(f"p{i}", user_says(f"small red box {i}")) for i in range(12)]


def engine(url, samples=1, temperature=0.7, **options):
    # Long enough that no good response is late on a busy machine.
    settings = {"concurrency": 4, "timeout": 1.0, "backoff": 0.002} | options
    return ServerEngine(ServerOptions(url, "toy", **settings), Sampling(samples, temperature))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_retried_and_counted(tmp_path, fault):
    with faulty_server(lambda number, body: fault if number < 3 else None) as (url, counts):
        server = engine(url)
        completions = generate_completions(server, PROMPTS, tmp_path / "c.jsonl")
    assert len(completions) == 12
    assert counts["requests"] == 15
    assert sum(server.faults.values()) == 3
    assert completions[0].finish_reason == "stop"
    assert (completions[0].prompt_tokens, completions[0].completion_tokens) == (3, 2)


def test_lone_surrogates_are_replaced_and_counted(tmp_path):
    with faulty_server(text_of=lambda body: f"small \ud83d box {body['seed']}") as (url, counts):
        server = engine(url)
        completions = generate_completions(server, PROMPTS[:3], tmp_path / "c.jsonl")
        assert counts["requests"] == 3, "nothing is retried"
    assert [completion.text[:11] for completion in completions] == ["small ? box"] * 3
    assert server.faults == {"lone surrogate, replaced": 3}
    assert read_completions(tmp_path / "c.jsonl") == completions


FINE = b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]'


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"[" * 100_000, "not JSON"),
        (b"   ", "nothing"),
        (b"[]", "wrong schema"),
        (b'{"choices": []}', "wrong schema"),
        (b'{"choices": {"0": 1}}', "wrong schema"),
        (FINE.replace(b'"x"', b"null") + b"}", "wrong schema"),
        (FINE.replace(b'"x"', b'" "').replace(b'"stop"', b"null") + b"}", "wrong schema"),
        (FINE.replace(b"stop", b"error") + b"}", "an error in place of an answer"),
        (b'{"error": {"message": "overloaded"}}', "an error in place of an answer: overloaded"),
        (FINE + b', "usage": {"prompt_tokens": 1e999}}', "wrong schema"),
        (FINE + b', "usage": [1]}', "wrong schema"),
    ],
)
def test_malformed_responses_are_faults(content, fault):
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=content))
    options = ServerOptions("http://h/v1", "m", tries=2, backoff=0.0)
    server = ServerEngine(options, Sampling(), transport=transport)
    with pytest.raises(Unanswered, match=rf"1 of 1 .*{fault} \(2 tries\)"):
        list(server.generate([(PROMPTS[0], 0)]))
    assert server.faults == {fault.partition(":")[0]: 2}


def served_by(replies, samples=1, temperature=0.7, **options):
    """Return an engine whose requests `replies` answers by a status, content and headers, and the bodies sent."""
    bodies = []

    def handle(request):
        bodies.append(json.loads(request.content))
        status, content, *headers = replies(bodies[-1])
        return httpx.Response(status, content=json.dumps(content), headers=dict(*headers))

    options = ServerOptions("http://h/v1", "m", **{"tries": 2, "backoff": 0.0, "concurrency": 1} | options)
    return ServerEngine(options, Sampling(samples, temperature), transport=httpx.MockTransport(handle)), bodies


def generate(server, prompts=PROMPTS[:1]):
    return [completion for batch in server.generate([(prompt, 0) for prompt in prompts]) for completion in batch]


def reply_of(content, reason="stop", **message):
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": reason}]}


FILTER = {"message": "The response was filtered by a policy", "param": "prompt"}


@pytest.mark.parametrize(
    ("status", "content", "outcome"),
    [
        (200, reply_of("", "content_filter"), ("", "filtered")),
        (200, reply_of(None, "content_filter"), ("", "filtered")),
        (200, reply_of("Mix the", "SAFETY"), ("Mix the", "filtered")),
        (400, {"error": {**FILTER, "code": "content_filter"}}, ("", "filtered")),
        (400, {"error": {**FILTER, "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, ("", "filtered")),
        (400, {"error": {"message": "litellm.ContentPolicyViolationError: no", "code": "400"}}, ("", "filtered")),
        (403, {"error": {"code": 403, "metadata": {"flagged_input": "how"}}}, ("", "filtered")),
        (200, reply_of(None, refusal="I can't help."), ("I can't help.", "refused")),
        (200, reply_of("Yes.", refusal=None), ("Yes.", "stop")),
        (200, reply_of("fine", "eos"), ("fine", "stop")),
        (200, reply_of("fine", None), ("fine", "stop")),
        (200, {"choices": [{"message": {"content": "fine"}}]}, ("fine", "stop")),
        (200, reply_of("fine", "model_length"), ("fine", "length")),
        (200, reply_of([{"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}]), ("fine", "stop")),
    ],
)
def test_a_servers_own_words_are_outcomes_and_not_retried(status, content, outcome):
    server, bodies = served_by(lambda body: (status, content))
    (completion,) = generate(server)
    assert (completion.text, completion.finish_reason) == outcome
    assert completion.is_blocked is (outcome[0] in ("", "I can't help."))
    assert len(bodies) == 1
    assert not server.faults


CALL = {"id": "c1", "type": "function", "function": {"name": "wire", "arguments": '{"to": "Ada", "sum": 5}'}}
WIRE = ToolCall("wire", FrozenJson.freeze({"to": "Ada", "sum": 5}), "c1")
LET_ME = [{"type": "reasoning.summary", "summary": "Let me"}, {"type": "reasoning.encrypted", "data": "9a"}]
PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "Let me"}]}, {"type": "text", "text": "Yes."}]


@pytest.mark.parametrize(
    ("content", "reasoning", "text", "calls", "finish_reason"),
    [
        # Reasoning in each field that servers have for it, and in none.
        (reply_of("Yes.", reasoning_content="Let me\n"), "Let me", "Yes.", (), "stop"),
        (reply_of("Yes.", reasoning="Let me", reasoning_content=None), "Let me", "Yes.", (), "stop"),
        (reply_of("Yes.", thinking="Let me", reasoning=""), "Let me", "Yes.", (), "stop"),
        (reply_of("Yes.", reasoning="Let me", reasoning_content="Let me"), "Let me", "Yes.", (), "stop"),
        (reply_of("Yes.", reasoning=None, reasoning_details=LET_ME), "Let me", "Yes.", (), "stop"),
        (reply_of(PARTS), "Let me", "Yes.", (), "stop"),
        (reply_of("<think>\nLet me\n</think>\n\nYes."), "Let me", "Yes.", (), "stop"),
        (reply_of("Let me\n</think>\n\nYes."), "Let me", "Yes.", (), "stop"),
        (reply_of("[THINK]Let me[/THINK]Yes."), "Let me", "Yes.", (), "stop"),
        (reply_of("<think>Let me</think>Yes.", reasoning_content="Let me"), "Let me", "Yes.", (), "stop"),
        (reply_of("<think>or</think>Yes.", reasoning_content="Let me"), "Let me\n\nor", "Yes.", (), "stop"),
        # Reasoning that was cut, or that no answer follows.
        (reply_of(None, "length", reasoning_content="Let me"), "Let me", "", (), "length"),
        (reply_of("", "length", reasoning="Let me"), "Let me", "", (), "length"),
        (reply_of("<think>Let me", "length"), "Let me", "", (), "length"),
        (reply_of(None, "length"), "", "", (), "length"),
        (reply_of(None, "stop", reasoning="Let me"), "Let me", "", (), "stop"),
        # Tool calls, with every finish reason and with a text or without.
        (reply_of(None, "tool_calls", tool_calls=[CALL]), None, "", (WIRE,), "stop"),
        (reply_of("", "stop", tool_calls=[CALL | {"index": 0}]), None, "", (WIRE,), "stop"),
        (reply_of("Now.", "tool_calls", tool_calls=[CALL]), None, "Now.", (WIRE,), "stop"),
        (reply_of(None, "length", tool_calls=[CALL, CALL]), None, "", (WIRE, WIRE), "length"),
        (reply_of(None, "tool_calls", reasoning="Let me", tool_calls=[CALL]), "Let me", "", (WIRE,), "stop"),
        (
            reply_of(None, "function_call", function_call=CALL["function"]),
            None,
            "",
            (ToolCall("wire", WIRE.arguments),),
            "stop",
        ),
        (
            reply_of(None, "length", tool_calls=[{"function": {"name": "wire", "arguments": '{"to": "A'}}]),
            None,
            "",
            (ToolCall("wire", FrozenJson.freeze('{"to": "A')),),
            "length",
        ),
    ],
)
def test_reasoning_and_tool_calls_are_parts_of_an_answer(content, reasoning, text, calls, finish_reason, tmp_path):
    server, bodies = served_by(lambda body: (200, content | {"usage": {"completion_tokens": 7}}))
    (completion,) = generate_completions(server, PROMPTS[:1], tmp_path / "c.jsonl")
    assert (completion.reasoning, completion.text, completion.tool_calls) == (reasoning, text, calls)
    assert completion.finish_reason == finish_reason
    assert completion.completion_tokens == 7
    assert completion.lacks_answer is (reasoning is not None and not text and not calls)
    assert read_completions(tmp_path / "c.jsonl") == [completion]
    assert len(bodies) == 1
    assert not server.faults


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (reply_of("Yes.", reasoning="Let me", reasoning_content="Or not"), "two different texts of reasoning"),
        (reply_of("x", "tool_calls"), "no tool call, but a finish reason of one"),
        (reply_of(None, "stop", tool_calls=[{"id": "1"}]), "a malformed tool call"),
        (reply_of("x", tool_calls=[{"function": {"name": "", "arguments": "{}"}}]), "a malformed tool call"),
        (reply_of([{"type": "image_url", "image_url": "u"}]), "a part of type 'image_url' in the answer"),
        (reply_of("x", tool_calls=5), "wrong schema"),
    ],
)
def test_an_answer_that_can_not_be_read_whole_is_a_fault(content, fault):
    server, _ = served_by(lambda body: (200, content))
    with pytest.raises(Unanswered, match=rf"{fault} \(2 tries\)"):
        generate(server)
    assert server.faults == {fault: 2}


def test_fields_that_are_not_read_are_named_once(capsys):
    call = CALL | {"extra_content": {"signature": "s"}}
    server, _ = served_by(lambda body: (200, reply_of("x", audio={"data": "a"}, annotations=[], tool_calls=[call])))
    assert len(generate(server, PROMPTS)) == 12
    assert capsys.readouterr().out == "note: fields of the server's replies that aren't read: audio, extra_content\n"


def test_lone_surrogates_in_reasoning_and_calls_are_replaced(tmp_path):
    call = {"function": {"name": "wire\ud83d", "arguments": '{"to": "\ud83d"}'}}
    server, _ = served_by(lambda body: (200, reply_of("x", reasoning="a \ud83d", tool_calls=[call])))
    (completion,) = generate_completions(server, PROMPTS[:1], tmp_path / "c.jsonl")
    assert completion.reasoning == "a ?"
    assert completion.tool_calls == (ToolCall("wire?", FrozenJson.freeze({"to": "?"})),)
    assert read_completions(tmp_path / "c.jsonl") == [completion]


HISTORY = (
    Message("developer", "Be brief."),
    Message("user", "Pay Ada", name="bob"),
    Message("assistant", "", "She is owed 5.", (WIRE, ToolCall("log", FrozenJson.freeze('{"cut'), "c2"))),
    Message("tool", "paid", tool_call_id="c1", name="wire"),
)
TOOLS = FrozenJson.freeze([{"type": "function", "function": {"name": "wire", "parameters": {"b": 1, "a": 2}}}])
WITH_TOOLS = Prompt("t", HISTORY, tools=TOOLS, chat_template_kwargs=FrozenJson.freeze({"enable_thinking": False}))


def test_requests_carry_whole_conversations_and_tools():
    server, bodies = served_by(lambda body: (200, reply_of("x")))
    (completion,) = generate(server, [WITH_TOOLS])
    (body,) = bodies
    log = {"type": "function", "id": "c2", "function": {"name": "log", "arguments": '{"cut'}}
    assert body["messages"] == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Pay Ada", "name": "bob"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "She is owed 5.",
            "reasoning": "She is owed 5.",
            "tool_calls": [CALL, log],
        },
        {"role": "tool", "content": "paid", "tool_call_id": "c1", "name": "wire"},
    ]
    assert body["tools"] == TOOLS.value
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "tool_choice" not in body
    assert completion.inputs == WITH_TOOLS.inputs
    assert completion.prompt == HISTORY
    server, bodies = served_by(lambda body: (200, reply_of("x")))
    generate(server)
    assert not {"tools", "chat_template_kwargs"} & bodies[0].keys()


def test_the_servers_message_is_shown_without_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    for message, shown in (
        ("prompt of 9 tokens\n  is too long", r"HTTP 400: prompt of 9 tokens is too long \(1\)"),
        ("x" * 300, rf"HTTP 400: {'x' * 197}\.\.\. \(1\)"),
        ("wrong key a-secret", r"HTTP 400; is the prompt too long for the model\? \(1\)"),
        ("Authorization: Bearer a-sec", r"HTTP 400; is the prompt too long for the model\? \(1\)"),
    ):
        with pytest.raises(Unanswered, match=shown) as raised:
            generate(served_by(lambda body, message=message: (400, {"error": {"message": message}}))[0])
        assert "a-sec" not in str(raised.value)
    with pytest.raises(Unanswered, match=r"HTTP 500: out of memory \(2 tries\)"):
        generate(served_by(lambda body: (500, {"error": {"message": "out of memory"}}))[0])
    with pytest.raises(ModelError, match="HTTP 404: the model m does not exist; is"):
        generate(served_by(lambda body: (404, {"detail": "the model m does not exist"}))[0])


def test_equal_refusals_before_any_answer_stop_the_run():
    prompts = [Prompt(f"p{i}", user_says(f"small red box {i}")) for i in range(15)]
    refusal = 400, {"error": {"message": "temperature does not support 0.7, only the default"}}
    server, bodies = served_by(lambda body: refusal)
    with pytest.raises(Unanswered, match=r"because the server refused the first .*temperature does not support"):
        generate(server, prompts)
    assert 5 <= len(bodies) <= 8
    # After an answer, equal refusals are about the prompts.
    server, bodies = served_by(
        lambda body: (200, reply_of("x")) if body["messages"][0]["content"].endswith(" 0") else refusal
    )
    with pytest.raises(Unanswered, match="14 of 15"):
        generate(server, prompts)
    assert len(bodies) == 15


OPENAI = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


@pytest.mark.parametrize(
    ("parameter", "error"),
    [
        ("max_tokens", {"error": {"message": OPENAI, "param": "max_tokens", "code": "unsupported_parameter"}}),
        ("max_tokens", {"error": {"message": OPENAI}}),
        ("seed", {"error": {"message": "Unknown parameter: seed"}}),
        ("seed", {"error": {"message": "This reasoning model doesn't support seed or tools"}}),
        ("seed", {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs"}]}),
    ],
)
def test_a_refused_parameter_is_replaced_and_noted_once(parameter, error, capsys):
    server, bodies = served_by(lambda body: (400, error) if parameter in body else (200, reply_of("x")), tries=1)
    before = server.settings_hash
    assert len(generate(server, PROMPTS)) == 12
    assert server.settings_hash == before
    assert len(bodies) == 13
    assert capsys.readouterr().out.count(f"doesn't accept `{parameter}`") == 1
    assert bodies[-1].get("max_completion_tokens", bodies[-1].get("max_tokens")) == 256


EXTRA = {"type": "extra_forbidden", "msg": "Extra inputs are not permitted"}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("chat_template_kwargs", {"error": {"message": "Unrecognized request argument: chat_template_kwargs"}}),
        ("chat_template_kwargs", {"detail": [EXTRA | {"loc": ["body", "chat_template_kwargs"]}]}),
        ("reasoning", {"detail": [EXTRA | {"loc": ["body", "messages", 2, "assistant", "reasoning"]}]}),
        ("reasoning_content", {"error": {"message": "Unsupported key", "param": "messages[2].reasoning_content"}}),
        (
            "reasoning_content",
            {"error": {"message": "Additional properties are not allowed ('reasoning_content') - 'messages.2'"}},
        ),
    ],
)
def test_a_server_that_refuses_a_key_gets_the_rest(name, error, capsys):
    def replies(body):
        is_sent = name in body or any(name in message for message in body["messages"])
        return (400, error) if is_sent else (200, reply_of("x"))

    server, bodies = served_by(replies, tries=1)
    assert len(generate(server, [replace(WITH_TOOLS, prompt_id=f"t{index}") for index in range(3)])) == 3
    assert len(bodies) == 4
    assert capsys.readouterr().out.count(f"doesn't accept `{name}`") == 1
    assert bodies[-1]["tools"] == TOOLS.value
    other = {"reasoning": "reasoning_content", "reasoning_content": "reasoning"}.get(name)
    assert other is None or bodies[-1]["messages"][2][other] == "She is owed 5."


IN_TEXT = '<tool_call>\n{"name": "wire", "arguments": {"to": "Ada", "sum": 5}}\n</tool_call>'
CHANNELS = (
    "<|channel|>analysis<|message|>Let me<|end|><|start|>assistant<|channel|>commentary to=functions.wire "
    '<|constrain|>json<|message|>{"to": "Ada", "sum": 5}'
)


@pytest.mark.parametrize(
    ("reply", "reasoning", "text"),
    [
        (reply_of(f"Now.\n{IN_TEXT}"), None, "Now."),
        (reply_of(f"<think>Let me</think>{IN_TEXT}"), "Let me", ""),
        (reply_of(IN_TEXT, reasoning="Let me"), "Let me", ""),
        (reply_of(CHANNELS), "Let me", ""),
        (reply_of(CHANNELS, reasoning="First"), "First\n\nLet me", ""),
    ],
)
def test_a_call_that_a_server_left_in_the_text_is_read(reply, reasoning, text):
    (completion,) = generate(served_by(lambda body: (200, reply))[0], [WITH_TOOLS])
    assert [(call.name, call.arguments) for call in completion.tool_calls] == [("wire", WIRE.arguments)]
    assert (completion.reasoning, completion.text) == (reasoning, text)
    # Without tools there are no calls.
    (completion,) = generate(served_by(lambda body: (200, reply))[0])
    assert not completion.tool_calls


@pytest.mark.parametrize("key", ["gguf_file", "revision"])
def test_keys_of_a_model_in_this_process_are_refused_for_a_server(key):
    with pytest.raises(ValueError, match=f"{key} is 'm.gguf'; with server, path is the model's name there"):
        EngineSection.model_validate({"path": "m", "server": "http://localhost:1/v1", key: "m.gguf"})


def test_a_server_that_refuses_tools_is_not_asked_without_them():
    error = {"error": {"message": "tools is not supported by this model", "param": "tools"}}
    server, bodies = served_by(lambda body: (400, error))
    with pytest.raises(Unanswered, match="HTTP 400: tools is not supported"):
        generate(server, [WITH_TOOLS])
    assert len(bodies) == 1


def test_a_parameter_of_a_wrong_value_is_not_dropped():
    for message in (
        "'max_tokens' or 'max_completion_tokens' is too large: 256. This model's maximum context length is 99.",
        "temperature is not supported; neither is seed",
    ):
        server, bodies = served_by(lambda body, message=message: (400, {"error": {"message": message}}))
        with pytest.raises(Unanswered):
            generate(server)
        assert len(bodies) == 1


def test_many_reasons_are_shown_shortly():
    server, _ = served_by(
        lambda body: (
            (200, reply_of("x"))
            if body["messages"][0]["content"].endswith(" 0")
            else (400, {"error": {"message": f"too long: {body['seed']}"}})
        )
    )
    with pytest.raises(Unanswered, match=r"other reasons \(6\); the first") as raised:
        generate(server, PROMPTS)
    assert str(raised.value).count("too long") == 5


def test_blocked_samples_are_not_taken_for_a_server_that_does_not_sample():
    server, _ = served_by(lambda body: (200, reply_of("", "content_filter")), samples=3)
    requests = [(prompt, sample) for prompt in PROMPTS for sample in range(3)]
    assert sum(len(batch) for batch in server.generate(requests)) == 36


def test_equal_calls_are_identical_samples_whatever_their_ids():
    ids = iter(range(1000))

    def replies(body):
        calls = [CALL | {"id": f"c{next(ids)}"}]
        return 200, reply_of(None, "tool_calls", tool_calls=calls)

    server, _ = served_by(replies, samples=3)
    with pytest.raises(ModelError, match="3 identical samples"):
        list(server.generate([(prompt, sample) for prompt in PROMPTS for sample in range(3)]))
    # Different calls beside equal texts are samples.
    arguments = iter(range(1000))

    def differing(body):
        call = {"function": {"name": "wire", "arguments": f'{{"sum": {next(arguments)}}}'}}
        return 200, reply_of("", "tool_calls", tool_calls=[call])

    server, _ = served_by(differing, samples=3)
    requests = [(prompt, sample) for prompt in PROMPTS for sample in range(3)]
    assert sum(len(batch) for batch in server.generate(requests)) == 36


def test_reasoning_that_is_not_shown_is_no_sign_of_a_server_that_does_not_sample():
    server, _ = served_by(lambda body: (200, reply_of(None, "length")), samples=3)
    requests = [(prompt, sample) for prompt in PROMPTS for sample in range(3)]
    assert sum(len(batch) for batch in server.generate(requests)) == 36


def test_missing_completions_are_reported_and_the_others_are_kept(tmp_path):
    def fault(number, body):
        return "400" if body["messages"][0]["content"].endswith((" 3", " 7")) else None

    out = tmp_path / "c.jsonl"
    with faulty_server(fault) as (url, counts):
        with pytest.raises(Unanswered, match=r"2 of 12 completions .*HTTP 400; is the prompt too long") as raised:
            generate_completions(engine(url), PROMPTS, out)
        assert set(raised.value.failed) == {("p3", 0), ("p7", 0)}
        assert counts["requests"] == 12, "a refused prompt isn't retried"
    unfinished = out.with_name("c.jsonl.unfinished")
    assert len(unfinished.read_text().splitlines()) == 10


def test_a_second_start_requests_only_missing_completions(tmp_path):
    broken = [True]
    with faulty_server(lambda number, body: "500" if broken[0] and number % 2 else None) as (url, counts):
        with pytest.raises(Unanswered, match=r"HTTP 500 \(1 tries\)"):
            generate_completions(engine(url, tries=1, concurrency=1), PROMPTS, tmp_path / "c.jsonl")
        broken[0] = False
        before = counts["requests"]
        completions = generate_completions(engine(url), PROMPTS, tmp_path / "c.jsonl")
        assert counts["requests"] - before == 6
    assert [completion.prompt_id for completion in completions] == [prompt.prompt_id for prompt in PROMPTS]


def test_identical_samples_stop_the_run():
    with faulty_server(text_of=lambda body: "the same") as (url, counts):
        with pytest.raises(ModelError, match=r'3 identical samples .* "do_sample": true'):
            list(engine(url, samples=3).generate([(prompt, i) for prompt in PROMPTS for i in range(3)]))
        assert counts["requests"] < 36
        # Greedy samples are expected to be identical.
        requests = [(prompt, i) for prompt in PROMPTS for i in range(3)]
        assert list(engine(url, samples=3, temperature=0.0).generate(requests))


def test_identical_samples_of_few_prompts_give_a_warning(capsys):
    with faulty_server(text_of=lambda body: "the same") as (url, _):
        few = [(prompt, i) for prompt in PROMPTS[:3] for i in range(3)]
        assert sum(len(batch) for batch in engine(url, samples=3).generate(few)) == 9
        assert "3 identical samples for each of 3 prompts" in capsys.readouterr().out
        # Also for samples that are added to earlier ones.
        with pytest.raises(ModelError, match="2 identical samples"):
            list(engine(url, samples=4).generate([(prompt, i) for prompt in PROMPTS for i in (2, 3)]))


@pytest.mark.parametrize(
    ("status", "reason", "most"),
    [("500", "most requests failed", 59), ("400", "the server refused the first requests for one reason", 30)],
)
def test_a_run_that_stops_early_counts_what_it_did_not_request(tmp_path, status, reason, most):
    prompts = [Prompt(f"p{i}", user_says(f"small red box {i}")) for i in range(60)]
    with faulty_server(lambda number, body: status) as (url, counts):
        with pytest.raises(Unanswered, match=rf"60 of 60 .* not requested, because {reason}"):
            generate_completions(engine(url, tries=1), prompts, tmp_path / "c.jsonl")
        assert counts["requests"] <= most


def test_a_malformed_key_is_refused_and_not_shown(monkeypatch):
    for bad in ("a-sécret", "a-sec\nret"):
        monkeypatch.setenv("MY_KEY", bad)
        with pytest.raises(ModelError, match="the key in MY_KEY contains a character") as raised:
            list(engine("http://127.0.0.1:9/v1", key_variable="MY_KEY").generate([(PROMPTS[0], 0)]))
        assert "ret" not in str(raised.value).replace("character", "")


@pytest.mark.parametrize("status", ["401", "404"])
def test_the_key_comes_from_the_environment_and_is_shown_nowhere(tmp_path, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    broken = [True]
    with faulty_server(lambda number, body: status if broken[0] else None) as (url, counts):
        with pytest.raises(ModelError) as raised:
            generate_completions(engine(url), PROMPTS, tmp_path / "c.jsonl")
        broken[0] = False
        server = engine(url)
        generate_completions(server, PROMPTS, tmp_path / "c.jsonl")
        assert counts["with key"] == counts["requests"]
    assert "a-secret" not in str(raised.value) + repr(server.options) + (tmp_path / "c.jsonl").read_text()


def test_bad_options_are_refused():
    for url, message in (
        ("localhost:8000", "expected http://host:port/v1"),
        ("http://me:a-secret@host/v1", "contains a key"),
    ):
        with pytest.raises(ModelError, match=message) as raised:
            ServerOptions(url, "m")
        assert "a-secret" not in str(raised.value)
    with pytest.raises(ModelError, match="tries is 0; expected at least 1"):
        ServerOptions("http://h/v1", "m", tries=0)


def test_the_command_queries_a_server(tmp_path):
    (tmp_path / "prompts.txt").write_text("small red box\nlarge blue door\n")
    out = tmp_path / "c.jsonl"
    with faulty_server() as (url, _):
        arguments = ["generate", "toy", str(tmp_path / "prompts.txt"), "--server", url, "--out", str(out)]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {completion.model for completion in read_completions(out)} == {"toy"}


def test_the_command_sends_and_writes_everything_that_a_file_of_prompts_has(tmp_path):
    row = {"prompt": [message.to_row() for message in HISTORY[1:]], "system": "Be brief.", "note": "a private note"}
    row |= {"tools": TOOLS.value, "chat_template_kwargs": {"enable_thinking": False}, "language": "en"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "c.jsonl"
    bodies = []
    with faulty_server(lambda number, body: bodies.append(body)) as (url, _):
        arguments = ["generate", "toy", str(tmp_path / "prompts.jsonl"), "--server", url, "--out", str(out)]
        refused = CliRunner().invoke(app, arguments)
        assert "columns not read: note" in str(refused.exception)
        result = CliRunner().invoke(app, [*arguments, "--ignore-column", "note"])
        again = CliRunner().invoke(app, [*arguments, "--ignore-column", "note"])
    assert result.exit_code == again.exit_code == 0, result.output
    ((body,), (completion,)) = bodies, read_completions(out)
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "tool"]
    assert (body["tools"], body["chat_template_kwargs"]) == (TOOLS.value, {"enable_thinking": False})
    assert completion.prompt == (Message("system", "Be brief."), *HISTORY[1:])
    assert completion.inputs == WITH_TOOLS.inputs
    assert completion.language == "en"


def test_the_command_shows_how_often_reasoning_used_all_tokens(tmp_path):
    (tmp_path / "prompts.txt").write_text("small red box\nlarge blue door\ngreen ball\n")
    out = tmp_path / "c.jsonl"

    def text(body):
        return "<think>a red" if "red" in body["messages"][0]["content"] else "<think>a door</think>It is open."

    with faulty_server(text_of=text) as (url, _):
        arguments = ["generate", "toy", str(tmp_path / "prompts.txt"), "--server", url, "--out", str(out)]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    # The server says that the model ended its turn.
    assert "no answer after the reasoning in 1 of 3 completions\n" in result.output
    completions = read_completions(out)
    assert [completion.text for completion in completions] == ["", "It is open.", "It is open."]
    cut = replace(completions[0], finish_reason="length", completion_tokens=256)
    assert describe_missing_answers([cut, cut, *completions]) == [
        "reasoning used all 256 tokens in 2 of 5 completions; raise `max_new_tokens`",
        "no answer after the reasoning in 1 of 5 completions",
    ]
    assert describe_missing_answers([replace(cut, completion_tokens=0)]) == [
        "reasoning used all tokens in 1 of 1 completions; raise `max_new_tokens`"
    ]


def test_the_command_shows_faults_and_unanswered_prompts(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("small red box\nlarge blue door\n")
    monkeypatch.setenv("MY_KEY", "a-secret")

    def fault(number, body):
        return "400" if "blue" in body["messages"][0]["content"] else "500" if number < 2 else None

    with faulty_server(fault) as (url, counts):
        arguments = ["generate", "toy", str(tmp_path / "prompts.txt"), "--server", url, "--tries", "3"]
        arguments += ["--timeout", "2", "--key-variable", "MY_KEY", "--out", str(tmp_path / "c.jsonl")]
        strict = CliRunner().invoke(app, arguments)
        assert isinstance(strict.exception, Unanswered)
        assert "HTTP 500" in strict.output
        lenient = CliRunner().invoke(app, [*arguments, "--max-unanswered", "0.5"])
        assert counts["with key"] == counts["requests"]
    assert lenient.exit_code == 0, lenient.output
    assert "Unanswered prompts" in lenient.output
    assert "1 completions of 2 prompts" in lenient.output
    assert len(read_completions(tmp_path / "c.jsonl")) == 1
    assert "a-secret" not in strict.output + lenient.output


def test_the_command_keeps_to_its_timeout_and_tries(tmp_path):
    (tmp_path / "prompts.txt").write_text("small red box\n")
    with faulty_server(lambda number, body: "slow", drip=1.0) as (url, counts):
        arguments = ["generate", "toy", str(tmp_path / "prompts.txt"), "--server", url, "--timeout", "0.1"]
        result = CliRunner().invoke(app, [*arguments, "--tries", "1", "--out", str(tmp_path / "c.jsonl")])
        assert counts["requests"] == 1
    assert isinstance(result.exception, Unanswered)
    assert "too slow (1 tries)" in str(result.exception)
    assert "too slow" in result.output


def test_the_timeout_holds_for_headers_too():
    stop = threading.Event()

    class Dripping(socketserver.StreamRequestHandler):
        def handle(self):
            with suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for number in range(100):
                    self.wfile.write(b"X-%d: 1\r\n" % number)
                    if stop.wait(0.02):
                        break

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(Unanswered, match=r"too slow \(2 tries\)"):
            generate(engine(f"http://127.0.0.1:{server.server_address[1]}/v1", timeout=0.2, tries=2))
        # Two tries of 0.2 s, and a delay of milliseconds; the headers would take 2 s each.
        assert 0.4 <= time.monotonic() - started < 1.5
        stop.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("value", "seconds", "line"),
    [
        ("1e9", 300, "HTTP 429: the server asks for a pause; waiting 300 s, of the 1,000,000,000 s that it asks for"),
        ("inf", 300, "waiting 300 s, of the inf s that it asks for"),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 300, "waiting 300 s, of the "),
        ("20", 20, "HTTP 429: the server asks for a pause; waiting 20 s\n"),
        ("1", 1, None),
        ("-5", 0, None),
        ("soon", 0, None),
        ("nan", 0, None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, None),
    ],
)
def test_a_long_pause_is_capped_and_announced_once(value, seconds, line, monkeypatch, capsys):
    server, _ = served_by(lambda body: (429, {}, {"Retry-After": value}), concurrency=4)
    moments = []
    monkeypatch.setattr(server, "_wait_until", lambda moment: moments.append(moment - time.monotonic()))
    with pytest.raises(Unanswered, match="HTTP 429"):
        generate(server, PROMPTS[:4])
    assert max(moments) == pytest.approx(seconds, abs=0.5)
    output = capsys.readouterr().out
    assert output.count("waiting") == (line is not None)
    assert (line or "") in output


@pytest.mark.slow
def test_many_faults_lose_and_repeat_nothing(tmp_path):
    prompts = [Prompt(f"p{i}", user_says(f"small red box {i}")) for i in range(2000)]
    out = tmp_path / "c.jsonl"

    def fault(number, body):
        return FAULTS[number // 3 % len(FAULTS)] if number % 3 == 0 else None

    with faulty_server(fault, drip=0.06) as (url, counts):
        server = engine(url, concurrency=16, timeout=0.1, tries=12)
        completions = generate_completions(server, prompts, out)
    assert [completion.key for completion in completions] == [(f"p{i}", 0) for i in range(2000)]
    assert len(out.read_text().splitlines()) == 2000
    assert len({completion.text for completion in completions}) == 2000, "a response was used for two prompts"
    # On a busy machine a good response can be late too, so this is a lower bound.
    assert counts["requests"] >= 2000 + 900
    # The limit includes the way there: a request can be late before the server has read it.
    num_unread = sum(server.faults.values()) - (counts["requests"] - 2000)
    assert 0 <= num_unread <= server.faults["too slow"]


@pytest.mark.slow
def test_transformers_serve_answers(tmp_path, make_model, tokenizer):
    from serving import served

    model = make_model()
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with served(tmp_path / "m") as url:
        server = ServerEngine(
            ServerOptions(url, str(tmp_path / "m"), concurrency=2), Sampling(2, temperature=1.0, max_new_tokens=8)
        )
        completions = generate_completions(server, PROMPTS[:5], tmp_path / "c.jsonl", samples=2)
        # It takes tools, template arguments, tool calls and results, and both keys of reasoning.
        call = replace(HISTORY[2], tool_calls=(WIRE,))
        whole = replace(WITH_TOOLS, prompt=(Message("system", "Be brief."), HISTORY[1], call, HISTORY[3]))
        (answer,) = generate_completions(server, [whole], tmp_path / "whole.jsonl")
    assert [completion.key for completion in completions] == [(f"p{i}", k) for i in range(5) for k in range(2)]
    assert len({completion.text for completion in completions}) > 5
    assert all(completion.completion_tokens <= 9 for completion in completions)
    assert answer.prompt_tokens > completions[0].prompt_tokens
    assert not server.faults


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, {"data": [{"id": "tiny"}]}, ""),
        (200, {"data": [{"id": "a"}, {"id": "b"}]}, "lists a, b, and not 'tiny'"),
        (200, {"data": []}, "lists no model, and not 'tiny'"),
        (200, ["other"], ""),
        (404, {}, ""),
    ],
)
def test_a_model_that_a_server_does_not_list_is_warned_of(monkeypatch, capsys, status, body, message):
    asked = []

    def get(url, **options):
        asked.append(url)
        return httpx.Response(status, json=body, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    warn_of_missing_model(ServerOptions("http://localhost:1/v1", "tiny"))
    assert asked == ["http://localhost:1/v1/models"]
    assert capsys.readouterr().err.strip() == (f"warning: http://localhost:1/v1 {message}" if message else "")


def test_a_server_that_does_not_answer_is_warned_of(capsys):
    warn_of_missing_model(ServerOptions("http://localhost:1/v1", "tiny"))
    assert (
        "http://localhost:1/v1 doesn't answer (ConnectError); requests fail until it does" in capsys.readouterr().err
    )
