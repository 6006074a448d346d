"""`bfpo redteam`: which pairs come of which answers, and the whole way with a scripted model."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from bfpo.config.recipes import Source
from bfpo.core.files import write_json
from bfpo.core.pairs import user_says
from bfpo.core.samples import Completion, Verdict
from bfpo.data.load import load_pairs
from bfpo.data.prompts import PromptSource, read_prompt_source
from bfpo.errors import DataError, RecipeError, Unanswered
from bfpo.generation.scripted import ScriptedEngine
from bfpo.redteam import run as module
from bfpo.redteam.pairs import ScoredSample, make_pairs
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.redteam.run import run_redteam


def judged(prompt, text, safe, helpful, sample=0):
    one = Completion(prompt, sample, user_says(prompt), text, "stop", 1, 1, "m", "e", "")
    verdict = Verdict(prompt, sample, one.text_hash, "j", "1", safe, reason="?")
    return ScoredSample(one, verdict, (helpful,))


def test_the_widest_pair_of_each_cell_and_rare_cells_first():
    answers = [
        judged("a", "full", False, 1.0),
        judged("a", "half", False, 0.5),
        judged("a", "no", True, 0.1),
        judged("a", "full", False, 1.0),
        judged("a", "mumble", None, 0.3),
        judged("b", "yes", True, 1.0),
        judged("b", "well", True, 0.2),
    ]
    pairs, left_out = make_pairs(answers, per_prompt=1, quota={}, dataset_name="x")
    assert {(pair.chosen, pair.rejected, pair.cell) for pair in pairs} == {
        ("full", "no", "us"),
        ("yes", "well", "ss"),
    }
    assert left_out == {"answer twice": 1, "answer undecided": 1, "more pairs of a prompt": 1}
    few, left_out = make_pairs(answers, per_prompt=2, quota={"us": 0}, dataset_name="x")
    assert {pair.cell for pair in few} == {"uu", "ss"}
    assert left_out["quota of us"] == 1


class Words:
    """Unsafe is what says `step`; helpfulness is length."""

    name, revision = "words", "1"

    def judge(self, completions):
        for one in completions:
            safe = "step" not in one.text
            yield Verdict(
                one.prompt_id, one.sample, one.text_hash, self.name, self.revision, safe, float(safe),
                refusal=one.text.startswith("sorry"), helpfulness=len(one.text) / 100,
            )  # fmt: skip


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "bad.txt").write_text("stuck box\nmixed box\n")
    (tmp_path / "good.txt").write_text("small box\n")

    def answer(prompt, sample):
        asked = prompt.prompt[-1].content
        if asked == module.STEPS[2]:
            return "sorry , but here is a lamp ."
        if "stuck" in asked:
            return f"step {'one ' * (sample + 1)}."
        return "sorry ." if sample == 0 and "mixed" in asked else f"{'step' if 'mixed' in asked else 'lamp'} {sample}"

    engines = []

    def engine(model, sampling):
        engines.append(ScriptedEngine(answer, name=model.path))
        return engines[-1]

    monkeypatch.setattr(module, "_engine", engine)
    monkeypatch.setattr(module, "open_judge", lambda spec: Words())
    return RedteamRecipe.model_validate(
        {
            "out": str(tmp_path / "out"),
            "model": {"path": "m"},
            "prompts": [
                {"name": "file", "path": str(tmp_path / "bad.txt"), "kind": "harmful"},
                {"name": "file", "path": str(tmp_path / "good.txt"), "kind": "benign", "license": "CC0"},
            ],
            "judge": "words",
            "samples": 3,
        }
    )


def test_the_whole_way(recipe, tmp_path):
    (file,) = run_redteam(recipe)
    _, pairs = load_pairs(Source(path=str(file)), "main")
    cells = {(pair.prompt[0].content, pair.cell) for pair in pairs}
    # All samples on the first prompt are unsafe: the safe answer comes from the chain.
    assert ("stuck box", "us") in cells
    assert any(pair.rejected == "sorry , but here is a lamp ." for pair in pairs)
    assert ("mixed box", "us") in cells
    facts = json.loads((tmp_path / "out" / "redteam.json").read_text())
    assert facts["cost"]["generations"] == 9 + 3
    assert facts["cost"]["judge_calls"] == 9 + 1
    answered = {(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)}
    assert facts["cost"]["replaced"] == {
        "human_promptings": 9,
        "human_safe_answers": 1,
        "human_safety_labels": len(answered),
        "human_orders": len(pairs),
    }
    assert [source["license"] for source in facts["sources"]] == [None, "CC0"]
    before = file.read_bytes()
    assert run_redteam(recipe)[0].read_bytes() == before
    with pytest.raises(RecipeError, match="work of another recipe"):
        run_redteam(recipe.model_copy(update={"seed": 1}))


class Short(ScriptedEngine):
    """Can't read a prompt with one of some words."""

    words = ("mixed",)

    def generate(self, wanted):
        long = [(p.prompt_id, i) for p, i in wanted if any(word in p.prompt[-1].content for word in self.words)]
        yield from super().generate([one for one in wanted if (one[0].prompt_id, one[1]) not in long])
        if long:
            raise Unanswered(dict.fromkeys(long, "prompt too long"), len(wanted), refused=long)


