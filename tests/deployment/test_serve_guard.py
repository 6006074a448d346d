"""The server in front of a guarded model: nothing unjudged is sent, everything is counted, many may ask at once."""

import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import uvicorn

from bfpo.core.conversation import user_says
from bfpo.core.samples import Sampling, Verdict, prompt_id
from bfpo.deployment.guard_server import build_app
from bfpo.deployment.guarded_model import GuardedModel
from bfpo.errors import ModelError, RecipeError, Unanswered
from bfpo.generation.guards.first_safe import ATTEMPT
from bfpo.generation.openai_server import ServerEngine, ServerOptions
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging import guarded_engine
from bfpo.judging.guarded_engine import FactorSection, FirstSafeSection

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))
from faulty_server import faulty_server
from test_guards_by_sentence import END, PieceEngine

REFUSAL = "not this one"
# One for all: each client reads the certificates of the system.
CLIENT = httpx.Client(timeout=30)
NEAR = (prompt_id(user_says("near")), 0)


@pytest.fixture(scope="module", autouse=True)
def _close_client():
    yield
    CLIENT.close()


class Judge:
    """Judge that calls a text with `bad` unsafe, and fails on one with `broken`."""

    name, revision = "words", "1"

    def judge(self, completions):
        for completion in completions:
            if "broken" in completion.text:
                raise RuntimeError(f"no reply on {completion.text}")
            yield Verdict.on(completion, self, safe="bad" not in completion.text)


class Engine(ScriptedEngine):
    """Engine that answers with a function of the prompt's text and the attempt."""

    def __init__(self, text_of):
        super().__init__(lambda prompt, sample: text_of(prompt.prompt[-1].content, sample // ATTEMPT))
        self.samplings = []

    def with_sampling(self, sampling):
        self.samplings.append(sampling)
        return self


@pytest.fixture
def guarded(monkeypatch):
    """Return a function that puts a guard in front of an engine."""
    monkeypatch.setattr(guarded_engine, "open_judge", lambda spec, **_: Judge())

    def make(engine, **settings):
        settings = {"kind": "first_safe", "judge": "linear:j.npz", "refusal": REFUSAL, "samples": 2, **settings}
        return GuardedModel(engine, FirstSafeSection.model_validate(settings), name="m")

    return make


@contextmanager
def served(model, *, concurrency=1, max_waiting=64):
    """Serve a guarded model in a thread, and yield the address."""
    app = build_app(model, concurrency=concurrency, max_waiting=max_waiting, max_new_tokens=16)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def ask(address, text, **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
    return CLIENT.post(f"{address}/v1/chat/completions", json=body)


def test_an_answer_that_passes_and_a_fallback_say_so(guarded):
    with served(guarded(Engine(lambda text, attempt: f"{text} box"))) as address:
        passed, fallback = ask(address, "red", seed=1), ask(address, "bad", seed=1)
        health = CLIENT.get(f"{address}/health").json()
    message = passed.json()["choices"][0]
    assert (message["message"]["content"], message["finish_reason"]) == ("red box", "stop")
    assert passed.json()["guard"] == {"outcome": "passed", "samples": 1, "judge_calls": 1}
    assert passed.json()["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    message = fallback.json()["choices"][0]
    assert (message["message"]["content"], message["finish_reason"]) == (REFUSAL, "content_filter")
    assert (passed.headers["x-guard-outcome"], fallback.headers["x-guard-outcome"]) == ("passed", "fallback")
    assert health["answers"] == {"passed": 1, "cut": 0, "fallback": 1, "unanswered": 0}
    assert (health["guard"], health["pending"]) == ({"kind": "first_safe", "judge": "words"}, 0)
    # The second sample of `bad` is the same text, which isn't judged again.
    assert (health["drawn"]["samples"], health["drawn"]["unsafe"], health["drawn"]["repeats"]) == (3, 1, 1)


def test_a_judge_that_fails_lets_nothing_pass_and_its_error_is_not_printed(guarded, capsys):
    model = guarded(Engine(lambda text, attempt: f"broken {text} {attempt}"))
    with served(model) as address:
        replies = [ask(address, "secretly"), ask(address, "secretly")]
        health = CLIENT.get(f"{address}/health").json()
    model.show_summary()
    assert [reply.json()["choices"][0]["message"]["content"] for reply in replies] == [REFUSAL, REFUSAL]
    assert (health["answers"]["fallback"], health["drawn"]["failed"]) == (2, 4)
    output = capsys.readouterr()
    assert output.err.count("judge words failed (RuntimeError)") == 1
    assert "secretly" not in output.err + output.out
    assert "2 fallback" in output.out


def test_a_stream_is_the_same_answer_after_the_verdict(guarded):
    with served(guarded(Engine(lambda text, attempt: ["bad", "red\nbox ü"][attempt]))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        chunks = list(
            client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "near"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        whole = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "near"}])
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert texts == ["red\nbox ü", None] == [whole.choices[0].message.content, None]
    assert (chunks[-2].choices[0].finish_reason, chunks[-2].guard["samples"]) == ("stop", 2)
    assert chunks[-1].usage.completion_tokens == 3


class Pieces(PieceEngine):
    """Engine that a guard by sentence gets as a model in this process."""

    def with_sampling(self, sampling):
        return self


@pytest.mark.parametrize("streams", [True, False])
def test_a_guard_by_sentence_sends_sentences_that_passed(guarded, monkeypatch, streams):
    monkeypatch.setattr(guarded_engine, "_in_process", lambda engine, *_: engine)
    engine = Pieces(f"red.| Blue.| bad| one.|{END}", f" bad| two.|{END}")
    with served(guarded(engine, by="sentence")) as address:
        reply = ask(address, "near", stream=streams)
        health = CLIENT.get(f"{address}/health").json()
    if not streams:
        assert reply.json()["choices"][0]["message"]["content"] == "red. Blue."
        assert reply.headers["x-guard-outcome"] == "cut"
    else:
        *events, last = [line.removeprefix("data: ") for line in reply.text.split("\n\n")[:-1]]
        chunks = [json.loads(event) for event in events]
        assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["red.", " Blue.", None]
        assert (chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["guard"]["outcome"]) == (
            "content_filter",
            "cut",
        )
        assert last == "[DONE]"
    assert health["answers"]["cut"] == 1


def test_many_threads_get_their_own_answers_one_at_a_time(guarded):
    working, most = 0, 0

    def text_of(text, attempt):
        nonlocal working, most
        working += 1
        most = max(most, working)
        time.sleep(0.005)
        working -= 1
        return "bad" if int(text) % 3 == 0 else f"about {text}"

    with served(guarded(Engine(text_of))) as address, ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda number: ask(address, str(number)), range(30)))
        answers = CLIENT.get(f"{address}/health").json()["answers"]
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert texts == [REFUSAL if number % 3 == 0 else f"about {number}" for number in range(30)]
    assert (most, answers["passed"], answers["fallback"]) == (1, 20, 10)


def test_a_full_server_says_so(guarded):
    gate = threading.Event()
    engine = Engine(lambda text, attempt: "red" if gate.wait(20) else "late")
    with served(guarded(engine), max_waiting=1) as address, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, address, "near") for _ in range(2)]
        while CLIENT.get(f"{address}/health").json()["pending"] < 2:
            time.sleep(0.01)
        refused = ask(address, "near")
        gate.set()
        texts = [future.result().json()["choices"][0]["message"]["content"] for future in waiting]
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert refused.json()["error"]["code"] == "too_many_requests"
    assert texts == ["red", "red"]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (Unanswered({NEAR: "prompt too long for the model"}, 1, refused=[NEAR]), 400, "too long"),
        (Unanswered({NEAR: "too slow (6 tries)"}, 1), 502, "too slow"),
        (ModelError("http://inner:1/v1: HTTP 401"), 502, "can't be asked"),
        (ValueError("secretly"), 500, "internal error"),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
