"""What a hostile model folder, recipe or file of a judge can't do; SECURITY.md says the same in words."""

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from bfpo.config.loading import load_recipe, parse_yaml
from bfpo.config.recipes import ModelSection, TrainRecipe
from bfpo.errors import DataError, ModelError, RecipeError
from bfpo.judging.linear import load_judge
from bfpo.model.load import load_model, load_tokenizer
from bfpo.training.arguments import training_arguments

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


def test_an_import_path_in_a_recipe_is_code(folder):
    (folder / "mine.py").write_text("import os\nos.mkdir('executed')\nLoss = 3\n")
    Path("r.yaml").write_text(
        json.dumps({"model": {"path": "x"}, "data": [{"path": "x"}], "loss": {"name": "mine:Loss"}})
    )
    from bfpo.losses.build import make_loss

    with pytest.raises((RecipeError, TypeError)):
        make_loss(load_recipe("r.yaml", TrainRecipe).loss.model_dump())
    assert Path("executed").exists()
