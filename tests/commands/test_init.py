"""`bfpo init`: recipes that dry-run as they are written, questions, and what is refused."""

import sys
from pathlib import Path

import pytest
import typer

from bfpo.commands.init import find_source, init
from bfpo.config.loading import check_recipe, read_recipe
from bfpo.config.recipes import NewModel, TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.data.examples import PAIR_EXAMPLES
from bfpo.errors import DataError, RecipeError
from bfpo.model.new import new_model
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.training.run import run_training


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, main_pairs, buffer_pairs, tokenizer):
    """Work in a folder with a tiny model, labeled, unlabeled and helpful pairs, and prompts; without a terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    new_model(NewModel(shape="nano"), tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [pair.to_row() for pair in main_pairs]
    write_jsonl(Path("pairs.jsonl"), rows)
    write_jsonl(Path("helpful.jsonl"), (pair.to_row() for pair in buffer_pairs))
    without = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    write_jsonl(Path("unlabeled.jsonl"), without)
    write_jsonl(Path("prompts.jsonl"), [{"prompt": "near which red box"}])


def write(goal, *data, buffer=(), device="cpu", out="recipe.yaml"):
    init("model", list(data), list(buffer), goal, device, Path(out))
    return Path(out).read_text()


def dry_run(file="recipe.yaml"):
    run_training(check_recipe(read_recipe(Path(file)), TrainRecipe, file), dry_run=True)


@pytest.mark.parametrize("goal", ["safer", "at-most", "sft-first"])
def test_a_recipe_dry_runs_as_it_is_written(goal, capsys):
    text = write(goal, "pairs.jsonl", buffer=["helpful.jsonl"])
    printed = capsys.readouterr().out
    assert "cell (chosen means more helpful)" in printed
    assert "What was chosen, and why" in printed
    assert "bfpo train recipe.yaml --dry-run" in printed
    assert "# learning_rate: that of SmolLM2-135M in docs/real-models.md\n" in text
    dry_run()
    assert "dry run: nothing was trained" in capsys.readouterr().out


def test_unlabeled_pairs_are_labeled_first_and_then_train():
    text = write("label-first", "unlabeled.jsonl")
    assert "#   bfpo label unlabeled.jsonl --judge " in text
    with pytest.raises(DataError, match=r"labels/pairs\.jsonl"):
        dry_run()
    Path("labels").mkdir()
    Path("pairs.jsonl").rename("labels/pairs.jsonl")
    dry_run()


def test_prompts_alone_are_for_red_teaming():
    write("redteam", "prompts.jsonl")
    recipe = check_recipe(read_recipe(Path("recipe.yaml")), RedteamRecipe, "recipe.yaml")
    assert [source.path for source in recipe.prompts] == ["prompts.jsonl", None]


def test_an_adapter_is_recognized_by_its_rows_or_named():
    write_jsonl(Path("pku.jsonl"), PAIR_EXAMPLES["pku_saferlhf"].rows)
    write_jsonl(Path("hh.jsonl"), PAIR_EXAMPLES["hh_rlhf"].rows)
    assert find_source("pku.jsonl", can_ask=False).adapter == "pku_saferlhf"
    assert find_source("hh.jsonl", can_ask=False).adapter == "hh_rlhf"
    assert find_source("pku_saferlhf_by_safety:pku.jsonl", can_ask=False).adapter == "pku_saferlhf_by_safety"
    published = find_source("HuggingFaceH4/ultrafeedback_binarized", can_ask=False)
    assert (published.adapter, published.split) == ("ultrafeedback", "train_prefs")
    write_jsonl(Path("odd.jsonl"), [{"question": "a", "good": "b"}])
    with pytest.raises(RecipeError, match=r"has the columns question, good, which no adapter .* ADAPTER:PATH"):
        find_source("odd.jsonl", can_ask=False)


def test_what_is_missing_is_asked_for_on_a_terminal(monkeypatch):
    answers = iter(["model", "pairs.jsonl", "helpful.jsonl", "helpful", "at-most"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "prompt", lambda *question, **options: next(answers))
    init(None, [], [], None, "cpu", Path("recipe.yaml"))
    recipe = check_recipe(read_recipe(Path("recipe.yaml")), TrainRecipe, "recipe.yaml")
    assert (recipe.model.path, recipe.buffer[0].path) == ("model", "helpful.jsonl")
    assert next(answers, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None, "data": []}, "`model`, `data` missing, and there is no terminal"),
        ({"goal": None}, "`goal` missing, and there is no terminal to ask on; goals are safer, at-most"),
        ({"goal": "safe"}, "`goal` is 'safe'; did you mean 'safer'"),
        ({"device": "tpu"}, "`device` is 'tpu'; "),
        ({"data": ["unlabeled.jsonl"]}, "12 of 12 pairs have no safety labels; choose label-first"),
        ({"buffer": ["prompts.jsonl"]}, "`buffer` 'prompts.jsonl' has prompts without answers; a buffer needs pairs"),
        ({"data": ["prompts.jsonl", "pairs.jsonl"]}, "prompts without answers, and pairs; give one of both"),
    ],
)
def test_what_is_missing_or_wrong_is_named_without_a_terminal(options, message):
    given = {"model": "model", "data": ["pairs.jsonl"], "buffer": [], "goal": "safer", "device": "cpu"} | options
    with pytest.raises(RecipeError, match=message):
        init(**given, out=Path("recipe.yaml"))
    assert not Path("recipe.yaml").exists()


def test_a_file_is_not_overwritten():
    Path("recipe.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"`out` 'recipe\.yaml' exists"):
        write("safer", "pairs.jsonl")
    assert Path("recipe.yaml").read_text() == "mine"
