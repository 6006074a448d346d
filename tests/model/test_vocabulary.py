"""Tokenizers with more tokens than their model: a token without an embedding is refused, with one sentence."""

import io
from copy import deepcopy
from pathlib import Path

import pytest

from bfpo.commands.chat import chat
from bfpo.config.recipes import SftRecipe, TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.errors import ModelError
from bfpo.model.vocabulary import check_token_ids
from bfpo.training.run import run_training
from bfpo.training.run_sft import run_sft
from bfpo.training.sft import SFTTrainer


@pytest.fixture
def extra(tmp_path, monkeypatch, tokenizer, make_model):
    """Write a model whose tokenizer has one token more; return the token's number."""
    monkeypatch.chdir(tmp_path)
    tokenizer = deepcopy(tokenizer)
    number = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained("small")
    make_model(shape="nano").save_pretrained("small")
    return number


def rows(word):
    labels = {"is_chosen_safe": True, "is_rejected_safe": False}
    return [{"prompt": f"what {i} ?", "chosen": f"red box {i} {word}", "rejected": "no"} | labels for i in range(8)]


def train(**options):
    trainer = {"output_dir": "out", "max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 2}
    recipe = {"model": {"path": "small"}, "data": [{"path": "rows.jsonl"}], "trainer": trainer}
    return run_training(TrainRecipe.model_validate(recipe), **options)


def sft(**options):
    trainer = {"output_dir": "out", "max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 2}
    recipe = {"model": {"path": "small"}, "data": [{"path": "rows.jsonl"}], "trainer": trainer}
    return run_sft(SftRecipe.model_validate(recipe), **options)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("run", [train, sft])
def test_training_refuses_tokens_without_an_embedding_before_anything_is_moved(extra, run, dry_run):
    write_jsonl(Path("rows.jsonl"), rows("<extra>"))
    Path("out").mkdir()
    Path("out/metrics.jsonl").touch()
    Path("out/model.safetensors").write_text("an earlier run")
    with pytest.raises(ModelError, match=sentence(extra)):
        run(dry_run=dry_run)
    assert [path.name for path in Path().glob("out*")] == ["out"]
    assert Path("out/model.safetensors").read_text() == "an earlier run"


def sentence(number):
    return f"small: the tokenizer gives token {number}, but the model has only {number} embeddings; do they belong"


@pytest.mark.parametrize("run", [train, sft])
def test_a_token_that_no_text_contains_does_not_stop_a_run(extra, run):
    write_jsonl(Path("rows.jsonl"), rows("box"))
    assert run()["steps"] == 1


@pytest.mark.parametrize("run", [train, sft])
def test_a_token_that_only_the_prompt_for_generation_has_is_refused_before_training(extra, run):
    template = Path("small/chat_template.jinja")
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<extra>{% endif %}")
    write_jsonl(Path("rows.jsonl"), rows("box"))
    with pytest.raises(ModelError, match=sentence(extra)):
        run()


def test_a_trainer_refuses_them_too(extra):
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows("<extra>")]
    with pytest.raises(ModelError, match=sentence(extra)):
        SFTTrainer("small", train_dataset=demonstrations)


def test_a_chat_refuses_them_when_they_are_typed(extra, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("red box\nsmall <extra> box\n"))
    with pytest.raises(ModelError, match=sentence(extra)):
        chat("small", system=None, max_new_tokens=2, temperature=0, seed=0)
    assert "/new starts a new conversation" in capsys.readouterr().out


def test_ids_are_compared_with_the_embeddings(extra, make_model):
    config = make_model(shape="nano").config
    check_token_ids(config, [[extra - 1]], "small")
    with pytest.raises(ModelError, match=sentence(extra)):
        check_token_ids(config, [[0, extra]], "small")
