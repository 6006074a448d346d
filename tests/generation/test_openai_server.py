"""The openai engine against a local server that fails: nothing lost, nothing twice, no key anywhere."""

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
    # Long enough that on a busy machine no good answer is late.
    settings = {"concurrency": 4, "timeout": 1.0, "backoff": 0.002} | options
    return ServerEngine(ServerOptions(url, "toy", **settings), Sampling(samples, temperature))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_asked_again_and_counted(tmp_path, fault):
    with faulty_server(lambda number, body: fault if number < 3 else None) as (url, counts):
        one = engine(url)
        made = generate_completions(one, PROMPTS, tmp_path / "c.jsonl")
    assert len(made) == 12
    assert counts["requests"] == 15
    assert sum(one.faults.values()) == 3
    assert made[0].finish_reason == "stop"
    assert (made[0].prompt_tokens, made[0].completion_tokens) == (3, 2)


def test_half_characters_are_mended_and_counted(tmp_path):
    with faulty_server(text_of=lambda body: f"small \ud83d box {body['seed']}") as (url, counts):
        one = engine(url)
        made = generate_completions(one, PROMPTS[:3], tmp_path / "c.jsonl")
        assert counts["requests"] == 3, "it isn't asked again"
    assert [completion.text[:11] for completion in made] == ["small ? box"] * 3
    assert one.faults == {"half a character, replaced": 3}
    assert read_completions(tmp_path / "c.jsonl") == made


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
def test_nothing_that_a_server_says_is_trusted(content, fault):
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=content))
    options = ServerOptions("http://h/v1", "m", tries=2, backoff=0.0)
    one = ServerEngine(options, Sampling(), transport=transport)
    with pytest.raises(Unanswered, match=rf"1 of 1 .* {fault} \(2 tries\)"):
        list(one.generate([(PROMPTS[0], 0)]))
    assert one.faults == {fault: 2}


def test_what_stays_unanswered_is_told_and_the_rest_is_kept(tmp_path):
    def fault(number, body):
        return "400" if body["messages"][0]["content"].endswith((" 3", " 7")) else None

    out = tmp_path / "c.jsonl"
    with faulty_server(fault) as (url, counts):
        with pytest.raises(Unanswered, match=r"2 of 12 completions .* HTTP 400; is the prompt too long") as raised:
            generate_completions(engine(url), PROMPTS, out)
        assert set(raised.value.failed) == {("p3", 0), ("p7", 0)}
        assert counts["requests"] == 12, "a refused prompt isn't asked again"
    unfinished = out.with_name("c.jsonl.unfinished")
    assert len(unfinished.read_text().splitlines()) == 10


def test_a_second_start_asks_for_the_missing_ones_alone(tmp_path):
    broken = [True]
    with faulty_server(lambda number, body: "500" if broken[0] and number % 2 else None) as (url, counts):
        with pytest.raises(Unanswered, match=r"HTTP 500 \(1 tries\)"):
            generate_completions(engine(url, tries=1, concurrency=1), PROMPTS, tmp_path / "c.jsonl")
        broken[0] = False
        before = counts["requests"]
        made = generate_completions(engine(url), PROMPTS, tmp_path / "c.jsonl")
        assert counts["requests"] - before == 6
    assert [one.prompt_id for one in made] == [prompt.prompt_id for prompt in PROMPTS]


def test_identical_samples_stop_the_run():
    with faulty_server(text_of=lambda body: "the same") as (url, counts):
        with pytest.raises(ModelError, match=r'3 identical samples .* "do_sample": true'):
            list(engine(url, samples=3).generate([(prompt, i) for prompt in PROMPTS for i in range(3)]))
        assert counts["requests"] < 36
        # Greedy answers are the same by right.
        assert list(engine(url, samples=3, temperature=0.0).generate([(p, i) for p in PROMPTS for i in range(3)]))


def test_identical_samples_of_few_prompts_are_said_but_go_on(capsys):
    with faulty_server(text_of=lambda body: "the same") as (url, _):
        few = [(prompt, i) for prompt in PROMPTS[:3] for i in range(3)]
        assert len([one for batch in engine(url, samples=3).generate(few) for one in batch]) == 9
        assert "3 identical samples for each of 3 prompts" in capsys.readouterr().out
        # Of samples that are added, too, though each prompt had some before.
        with pytest.raises(ModelError, match="2 identical samples"):
            list(engine(url, samples=4).generate([(prompt, i) for prompt in PROMPTS for i in (2, 3)]))