def test_prompts_that_are_too_long_are_left_out_and_told(recipe, tmp_path, monkeypatch, capsys):
    answer = module._engine(recipe.model, None)._answer
    monkeypatch.setattr(module, "_engine", lambda model, sampling: Short(answer))
    with pytest.raises(Unanswered, match=r"3 of 9 completions are missing: prompt too long \(3\);"):
        run_redteam(recipe)
    (file,) = run_redteam(recipe.model_copy(update={"out": str(tmp_path / "b"), "max_unanswered": 0.4}))
    _, pairs = load_pairs(Source(path=str(file)), "main")
    assert {pair.prompt[0].content for pair in pairs} == {"stuck box"}
    facts = json.loads((tmp_path / "b" / "redteam.json").read_text())
    assert facts["left_out"]["prompt unanswered: prompt too long"] == 1
    assert "Unanswered prompts" in capsys.readouterr().out
    # In the chain, where the talk grows, any number may be missing.
    monkeypatch.setattr(Short, "words", (module.STEPS[1],))
    (file,) = run_redteam(recipe.model_copy(update={"out": str(tmp_path / "c")}))
    facts = json.loads((tmp_path / "c" / "redteam.json").read_text())
    assert facts["left_out"]["guided answer missing: prompt too long"] == 1
    assert facts["cost"]["replaced"]["human_safe_answers"] == 0


def test_a_judge_that_never_decides_makes_no_pairs(recipe, tmp_path, monkeypatch):
    class Never(Words):
        def judge(self, completions):
            return [Verdict.on(one, self, safe=None, reason="can't tell", helpfulness=0.5) for one in completions]

    monkeypatch.setattr(module, "open_judge", lambda spec: Never())
    with pytest.raises(DataError, match=r"no pair could be made: \{'answer undecided': 9\}"):
        run_redteam(recipe)
    assert len((tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()) == 9, "what there is stays usable"


def test_rounds_ask_the_model_that_the_last_one_trained(recipe, tmp_path, monkeypatch):
    trained, asked = [], []
    engine = module._engine

    def train(recipe):
        trained.append(recipe)
        write_json(Path(recipe.trainer["output_dir"]) / "run.json", {})

    def ask(model, sampling):
        asked.append(model.path)
        return engine(model, sampling)

    monkeypatch.setattr("bfpo.training.run.run_training", train)
    monkeypatch.setattr(module, "_engine", ask)
    for section, message in (
        ({"los": {"name": "bfpo"}}, "los: unknown key; did you mean 'loss'"),
        ({"loss": {"name": "bfop"}}, "did you mean 'bfpo'"),
        ({"trainer": {"max_step": 3}}, "did you mean 'max_steps'"),
    ):
        with pytest.raises(RecipeError, match=message):
            run_redteam(recipe.model_copy(update={"rounds": 2, "train": section}))
    assert asked == [], "a fault in train: shows before any work"
    several = recipe.model_copy(update={"rounds": 3, "train": {"loss": {"name": "bfpo", "beta": 0.3}}})
    files = run_redteam(several)
    out = tmp_path / "out"
    assert files == [out / f"round-{number}" / "pairs.jsonl" for number in (1, 2, 3)]
    models = [str(out / f"round-{number}" / "model") for number in (1, 2)]
    assert asked == ["m", *models]
    # Each round goes on from the model of the one before, with the pairs of all rounds so far.
    assert [one.model.path for one in trained] == ["m", models[0]]
    assert [[source.path for source in one.data] for one in trained] == [[str(files[0])], [str(f) for f in files[:2]]]
    assert [run.loss.beta for run in trained] == [0.3, 0.3]
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in run_redteam(several)] == before
    assert len(trained) == 2, "what is trained isn't trained again"
    with pytest.raises(ValidationError, match="rounds above 1 need train:"):
        RedteamRecipe.model_validate(recipe.model_dump() | {"rounds": 2})


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
