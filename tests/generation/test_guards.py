"""Guards that sample and judge: what they let through, what they count, and that nothing passes without a verdict."""

import io
import random
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.commands.chat import chat
from bfpo.config.loading import check_recipe, parse_yaml
from bfpo.core.conversation import user_says
from bfpo.core.files import write_jsonl
from bfpo.core.guarding import GuardCounts
from bfpo.core.samples import Completion, Prompt, Sampling, Verdict, sample_seed
from bfpo.core.terminal import escape_controls
from bfpo.data.guard_summary import describe_guard, summarize_guard
from bfpo.data.stages import generate_completions, judge_completions, read_completions
from bfpo.errors import DataError, RecipeError, Unanswered
from bfpo.generation.guards.first_safe import ATTEMPT, FirstSafe
from bfpo.generation.in_process import TransformersEngine
from bfpo.generation.openai_server import ServerEngine, ServerOptions
from bfpo.generation.saved import SavedEngine
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging import guarded_engine
from bfpo.judging.guarded_engine import GuardFile, guard_engine, load_guard

sys.path.insert(0, str(Path(__file__).parent))
from faulty_server import faulty_server

PROMPTS = [Prompt(f"p{number}", user_says(f"near {number}")) for number in range(6)]
REFUSAL = "not this one"


class ScriptedJudge:
    """Judge whose verdict is the result of a function of the completion; what the function raises, it raises."""

    name, revision = "script", "1"

    def __init__(self, verdict):
        self._verdict, self.read = verdict, []

    def judge(self, completions):
        for completion in completions:
            self.read.append(completion.text)
            yield Verdict.on(completion, self, safe=self._verdict(completion), reason="?")


def by_word(completion):
    """Call a text with `bad` unsafe and one with `odd` undecided; fail on one with `broken`."""
    if "broken" in completion.text:
        raise RuntimeError("no reply")
    return None if "odd" in completion.text else "bad" not in completion.text