def test_a_run_that_stops_early_counts_what_it_did_not_ask(tmp_path):
    prompts = [Prompt(f"p{i}", user_says(f"small red box {i}")) for i in range(60)]
    with faulty_server(lambda number, body: "400") as (url, counts):
        with pytest.raises(Unanswered, match=r"60 of 60 .* not asked for: most had failed"):
            generate_completions(engine(url), prompts, tmp_path / "c.jsonl")
        assert counts["requests"] < 60


def test_a_key_that_cannot_be_one_is_refused_unseen(monkeypatch):
    for bad in ("a-sécret", "a-sec\nret"):
        monkeypatch.setenv("MY_KEY", bad)
        with pytest.raises(ModelError, match="the key in MY_KEY holds a character") as raised:
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
        one = engine(url)
        generate_completions(one, PROMPTS, tmp_path / "c.jsonl")
        assert counts["with key"] == counts["requests"]
    assert "a-secret" not in str(raised.value) + repr(one.options) + (tmp_path / "c.jsonl").read_text()


def test_bad_options_are_refused():
    for url, message in (
        ("localhost:8000", "expected http://host:port/v1"),
        ("http://me:a-secret@host/v1", "holds a key"),
    ):
        with pytest.raises(ModelError, match=message) as raised:
            ServerOptions(url, "m")
        assert "a-secret" not in str(raised.value)
    with pytest.raises(ModelError, match="tries is 0; expected at least 1"):
        ServerOptions("http://h/v1", "m", tries=0)


def test_the_command_asks_a_server(tmp_path):
    (tmp_path / "prompts.txt").write_text("small red box\nlarge blue door\n")
    out = tmp_path / "c.jsonl"
    with faulty_server() as (url, _):
        arguments = ["generate", "toy", str(tmp_path / "prompts.txt"), "--server", url, "--out", str(out)]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {one.model for one in read_completions(out)} == {"toy"}


def test_the_command_tells_faults_and_what_stays_unanswered(tmp_path, monkeypatch):
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


def test_the_command_waits_no_longer_and_asks_no_more_often_than_told(tmp_path):
    (tmp_path / "prompts.txt").write_text("small red box\n")
    with faulty_server(lambda number, body: "slow", drip=1.0) as (url, counts):
        arguments = ["generate", "toy", str(tmp_path / "prompts.txt"), "--server", url, "--timeout", "0.1"]
        result = CliRunner().invoke(app, [*arguments, "--tries", "1", "--out", str(tmp_path / "c.jsonl")])
        assert counts["requests"] == 1
    assert isinstance(result.exception, Unanswered)
    assert "too slow (1 tries)" in str(result.exception)
    assert "too slow" in result.output


@pytest.mark.slow
def test_a_soak_loses_and_repeats_nothing(tmp_path):
    prompts = [Prompt(f"p{i}", user_says(f"small red box {i}")) for i in range(2000)]
    out = tmp_path / "c.jsonl"

    def fault(number, body):
        return FAULTS[number // 3 % len(FAULTS)] if number % 3 == 0 else None

    with faulty_server(fault, drip=0.06) as (url, counts):
        one = engine(url, concurrency=16, timeout=0.1, tries=12)
        made = generate_completions(one, prompts, out)
    assert [completion.key for completion in made] == [(f"p{i}", 0) for i in range(2000)]
    assert len(out.read_text().splitlines()) == 2000
    assert len({completion.text for completion in made}) == 2000, "one answer given to two prompts"
    # On a busy machine a good answer can be late too, so this is a lower bound.
    assert counts["requests"] >= 2000 + 900
    assert sum(one.faults.values()) == counts["requests"] - 2000


@pytest.mark.slow
def test_transformers_serve_answers(tmp_path, make_model, tokenizer):
    from serving import served

    model = make_model()
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with served(tmp_path / "m") as url:
        one = ServerEngine(
            ServerOptions(url, str(tmp_path / "m"), concurrency=2), Sampling(2, temperature=1.0, max_new_tokens=8)
        )
        made = generate_completions(one, PROMPTS[:5], tmp_path / "c.jsonl", samples=2)
    assert [one.key for one in made] == [(f"p{i}", k) for i in range(5) for k in range(2)]
    assert len({one.text for one in made}) > 5
    assert all(one.completion_tokens <= 9 for one in made)