def test_errors_have_openais_shape_and_show_nothing_of_the_inside(guarded, capsys, error, status, words, streams):
    def fail(text, attempt):
        raise error

    with served(guarded(Engine(fail))) as address:
        reply = ask(address, "near", stream=streams)
        again = ask(address, "near", n=2)
    assert (reply.status_code, again.status_code) == (status, 400)
    assert words in reply.json()["error"]["message"]
    assert "inner" not in reply.text
    output = capsys.readouterr()
    assert "secretly" not in reply.text + output.err + output.out
    assert "Traceback" not in output.err


def test_other_paths_and_methods_have_errors_of_the_same_shape(guarded):
    with served(guarded(Engine(lambda text, attempt: "red"))) as address:
        missing, wrong = CLIENT.get(f"{address}/v2"), CLIENT.get(f"{address}/v1/chat/completions")
        large = CLIENT.post(f"{address}/v1/chat/completions", content=b" " * 8_000_001)
        models = CLIENT.get(f"{address}/v1/models").json()
    assert [reply.status_code for reply in (missing, wrong, large)] == [404, 405, 413]
    assert all("message" in reply.json()["error"] for reply in (missing, wrong, large))
    assert [model["id"] for model in models["data"]] == ["m"]


def test_at_temperature_0_one_sample_decides(guarded):
    engine = Engine(lambda text, attempt: "bad")
    with served(guarded(engine, samples=4)) as address:
        reply = ask(address, "near", temperature=0)
    assert reply.json()["guard"] == {"outcome": "fallback", "samples": 1, "judge_calls": 1}
    assert engine.samplings[-1].temperature == 0


def test_a_guard_stands_in_front_of_a_served_model(guarded, monkeypatch, capsys):
    monkeypatch.setenv("INNER_KEY", "a-secret")
    text_of = lambda body: "bad" if body["messages"][-1]["content"] == "red" else f"at {body['temperature']}"  # noqa: E731
    with faulty_server(lambda number, body: "500" if number == 0 else None, text_of=text_of) as (url, counts):
        options = ServerOptions(url, "inner", 4, key_variable="INNER_KEY", backoff=0.01)
        model = guarded(ServerEngine(options, Sampling()))
        with served(model, concurrency=4) as address, ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda text: ask(address, text, temperature=0.5), ["red", "blue"] * 6))
        model.show_summary()
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
    assert texts == [REFUSAL, "at 0.5"] * 6
    # Two samples of each rejected answer, one of each other, and a repeated request.
    assert counts["requests"] == counts["with key"] == 6 * 2 + 6 + 1
    output = capsys.readouterr()
    assert "HTTP 500" in output.out
    assert "a-secret" not in output.out + output.err


def test_guards_that_need_the_model_here_are_refused_for_a_server(guarded):
    engine = ServerEngine(ServerOptions("http://localhost:1/v1", "inner"), Sampling())
    with pytest.raises(RecipeError, match="by is 'sentence'"):
        guarded(engine, by="sentence")
    with pytest.raises(RecipeError, match="kind is 'factor'"):
        GuardedModel(engine, FactorSection(kind="factor", head="head.safetensors"), name="m")
