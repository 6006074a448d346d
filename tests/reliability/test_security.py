"""What a hostile model folder, recipe or file of a judge can't do; SECURITY.md says the same in words."""

import gzip
import json
import os
import pickle
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from bfpo.config.loading import load_recipe, parse_yaml
from bfpo.config.recipes import ModelSection, SftRecipe, Source, TrainRecipe
from bfpo.data import rows
from bfpo.data.rows import read_prompts, read_rows
from bfpo.errors import DataError, ModelError, RecipeError, TrainingError
from bfpo.judging.linear import load_judge
from bfpo.model.load import load_model, load_tokenizer
from bfpo.training.arguments import training_arguments
from bfpo.training.checkpoints import MARK, read_mark, write_mark
from bfpo.training.run_sft import run_sft

pytestmark = pytest.mark.slow


class Touch:
    """A pickle that makes a file where it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_code_of_a_model_folder_does_not_run(folder, tokenizer, make_model):
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    (folder / "model" / "evil.py").write_text("import os\nos.mkdir('executed')\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        path = folder / "model" / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"auto_map": classes, "model_type": "evil"}))
    with pytest.raises(ModelError, match="model 'model'"):
        load_model(ModelSection(path="model"))
    # The class of the tokenizer may be known without the code.
    with suppress(ModelError):
        load_tokenizer(ModelSection(path="model"))
    assert not Path("executed").exists()


def test_the_file_of_a_judge_is_no_pickle(folder):
    np.savez("judge.npz", format=np.array([Touch()], dtype=object))
    with pytest.raises(DataError, match="not the file of a judge"):
        load_judge(Path("judge.npz"))
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.mkdir [executed]", "x: !!python/name:os.system", "!!python/object/new:os.mkdir [x]"],
)
def test_yaml_makes_no_python_objects(text):
    with pytest.raises(RecipeError, match="could not determine a constructor"):
        parse_yaml(text, "r.yaml")
    assert not Path("executed").exists()


def test_aliases_that_multiply_are_refused_at_once():
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(RecipeError, match="more than 100,000 values with all aliases"):
        parse_yaml("\n".join(lines), "r.yaml")


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token"])
def test_a_recipe_with_a_token_is_refused_without_showing_it(key):
    recipe = {"model": {"path": "x"}, "data": [{"path": "x"}], "trainer": {"output_dir": "o", key: "hf_SECRET"}}
    Path("r.yaml").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=f"trainer.{key}") as raised:
        training_arguments(load_recipe("r.yaml", TrainRecipe).trainer)
    assert "SECRET" not in str(raised.value)


def train(**options):
    """Train for two steps in the current folder, with a checkpoint after each."""
    trainer = {"output_dir": "runs/mine", "max_steps": 2, "save_steps": 1, "use_cpu": True}
    recipe = {"model": {"path": "model"}, "data": [{"path": "rows.jsonl"}], "trainer": trainer | options}
    return run_sft(SftRecipe.model_validate(recipe))


@pytest.fixture
def model_and_rows(folder, tokenizer, make_model):
    make_model(shape="nano").save_pretrained("model")
    tokenizer.save_pretrained("model")
    labels = {"is_chosen_safe": True, "is_rejected_safe": False}
    texts = [{"prompt": f"red {i}", "chosen": "a box", "rejected": "a ball"} for i in range(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row | labels) + "\n" for row in texts))


def test_training_args_are_not_read(model_and_rows):
    Path("model/training_args.bin").write_bytes(pickle.dumps(Touch(), protocol=2))
    train()
    assert not Path("executed").exists()
    # Nor those that transformers writes into our own checkpoints.
    checkpoint = Path("runs/mine/checkpoint-1")
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Touch(), protocol=2))
    mark_again(checkpoint)
    train(resume_from_checkpoint=str(checkpoint), output_dir="runs/other")
    assert not Path("executed").exists()


def mark_again(folder):
    """Write the mark of a changed checkpoint, as someone who wants it to be used would."""
    mark = read_mark(folder)
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MARK]
    write_mark(folder, files, {key: mark[key] for key in ("step", "threads", "run")})


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_executed(model_and_rows, name):
    train()
    checkpoint = Path("runs/mine/checkpoint-1")
    (checkpoint / name).write_bytes(pickle.dumps(Touch(), protocol=2))
    # The hashes of the mark find it, and without them torch's loader for weights refuses it.
    with pytest.raises(TrainingError, match=name):
        train(resume_from_checkpoint=str(checkpoint), output_dir="runs/other")
    mark_again(checkpoint)
    with pytest.raises(TrainingError, match=r"checkpoint-1 can't be read"):
        train(resume_from_checkpoint=str(checkpoint), output_dir="runs/other")
    assert not Path("executed").exists()


def test_a_training_writes_only_where_its_recipe_says(model_and_rows):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    train()
    after = {path for path in Path().rglob("*") if path.is_file()}
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what it reads is unchanged"
    # The output folder, and caches and locks beside it.
    assert {path.parts[0] for path in after - before.keys()} == {"runs"}
    assert {path.parts[1] for path in after - before.keys()} <= {"mine", "cache", ".mine.lock"}


def test_a_compressed_file_is_read_line_by_line_and_a_line_has_a_limit(folder, monkeypatch):
    row = json.dumps({"prompt": "p" * 2000}) + "\n"
    with gzip.open("rows.jsonl.gz", "wt") as file:
        file.writelines([row] * 20_000)
    tracemalloc.start()
    count = sum(1 for _ in read_rows(Source(path="rows.jsonl.gz")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < len(row) * count / 20
    monkeypatch.setattr(rows, "MAX_LINE", 1000)
    for name in ("rows.jsonl.gz", "prompts.txt"):
        Path("prompts.txt").write_text("x" * 1001)
        with pytest.raises(DataError, match=f"{name}: a line of more than 1,000 characters"):
            list(read_rows(Source(path=name)) if name.endswith("gz") else read_prompts(name))


def test_an_import_path_in_a_recipe_is_code(folder):
    (folder / "mine.py").write_text("import os\nos.mkdir('executed')\nLoss = 3\n")
    Path("r.yaml").write_text(
        json.dumps({"model": {"path": "x"}, "data": [{"path": "x"}], "loss": {"name": "mine:Loss"}})
    )
    from bfpo.losses.build import make_loss

    with pytest.raises((RecipeError, TypeError)):
        make_loss(load_recipe("r.yaml", TrainRecipe).loss.model_dump())
    assert Path("executed").exists()
