"""The openai engine against a faulty local server: no completion is lost or repeated, and no key is shown."""

import sys
from pathlib import Path

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.core.pairs import user_says
from bfpo.core.samples import Prompt, Sampling
from bfpo.data.stages import generate_completions, read_completions
from bfpo.errors import ModelError, Unanswered
from bfpo.generation.openai_server import ServerEngine, ServerOptions

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
        (FINE.replace(b"stop", b"tool_calls") + b"}", "wrong schema"),
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
    assert server.faults == {fault: 2}


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


def test_a_run_that_stops_early_counts_what_it_did_not_request(tmp_path):
    prompts = [Prompt(f"p{i}", user_says(f"small red box {i}")) for i in range(60)]
    with faulty_server(lambda number, body: "400") as (url, counts):
        with pytest.raises(Unanswered, match=r"60 of 60 .* not requested, because most requests failed"):
            generate_completions(engine(url), prompts, tmp_path / "c.jsonl")
        assert counts["requests"] < 60


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
    assert sum(server.faults.values()) == counts["requests"] - 2000


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
    assert [completion.key for completion in completions] == [(f"p{i}", k) for i in range(5) for k in range(2)]
    assert len({completion.text for completion in completions}) > 5
    assert all(completion.completion_tokens <= 9 for completion in completions)
