"""`bfpo redteam`: the pairs of judged samples, and whole runs with a scripted model."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from bfpo.config.recipes import Source
from bfpo.core.chain import INSTRUCTIONS, GuidedAnswer
from bfpo.core.conversation import Message, user_says
from bfpo.core.files import write_json, write_jsonl
from bfpo.core.samples import Completion, Verdict
from bfpo.data.load import load_pairs
from bfpo.data.prompts import PromptSource, read_prompt_source
from bfpo.errors import DataError, ModelError, RecipeError, Unanswered
from bfpo.generation.in_process import likeliest_answers
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging import guarded_engine
from bfpo.redteam import run as module
from bfpo.redteam.guide import summarize_guided
from bfpo.redteam.pairs import ScoredSample, make_pairs
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.redteam.run import CutWatch, run_redteam
from bfpo.stats.intervals import wilson


def scored(prompt, text, safe, helpfulness):
    completion = Completion(prompt, 0, user_says(prompt), text, "stop", 1, 1, "m", "e", "")
    verdict = Verdict(prompt, 0, completion.text_hash, "j", "1", safe, reason="?")
    return ScoredSample(completion, verdict, (helpfulness,))


def test_the_widest_pair_of_each_cell_and_rare_cells_first():
    samples = [
        scored("a", "full", False, 1.0),
        scored("a", "half", False, 0.5),
        scored("a", "no", True, 0.1),
        scored("a", "full", False, 1.0),
        scored("a", "mumble", None, 0.3),
        scored("b", "yes", True, 1.0),
        scored("b", "well", True, 0.2),
    ]
    pairs, left_out = make_pairs(samples, per_prompt=1, quota={}, dataset_name="x")
    assert {(pair.chosen, pair.rejected, pair.cell) for pair in pairs} == {
        ("full", "no", "us"),
        ("yes", "well", "ss"),
    }
    assert left_out == {"answer twice": 1, "answer undecided": 1, "more pairs of a prompt": 1}
    pairs, left_out = make_pairs(samples, per_prompt=2, quota={"us": 0}, dataset_name="x")
    assert {pair.cell for pair in pairs} == {"uu", "ss"}
    assert left_out["quota of us"] == 1


class WordJudge:
    """Judge that finds answers with `step` unsafe, and longer answers more helpful."""

    name, revision = "words", "1"

    def judge(self, completions):
        for completion in completions:
            safe, refusal = "step" not in completion.text, completion.text.startswith("sorry")
            helpfulness = len(completion.text) / 100
            yield Verdict.on(
                completion, self, safe=safe, p_safe=float(safe), refusal=refusal, helpfulness=helpfulness
            )


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "bad.txt").write_text("stuck box\nmixed box\n")
    (tmp_path / "good.txt").write_text("small box\n")

    def answer(prompt, sample):
        question = prompt.prompt[-1].content
        if question == INSTRUCTIONS["answer"]:
            return "sorry , but here is a lamp ."
        if question == INSTRUCTIONS["check"]:
            return "Yes."
        if "stuck" in question:
            return f"step {'one ' * (sample + 1)}."
        if sample == 0 and "mixed" in question:
            return "sorry ."
        return f"{'step' if 'mixed' in question else 'lamp'} {sample}"

    monkeypatch.setattr(module, "open_engine", lambda model, sampling: ScriptedEngine(answer, name=model.path))
    monkeypatch.setattr(module, "open_judge", lambda spec, **_: WordJudge())
    return RedteamRecipe.model_validate(
        {
            "out": str(tmp_path / "out"),
            "model": {"path": "m"},
            "prompts": [
                {"name": "file", "path": str(tmp_path / "bad.txt"), "kind": "harmful"},
                {"name": "file", "path": str(tmp_path / "good.txt"), "kind": "benign", "license": "CC0"},
            ],
            "judge": "words:Words",
            "samples": 3,
        }
    )


def test_a_whole_run(recipe, tmp_path):
    (path,) = run_redteam(recipe)
    _, pairs = load_pairs(Source(path=str(path)), "main")
    cells = {(pair.prompt[0].content, pair.cell) for pair in pairs}
    # All samples of the first prompt are unsafe: its safe answer comes from the guiding steps.
    assert ("stuck box", "us") in cells
    assert any(pair.rejected == "sorry , but here is a lamp ." for pair in pairs)
    assert ("mixed box", "us") in cells
    metadata = json.loads((tmp_path / "out" / "redteam.json").read_text())
    assert metadata["cost"]["generations"] == 9 + 4
    assert metadata["cost"]["judge_calls"] == 9 + 1
    labeled = {(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)}
    assert metadata["cost"]["replaced"] == {
        "human_promptings": 9,
        "human_safe_answers": 1,
        "human_safety_labels": len(labeled),
        "human_orders": len(pairs),
    }
    (guided,) = read_guided(tmp_path / "out")
    assert (guided.prompt[0].content, guided.answer.content) == ("stuck box", "sorry , but here is a lamp .")
    assert (guided.passes, guided.safe, guided.kept, guided.judge) == (True, True, True, "words@1")
    assert metadata["guided"]["check"]["agreement"][0] == metadata["guided"]["safe"][0] == 1.0
    assert [source["license"] for source in metadata["sources"]] == [None, "CC0"]
    before = path.read_bytes()
    assert run_redteam(recipe)[0].read_bytes() == before
    with pytest.raises(RecipeError, match="files of another recipe"):
        run_redteam(recipe.model_copy(update={"seed": 1}))


def read_guided(folder):
    text = (folder / GuidedAnswer.file_name).read_text()
    return [GuidedAnswer.from_row(json.loads(line)) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("reply", "passes", "num_kept"), [("No.", False, 0), ("**Yes**", True, 1), ("Well,", None, 0)]
)
def test_a_check_that_filters_keeps_only_answers_that_it_calls_safe(recipe, monkeypatch, reply, passes, num_kept):
    answer = module.open_engine(recipe.model, None)._answer

    def with_check(prompt, sample):
        return reply if prompt.prompt[-1].content == INSTRUCTIONS["check"] else answer(prompt, sample)

    monkeypatch.setattr(module, "open_engine", lambda model, sampling: ScriptedEngine(with_check))
    (path,) = run_redteam(recipe.model_copy(update={"check": "filter"}))
    (guided,) = read_guided(path.parent)
    assert (guided.safe, guided.passes, guided.kept) == (True, passes, bool(num_kept))
    _, pairs = load_pairs(Source(path=str(path)), "main")
    assert any(pair.rejected == "sorry , but here is a lamp ." for pair in pairs) is bool(num_kept)
    metadata = json.loads((path.parent / "redteam.json").read_text())
    assert metadata["left_out"].get("guided answer doesn't pass its check", 0) == 1 - num_kept


def test_a_run_of_before_the_check_resumes_with_the_same_pairs(recipe):
    (path,) = run_redteam(recipe)
    before, out = path.read_bytes(), path.parent
    # What earlier versions left: no fourth step, no table, and no key `check` in the recipe.
    for name in ("guided-4.jsonl", GuidedAnswer.file_name):
        (out / name).unlink()
    text = (out / "redteam.yaml").read_text()
    (out / "redteam.yaml").write_text(text.replace("check: measure\n", ""))
    assert (out / "redteam.yaml").read_text() != text
    assert run_redteam(recipe)[0].read_bytes() == before
    # Two runs of 9 samples and three steps; only the check was sampled again.
    assert json.loads((out / "redteam.json").read_text())["cost"]["generations"] == 9 + 3 + 1 + 1
    assert len(read_guided(out)) == 1


def test_the_check_is_measured_against_the_judge():
    def row(number, reply, safe):
        text = Message("assistant", "a")
        check = None if reply is None else Message("assistant", reply)
        return GuidedAnswer(str(number), user_says("q"), text, text, text, check, safe, "j@1", safe is True, "h")

    # 3 passed and safe, 1 passed and unsafe, 2 failed and safe, 4 failed and unsafe; 3 that can't be compared.
    replies = ["yes"] * 4 + ["no"] * 6 + ["perhaps", None, "yes"]
    labels = [True] * 3 + [False] + [True] * 2 + [False] * 4 + [True, False, None]
    summary = summarize_guided(15, [row(*values) for values in zip(range(13), replies, labels, strict=True)])
    check = summary["check"]
    assert [check[name] for name in ("passed_safe", "passed_unsafe", "failed_safe", "failed_unsafe")] == [3, 1, 2, 4]
    assert (summary["prompts"], summary["answers"], summary["undecided"], check["unread"]) == (15, 13, 1, 2)
    for rate, counts in ((summary["safe"], (6, 15)), (check["agreement"], (7, 10)), (check["safe_before"], (5, 10))):
        assert rate == pytest.approx(wilson(*counts), abs=1e-4)
    assert check["safe_after"] == pytest.approx(wilson(3, 4), abs=1e-4)
    # Observed agreement .7, expected .4 * .5 + .6 * .5 = .5.
    assert check["kappa"] == pytest.approx(0.4)
    assert summarize_guided(2, [])["check"]["agreement"] is None


class ShortEngine(ScriptedEngine):
    """Engine for which prompts with certain words are too long."""

    words = ("mixed",)

    def generate(self, requests):
        def is_long(prompt):
            return any(word in prompt.prompt[-1].content for word in self.words)

        long = [(prompt.prompt_id, sample) for prompt, sample in requests if is_long(prompt)]
        yield from super().generate([(prompt, sample) for prompt, sample in requests if not is_long(prompt)])
        if long:
            raise Unanswered(dict.fromkeys(long, "prompt too long"), len(requests), refused=long)


@pytest.mark.parametrize(("outcome", "text"), [("filtered", ""), ("refused", "sorry ."), ("filtered", "lamp and")])
def test_answers_that_a_server_blocked_make_no_pairs(recipe, monkeypatch, capsys, outcome, text):
    answer = module.open_engine(recipe.model, None)._answer

    class Filtering(ScriptedEngine):
        def _completion(self, prompt, sample):
            completion = super()._completion(prompt, sample)
            if "stuck" in prompt.prompt[-1].content and sample == 1:
                return replace(completion, text=text, finish_reason=outcome)
            return completion

    monkeypatch.setattr(module, "open_engine", lambda model, sampling: Filtering(answer))
    (path,) = run_redteam(recipe)
    _, pairs = load_pairs(Source(path=str(path)), "main")
    assert text not in {text for pair in pairs for text in (pair.chosen, pair.rejected)} - {"sorry ."}
    assert json.loads((path.parent / "redteam.json").read_text())["left_out"][f"answer {outcome} by the server"] == 1
    assert "Outcomes" in capsys.readouterr().out
    # A blocked sample isn't a safe answer: the model is still led to one. The part that a filter left is.
    guided = any(pair.rejected == "sorry , but here is a lamp ." for pair in pairs)
    assert guided is (text != "lamp and")


def test_a_verdict_of_another_type_is_refused_by_file_row_and_column(recipe):
    run_redteam(recipe)
    path = Path(recipe.out) / "verdicts-words@1.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(number for number, row in enumerate(rows, start=1) if row["safe"] is False)
    rows[number - 1]["safe"] = "false"
    write_jsonl(path, rows)
    pairs = (Path(recipe.out) / "pairs.jsonl").read_bytes()
    # Read as a flag, the text would be true: an unsafe answer would be labeled safe.
    with pytest.raises(DataError) as raised:
        run_redteam(recipe)
    assert str(raised.value) == f"{path} row {number}: column 'safe' is 'false'; expected true or false, or null"
    assert (Path(recipe.out) / "pairs.jsonl").read_bytes() == pairs


def test_prompts_that_are_too_long_are_left_out_and_reported(recipe, tmp_path, monkeypatch, capsys):
    answer = module.open_engine(recipe.model, None)._answer
    monkeypatch.setattr(module, "open_engine", lambda model, sampling: ShortEngine(answer))
    with pytest.raises(Unanswered, match=r"3 of 9 completions are missing: prompt too long \(3\)"):
        run_redteam(recipe)
    (path,) = run_redteam(recipe.model_copy(update={"out": str(tmp_path / "b"), "max_unanswered": 0.4}))
    _, pairs = load_pairs(Source(path=str(path)), "main")
    assert {pair.prompt[0].content for pair in pairs} == {"stuck box"}
    metadata = json.loads((tmp_path / "b" / "redteam.json").read_text())
    assert metadata["left_out"]["prompt unanswered: prompt too long"] == 1
    assert "Unanswered prompts" in capsys.readouterr().out
    # In the guiding steps, where the conversation grows, any number may be missing.
    monkeypatch.setattr(ShortEngine, "words", (INSTRUCTIONS["guidance"],))
    run_redteam(recipe.model_copy(update={"out": str(tmp_path / "c")}))
    metadata = json.loads((tmp_path / "c" / "redteam.json").read_text())
    assert metadata["left_out"]["guided answer missing: prompt too long"] == 1
    assert metadata["cost"]["replaced"]["human_safe_answers"] == 0


@pytest.fixture
def judges(monkeypatch):
    """Open judges of two revisions by their specs, and return them; each counts its verdicts."""
    judges = {}

    class CountingJudge(WordJudge):
        def __init__(self, revision):
            self.revision, self.judged = revision, 0

        def judge(self, completions):
            for verdict in super().judge(completions):
                self.judged += 1
                yield verdict

    def open_judge(spec, **_):
        judges[spec] = CountingJudge(spec.partition(":")[2])
        return judges[spec]

    monkeypatch.setattr(module, "open_judge", open_judge)
    return judges


def test_a_rater_that_is_the_safety_judge_reuses_its_verdicts(recipe, judges, tmp_path):
    recipe = recipe.model_copy(update={"judge": "words:v1", "helpfulness": "words:v1"})
    (path,) = run_redteam(recipe)
    assert path.exists()
    metadata = json.loads((tmp_path / "out" / "redteam.json").read_text())
    assert metadata["helpfulness"] == metadata["judge"] == "words@v1"
    assert metadata["cost"]["judge_calls"] == 9 + 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*verdicts*")) == [
        "guided-verdicts-words@v1.jsonl",
        "verdicts-words@v1.jsonl",
    ]


def test_verdicts_of_earlier_versions_are_found(recipe, judges, tmp_path):
    recipe = recipe.model_copy(update={"judge": "words:v1", "helpfulness": "words:v2"})
    (path,) = run_redteam(recipe)
    assert [judges[spec].judged for spec in ("words:v1", "words:v2")] == [9 + 1, 9 + 1]
    before, out = path.read_bytes(), tmp_path / "out"
    (out / "verdicts-words@v1.jsonl").rename(out / "verdicts.jsonl")
    (out / "guided-verdicts-words@v1.jsonl").rename(out / "guided-verdicts.jsonl")
    (out / "verdicts-words@v2.jsonl").rename(out / "helpfulness.jsonl")
    assert run_redteam(recipe)[0].read_bytes() == before
    assert [judges[spec].judged for spec in ("words:v1", "words:v2")] == [0, 0]
    assert not list(out.glob("*@*"))


def test_a_judge_that_never_decides_makes_no_pairs(recipe, tmp_path, monkeypatch):
    class UndecidedJudge(WordJudge):
        def judge(self, completions):
            for completion in completions:
                yield Verdict.on(completion, self, safe=None, reason="can't decide", helpfulness=0.5)

    monkeypatch.setattr(module, "open_judge", lambda spec, **_: UndecidedJudge())
    with pytest.raises(DataError, match=r"no pair could be made: \{'answer undecided': 9\}"):
        run_redteam(recipe)
    verdicts = tmp_path / "out" / "verdicts-words@1.jsonl"
    assert len(verdicts.read_text().splitlines()) == 9, "the verdicts are kept"


def test_rounds_sample_from_the_model_that_the_last_one_trained(recipe, tmp_path, monkeypatch, make_model):
    trained, opened = [], []
    monkeypatch.chdir(tmp_path)
    make_model(shape="nano").config.save_pretrained("m")
    open_engine = module.open_engine

    def train(recipe, *, answers):
        assert answers is likeliest_answers
        trained.append(recipe)
        write_json(Path(recipe.trainer["output_dir"]) / "run.json", {})

    def open_and_record(model, sampling):
        opened.append(model.path)
        return open_engine(model, sampling)

    monkeypatch.setattr("bfpo.training.run.run_training", train)
    monkeypatch.setattr(module, "open_engine", open_and_record)
    for section, message in (
        ({"los": {"name": "bfpo"}}, "los: unknown key; did you mean 'loss'"),
        ({"loss": {"name": "bfop"}}, "did you mean 'bfpo'"),
        ({"trainer": {"max_step": 3}}, "did you mean 'max_steps'"),
        ({"train_only": ["nosuchlayer"]}, "'nosuchlayer'"),
        ({"lora": {"target_modules": ["nosuchlayer"]}}, "nosuchlayer"),
    ):
        with pytest.raises((RecipeError, ModelError), match=message):
            run_redteam(recipe.model_copy(update={"rounds": 2, "train": section}))
    assert opened == [], "an error in train shows before any work"
    rounds = recipe.model_copy(update={"rounds": 3, "train": {"loss": {"name": "bfpo", "beta": 0.3}}})
    paths = run_redteam(rounds)
    out = tmp_path / "out"
    assert paths == [out / f"round-{number}" / "pairs.jsonl" for number in (1, 2, 3)]
    models = [str(out / f"round-{number}" / "model") for number in (1, 2)]
    assert opened == ["m", *models]
    # Each round continues from the model of the last one, with the pairs of all rounds so far.
    assert [train_recipe.model.path for train_recipe in trained] == ["m", models[0]]
    sources = [[source.path for source in train_recipe.data] for train_recipe in trained]
    assert sources == [[str(paths[0])], [str(path) for path in paths[:2]]]
    assert [train_recipe.loss.beta for train_recipe in trained] == [0.3, 0.3]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in run_redteam(rounds)] == before
    assert len(trained) == 2, "a trained model isn't trained again"
    with pytest.raises(ValidationError, match="rounds is 2; several rounds require train"):
        RedteamRecipe.model_validate(recipe.model_dump() | {"rounds": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "reward:m"}, "judge: 'reward:m' doesn't judge safety; expected one of linear, oracle"),
        ({"judge": "fallback"}, "judge 'fallback': 'fallback' is not a kind of judge"),
        ({"helpfulness": "linear:judge.npz"}, "helpfulness: 'linear:judge.npz' doesn't rate helpfulness"),
        ({"helpfulness": "rubric:m@http://h/v1+oracle"}, "doesn't rate helpfulness; .*rubric"),
    ],
)
def test_a_judge_that_does_not_answer_its_question_is_refused_with_the_recipe(recipe, changes, message):
    with pytest.raises((ValidationError, RecipeError), match=message):
        RedteamRecipe.model_validate(recipe.model_dump() | changes)


def test_sources_are_named_pinned_and_balanced(recipe, tmp_path):
    for source, message in (
        ({"name": "advbnech"}, "did you mean 'advbench'"),
        ({"name": "advbench"}, "published as a file"),
        ({"name": "pku"}, "needs revision: "),
        ({"name": "file", "path": str(tmp_path / "good.txt")}, "set kind:"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_prompt_source(PromptSource.model_validate(source))
    with pytest.raises(DataError, match="no file"):
        read_prompt_source(PromptSource(name="advbench", path="nowhere.csv"))
    with pytest.raises(RecipeError, match="0% are benign"):
        run_redteam(recipe.model_copy(update={"prompts": recipe.prompts[:1]}))


def test_a_guard_in_front_of_the_model(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(guarded_engine, "open_judge", lambda spec, **_: WordJudge())
    answer = module.open_engine(recipe.model, None)._answer

    def longer(prompt, sample):
        return answer(prompt, sample) + " and more" * sample

    monkeypatch.setattr(module, "open_engine", lambda model, sampling: ScriptedEngine(longer))
    guard = {"kind": "first_safe", "judge": "words:Words", "samples": 1}
    changed = recipe.model_copy(update={"guide": False, "seed": 1, "guard": guarded_engine.FirstSafeSection(**guard)})
    # What the guard lets through is safe, and its refusals make no pairs: nothing is left to pair on harmful prompts.
    (path,) = run_redteam(changed)
    _, pairs = load_pairs(Source(path=str(path)), "main")
    assert {pair.cell for pair in pairs} == {"ss"}
    metadata = json.loads((tmp_path / "out" / "redteam.json").read_text())
    assert metadata["guard"]["refusals"] == metadata["left_out"]["refusal of the guard"] > 0
    assert metadata["guard"]["answers"] == 9


@pytest.mark.parametrize(("num_cut", "keep_cut", "is_told"), [(9, False, True), (8, False, False), (9, True, False)])
def test_a_run_says_early_and_once_that_most_answers_are_cut(capsys, num_cut, keep_cut, is_told):
    recipe = RedteamRecipe.model_validate(
        {
            "out": "o",
            "model": {"path": "m"},
            "prompts": [{"name": "advbench"}],
            "judge": "refusal-rule",
            "max_new_tokens": 64,
            "keep_cut": keep_cut,
        }
    )
    watch = CutWatch(recipe)
    answers = [SimpleNamespace(finish_reason="length" if index < num_cut else "stop") for index in range(16)]
    watch(answers[:15])
    assert capsys.readouterr().out == ""
    for batch in (answers[15:], answers):
        watch(batch)
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("9 of the first 16 answers were cut at 64 tokens") == is_told
    assert bool(told) == is_told