def guarded(texts, *, samples=3, judge=None, **script):
    """Return a guard over an engine that answers with the k-th text at attempt k."""
    inner = ScriptedEngine(lambda prompt, sample: texts[sample // ATTEMPT], **script)
    return FirstSafe(inner, judge or ScriptedJudge(by_word), samples=samples, refusal=REFUSAL)


def answers(engine, requests):
    return {completion.key: completion for batch in engine.generate(requests) for completion in batch}


def answer(engine):
    (completion,) = answers(engine, [(PROMPTS[0], 0)]).values()
    return completion


def counts(completion):
    return {name: value for name, value in asdict(completion.guard).items() if value and name != "seconds"}


def test_the_first_safe_sample_is_the_answer():
    judge = ScriptedJudge(by_word)
    completion = answer(guarded(["bad a", "odd a b", "red box", "never drawn"], samples=4, judge=judge))
    assert (completion.text, completion.finish_reason, completion.completion_tokens) == ("red box", "stop", 2)
    assert counts(completion) == {"samples": 3, "tokens": 7, "judge_calls": 3, "unsafe": 1, "undecided": 1}
    assert judge.read == ["bad a", "odd a b", "red box"]


def test_without_a_safe_sample_the_answer_is_the_refusal():
    completion = answer(guarded(["bad a", "bad b", "bad c", "red box"]))
    assert (completion.text, completion.finish_reason, completion.completion_tokens) == (REFUSAL, "guarded", 0)
    assert completion.is_blocked
    assert counts(completion) == {"samples": 3, "tokens": 6, "judge_calls": 3, "unsafe": 3}
    (verdict,) = [*ScriptedJudge(by_word).judge([completion])]
    assert verdict.safe


def test_a_judge_that_fails_lets_nothing_through(capsys):
    completion = answer(guarded(["broken a", "broken b", "broken c"]))
    assert (completion.text, completion.finish_reason) == (REFUSAL, "guarded")
    assert counts(completion) == {"samples": 3, "tokens": 6, "judge_calls": 3, "failed": 3}
    assert capsys.readouterr().err.count("warning: the guard's judge script failed (RuntimeError: no reply)") == 1


def test_a_judge_that_fails_on_an_answer_doesnt_decide_about_others():
    inner = ScriptedEngine(lambda prompt, sample: "broken" if prompt == PROMPTS[2] else f"red {prompt.prompt_id}")
    guard = FirstSafe(inner, ScriptedJudge(by_word), samples=1, refusal=REFUSAL)
    made = answers(guard, [(prompt, 0) for prompt in PROMPTS])
    assert {key[0] for key, completion in made.items() if completion.finish_reason == "guarded"} == {"p2"}
    assert made["p2", 0].guard.failed == 1
    # Those behind the broken text are read a second time.
    assert [made[f"p{number}", 0].guard.judge_calls for number in range(6)] == [1, 1, 2, 2, 2, 2]


class Wrong(ScriptedJudge):
    def judge(self, completions):
        yield from (replace(verdict, text_hash="another") for verdict in super().judge(completions))


class Silent(ScriptedJudge):
    def judge(self, completions):
        yield from [*super().judge(completions)][:-1]


@pytest.mark.parametrize(("kind", "said"), [(Wrong, "another text"), (Silent, "0 verdicts on 1 texts")])
def test_a_verdict_on_another_text_or_a_missing_one_is_a_failure(kind, said, capsys):
    completion = answer(guarded(["red box"], samples=1, judge=kind(by_word)))
    assert (completion.finish_reason, counts(completion)["failed"]) == ("guarded", 1)
    assert said in capsys.readouterr().err


def test_a_repeated_sample_is_rejected_unread():
    judge = ScriptedJudge(by_word)
    completion = answer(guarded(["bad a", "bad a", "red box"], judge=judge))
    assert judge.read == ["bad a", "red box"]
    assert counts(completion) == {"samples": 3, "tokens": 6, "judge_calls": 2, "unsafe": 1, "repeats": 1}


class Blocking(ScriptedEngine):
    def generate(self, requests):
        for batch in super().generate(requests):
            yield [replace(completion, finish_reason="refused") for completion in batch]


class Thinking(ScriptedEngine):
    def generate(self, requests):
        for batch in super().generate(requests):
            yield [replace(completion, reasoning=completion.text, text="") for completion in batch]


def test_what_a_server_blocked_passes_and_reasoning_without_an_answer_does_not():
    judge = ScriptedJudge(by_word)
    blocked = answer(FirstSafe(Blocking(lambda *_: "bad"), judge, samples=2, refusal=REFUSAL))
    assert (blocked.finish_reason, blocked.text, blocked.guard.judge_calls) == ("refused", "bad", 0)
    unread = answer(FirstSafe(Thinking(lambda *_: "red"), judge, samples=2, refusal=REFUSAL))
    assert (unread.finish_reason, unread.reasoning, judge.read) == ("guarded", None, [])
    assert counts(unread) == {"samples": 2, "tokens": 2, "undecided": 1, "repeats": 1}


def test_refusals_are_as_frequent_as_n_unsafe_samples():
    p, number, n = 0.6, 1500, 4

    def text(prompt, sample):
        draw = random.Random(f"{prompt.prompt_id} {sample}").random()
        return f"bad {draw}" if draw < p else f"red {draw}"

    guard = FirstSafe(ScriptedEngine(text, batch=256), ScriptedJudge(by_word), samples=n, refusal=REFUSAL)
    made = answers(guard, [(PROMPTS[0], sample) for sample in range(number)])
    # Five standard deviations of a binomial share.
    for k in range(1, n + 1):
        share = sum(c.guard.samples > k or (c.guard.samples == k and c.is_blocked) for c in made.values()) / number
        assert abs(share - p**k) < 5 * (p**k * (1 - p**k) / number) ** 0.5
    assert not any("bad" in completion.text for completion in made.values())
    summary = summarize_guard([*made.values()])
    assert summary.drawn[0] == summary.answers == number
    assert summary.drawn[1:] == summary.rejected[:-1]
    assert summary.rejected[-1] == summary.refusals == sum(c.is_blocked for c in made.values())
    assert sum(summary.drawn) == summary.samples == summary.judge_calls
    first = summary.rejected[0] / number
    assert f"4 independent ones would all be in {first**4:.1%} of answers" in describe_guard(summary)


@pytest.fixture
def engine(make_model, tokenizer):
    def make(max_batch_tokens=4096, **sampling):
        settings = Sampling(**{"max_new_tokens": 8, "temperature": 1.0} | sampling)
        options = {"name": "m", "identity": "i", "max_batch_tokens": max_batch_tokens}
        return TransformersEngine(make_model().double(), tokenizer, settings, **options)

    return make


def is_even(completion):
    return len(completion.text) % 2 == 0


def test_answers_dont_depend_on_the_batch_and_a_safe_sample_stays_as_it_was(engine):
    requests = [(prompt, sample) for prompt in PROMPTS[:4] for sample in range(2)]

    def made(requests, **options):
        guard = FirstSafe(engine(**options), ScriptedJudge(is_even), samples=3, refusal=REFUSAL)
        completions = answers(guard, requests).values()
        return {c.key: (c.text, c.finish_reason, replace(c.guard, seconds=0.0)) for c in completions}

    together = made(requests)
    assert made(requests[::-1], max_batch_tokens=1) == together
    for request in requests[:2]:
        assert made([request]).items() <= together.items()
    assert made(requests, seed=1) != together
    bare = answers(engine(), requests)
    assert {key for key, completion in bare.items() if is_even(completion)} == {
        key for key, (_, _, of_guard) in together.items() if of_guard.samples == 1
    }
    assert all(together[key][0] == bare[key].text for key in bare if is_even(bare[key]))
    # Further samples are new ones.
    others = {text for key, (text, _, of_guard) in together.items() if of_guard.samples > 1 and text != REFUSAL}
    assert others
    assert not others & {completion.text for completion in bare.values()}


def test_every_setting_is_in_the_hash():
    class Other(ScriptedJudge):
        revision = "2"

    def make(name="script", judge=ScriptedJudge, samples=2, refusal=REFUSAL):
        inner = ScriptedEngine(lambda *_: "", name=name)
        return FirstSafe(inner, judge(by_word), samples=samples, refusal=refusal).settings_hash

    hashes = [make(), make(name="b"), make(judge=Other), make(samples=3), make(refusal="no")]
    assert len({*hashes, ScriptedEngine(lambda *_: "").settings_hash}) == 6


class Failing(ScriptedEngine):
    """Engine that never answers the first prompt from the second attempt on."""

    def generate(self, requests):
        lost = {(p.prompt_id, s): "too slow" for p, s in requests if p == PROMPTS[0] and s >= ATTEMPT}
        yield from super().generate([(p, s) for p, s in requests if (p.prompt_id, s) not in lost])
        if lost:
            raise Unanswered(lost, len(requests), refused=lost)


def test_prompts_that_the_engine_doesnt_answer_are_missing_under_their_own_numbers():
    inner = Failing(lambda prompt, sample: f"bad {sample}")
    guard, batches = FirstSafe(inner, ScriptedJudge(by_word), samples=3, refusal=REFUSAL), []
    with pytest.raises(Unanswered, match=r"1 of 2 completions are missing: too slow \(1\)") as raised:
        batches.extend(guard.generate([(PROMPTS[0], 1), (PROMPTS[1], 0)]))
    assert raised.value.failed == {("p0", 1): "too slow"}
    assert raised.value.refused == {("p0", 1)}
    ((made,),) = batches
    assert (made.key, made.guard.samples) == (("p1", 0), 3)


def test_counts_are_kept_in_the_file_and_a_run_resumes(tmp_path):
    path = tmp_path / "completions.jsonl"
    first = generate_completions(guarded(["bad a", "red box"]), PROMPTS[:2], path)
    both = generate_completions(guarded(["bad a", "red box"]), PROMPTS, path)
    assert read_completions(path) == both
    assert both[:2] == first
    assert summarize_guard(both).samples == 12
    with pytest.raises(DataError, match="another model or other settings"):
        generate_completions(guarded(["bad a", "red box"], samples=2), PROMPTS, path)
    verdicts = judge_completions(ScriptedJudge(by_word), both, tmp_path / "verdicts.jsonl")
    assert all(verdict.safe for verdict in verdicts)
    with pytest.raises(DataError, match="'guard' is"):
        Completion.from_row(both[0].to_row() | {"guard": {"samples": -1}})


def test_a_refusal_stays_one_in_a_file_of_another_evaluation(tmp_path):
    path = tmp_path / "completions.jsonl"
    made = generate_completions(guarded(["bad a"], samples=1), PROMPTS, path)
    (saved,) = SavedEngine(str(path), "saved").generate([(prompt, 0) for prompt in PROMPTS])
    assert [(c.finish_reason, c.guard) for c in saved] == [("guarded", c.guard) for c in made]
    assert all(completion.is_blocked for completion in saved)
    write_jsonl(path, [made[0].to_row() | {"guard": {"samples": "two"}}])
    with pytest.raises(DataError, match=r"row 1: column 'guard.samples' is 'two'"):
        SavedEngine(str(path), "saved")


def test_the_section_opens_its_judge(tmp_path):
    path = tmp_path / "guard.yaml"
    path.write_text("guard: {kind: first_safe, judge: oracle, samples: 2, refusal: No.}")
    section = load_guard(path)
    guard = guard_engine(ScriptedEngine(lambda *_: "red"), Sampling(), section)
    assert isinstance(guard, FirstSafe)
    assert answer(guard).text == "No."
    assert guard_engine(guard, Sampling(), None) is guard
    with pytest.raises(RecipeError, match=r"guard.samples is 2, but at temperature 0 all samples are equal"):
        guard_engine(guard, Sampling(temperature=0.0), section)
    for judge, said in (("refusal-rule", "can't read a new answer for safety"), ("reward:x", "can't read a new")):
        path.write_text(f"guard: {{kind: first_safe, judge: '{judge}'}}")
        with pytest.raises(RecipeError, match=said):
            load_guard(path)
    path.write_text("guard: {kind: first_safe, judge: oracle, sample: 2}")
    with pytest.raises(RecipeError, match="did you mean 'samples'"):
        load_guard(path)


def test_counts_add_up():
    total = GuardCounts(1, 2, 3, seconds=0.5) + GuardCounts(1, 1, 1, 1, 1, 1, 1, 1, 1, 0.25)
    assert total == GuardCounts(2, 3, 4, 1, 1, 1, 1, 1, 1, 0.75)
    assert summarize_guard([]) is None


@pytest.fixture
def checkpoint(make_model, tokenizer, tmp_path, monkeypatch):
    """A model in the folder `model`, and the file of a guard whose judge calls some answers safe."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("guard.yaml").write_text("guard: {kind: first_safe, judge: oracle, samples: 2, refusal: Not this.}")
    judge = ScriptedJudge(is_even)
    monkeypatch.setattr(guarded_engine, "open_judge", lambda spec, **_: judge)
    return judge


@pytest.mark.usefixtures("checkpoint")
def test_generate_behind_a_guard(capsys):
    Path("prompts.txt").write_text("small box\nred ball\nblue lamp\n")
    options = ["model", "prompts.txt", "--guard", "guard.yaml", "--max-new-tokens", "4", "--samples", "12"]
    result = CliRunner().invoke(app, ["generate", *options])
    assert result.exit_code == 0, result.output
    completions = read_completions(Path("completions.jsonl"))
    refused = [completion for completion in completions if completion.finish_reason == "guarded"]
    assert 0 < len(refused) < len(completions) == 36
    assert {completion.text for completion in refused} == {"Not this."}
    assert f"The guard put its refusal in place of {len(refused)} of 36 answers" in result.output
    # The same model without the guard is another run.
    assert isinstance(CliRunner().invoke(app, ["generate", *options[:2]]).exception, DataError)


def test_chat_behind_a_guard_shows_only_what_has_passed(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"red box {number}\n" for number in range(12))))
    options = {"system": None, "max_new_tokens": 4, "temperature": 1.0, "seed": 0}
    chat("model", guard=load_guard(Path("guard.yaml")), **options)
    _, *lines = capsys.readouterr().out.splitlines()
    refused = [index for index, line in enumerate(lines) if line == "Not this."]
    assert refused
    assert all(lines[index + 1] == "(the guard's refusal; none of 2 samples passed)" for index in refused)
    shown = [line for line in lines if line != "Not this." and not line.startswith("(the guard")]
    passed = [text for text in checkpoint.read if len(text) % 2 == 0]
    assert 0 < len(passed) < len(checkpoint.read)
    # A terminal shows tabs as blanks.
    assert "\n".join(shown).split() == "\n".join(map(escape_controls, passed)).split()


@pytest.mark.usefixtures("checkpoint")
def test_chat_behind_a_guard_says_why_the_model_cannot_be_asked(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{'red box ' * 3000}\nred box\n"))
    chat("model", guard=load_guard(Path("guard.yaml")), system=None, max_new_tokens=4, temperature=1.0, seed=0)
    assert "note: prompt too long for the model's" in capsys.readouterr().out


def test_the_guards_on_the_page_are_guards():
    page = (Path(__file__).parents[2] / "docs" / "guards.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        check_recipe(parse_yaml(block, "guards.md"), GuardFile, "guards.md")


def test_the_program_on_the_page_runs(checkpoint, capsys):
    page = (Path(__file__).parents[2] / "docs" / "guards.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    # A model in this process stands in for the server.
    exec(code.replace('path="NAME", server="http://localhost:8000/v1"', 'path="model"').replace("256", "8"), {})
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert checkpoint.read


def test_a_judge_on_a_server_that_is_down_or_too_slow_lets_nothing_through(tmp_path, capsys):
    path = tmp_path / "guard.yaml"
    inner = ScriptedEngine(lambda prompt, sample: f"red {sample}")
    with faulty_server(lambda number, body: "slow") as (slow, counts):
        for url in ("http://127.0.0.1:9/v1", slow):
            server = "{tries: 1, timeout: 0.2}"
            path.write_text(
                f"guard: {{kind: first_safe, judge: 'rubric:m@{url}', samples: 2, judge_server: {server}}}"
            )
            guard = guard_engine(inner, Sampling(), load_guard(path))
            made = answers(guard, [(prompt, 0) for prompt in PROMPTS[:2]])
            # A rubric judge that gets no reply to a single question says that it is undecided.
            outcomes = [(c.finish_reason, c.guard.samples, c.guard.undecided) for c in made.values()]
            assert outcomes == [("guarded", 2, 2)] * 2
    assert counts["requests"] > 0
    assert capsys.readouterr().err.count("warning: the guard's judge rubric-m failed (Unanswered: ") == 2


def test_a_guard_over_a_server():
    texts = {}

    def text(body):
        # The server's text depends on the seed, as its samples do.
        texts[body["seed"]] = f"{'bad' if body['seed'] % 3 else 'red'} {body['seed']}"
        return texts[body["seed"]]

    with faulty_server(lambda number, body: "500" if number == 1 else None, text) as (url, _):
        server = ServerEngine(ServerOptions(url, "toy", backoff=0.002), Sampling())
        guard = FirstSafe(server, ScriptedJudge(by_word), samples=3, refusal=REFUSAL)
        made = answers(guard, [(prompt, 0) for prompt in PROMPTS])
    for prompt in PROMPTS:
        seeds = [sample_seed(0, prompt.prompt_id, number * ATTEMPT) % 2**31 for number in range(3)]
        expected = next((f"red {seed}" for seed in seeds if seed % 3 == 0), REFUSAL)
        assert made[prompt.prompt_id, 0].text == expected
    assert len(texts) == sum(completion.guard.samples for completion in made.values())
    assert guard.faults == {"HTTP 500": 1}
