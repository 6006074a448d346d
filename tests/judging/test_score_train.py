"""Score training in whole runs: what is saved is what was trained, and every reader of it gives the same numbers."""

import contextlib
import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from bfpo.config.loading import check_recipe, dump_recipe, parse_yaml
from bfpo.config.per_token import PerTokenRecipe
from bfpo.config.recipes import ScoreRecipe, Source
from bfpo.core.conversation import Message
from bfpo.core.files import write_jsonl
from bfpo.core.tools import FrozenJson, ToolCall
from bfpo.data.load import SourceReport
from bfpo.data.prepare import is_held_out
from bfpo.data.readings import read_part
from bfpo.data.table import score_table, token_ids
from bfpo.errors import DataError, ModelError, RecipeError
from bfpo.judging.label_pairs import as_completion
from bfpo.judging.open import open_judge
from bfpo.judging.score_quality import cost_quality, reward_quality
from bfpo.judging.score_run import run_score
from bfpo.judging.score_texts import encode_scored
from bfpo.judging.score_trainer import ScoreTrainer
from bfpo.judging.scorers import ScoreJudge
from bfpo.model.score_heads import add_score_heads, padding_id
from bfpo.training.streams import WeightedRow

from ..conftest import pair

CELLS = [(True, True), (True, False), (False, True), (False, False)]
MAIN = [pair(n, chosen_safe=CELLS[n % 4][0], rejected_safe=CELLS[n % 4][1]) for n in range(48)]
BUFFER = [pair(n, stream="buffer") for n in range(100, 124)]
HELD = [pair for pair in MAIN if is_held_out(pair.prompt_key, 0.3)]


def recipe(**changes) -> ScoreRecipe:
    trainer = {
        "output_dir": "runs/scorer", "max_steps": 4, "per_device_train_batch_size": 6, "logging_steps": 1,
        "learning_rate": 3e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    content = {
        "model": {"path": "base"},
        "data": [{"path": "main.jsonl"}],
        "buffer": [{"path": "buffer.jsonl"}],
        "holdout": 0.3,
        "trainer": trainer | changes.pop("trainer", {}),
    }
    return check_recipe(content | changes, ScoreRecipe, "scorer")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_model, tokenizer):
    """A folder with data, a base model and a run of the unchanged recipe, and what `run_score` returned."""
    folder = tmp_path_factory.mktemp("finished")
    make_model(shape="nano").save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_jsonl(folder / "main.jsonl", (pair.to_row() for pair in MAIN))
    # No labels: the buffer trains the reward alone.
    write_jsonl(folder / "buffer.jsonl", (replace(pair, labels=None).to_row() for pair in BUFFER))
    with contextlib.chdir(folder):
        return folder, run_score(recipe())


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    """Work in a copy of that folder."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_by_judge(spec, pairs):
    """Return the scores of both answers of each pair by a judge, (N, 2)."""
    answers = [as_completion(pair, side) for pair in pairs for side in (0, 1)]
    return np.array([verdict.score for verdict in open_judge(spec).judge(answers)]).reshape(-1, 2)


def read_by_transformers(path, pairs):
    """Return the same by transformers alone, from padded batches."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    chats = [
        [*(message.to_row() for message in pair.prompt), {"role": "assistant", "content": answer}]
        for pair in pairs
        for answer in pair.answers
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    with torch.no_grad():
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        return model(**batch).logits[:, 0].double().numpy().reshape(-1, 2)


def check_readers(run, pairs):
    """Check that both readers of the saved heads give the held-out results that training reported."""
    for name in ("reward", "cost"):
        scores = read_by_judge(f"{name}:runs/scorer/{name}", pairs)
        np.testing.assert_allclose(scores, read_by_transformers(f"runs/scorer/{name}", pairs), rtol=1e-4, atol=1e-5)
        prompts = [pair.prompt_key for pair in pairs]
        if name == "reward":
            quality = reward_quality(scores, prompts)
        else:
            quality = cost_quality(
                scores, np.array([[1 - 2 * safe for safe in pair.labels] for pair in pairs]), prompts
            )
        saved = run["evaluation"]["main"][name]
        assert saved["order_accuracy"] == pytest.approx(quality["order_accuracy"])
        # A number that moves with every score.
        assert saved["calibration_error"][0] == pytest.approx(quality["calibration_error"].value, abs=1e-5)


def test_saved_heads_give_the_scores_of_training_to_both_readers(finished):
    folder, run = finished
    with contextlib.chdir(folder):
        check_readers(run, HELD)
        assert run["evaluation"]["main"]["pairs"] == len(HELD) > 8
        assert set(run["evaluation"]["buffer"]) == {"pairs", "loss", "reward"}
        assert json.loads(Path("runs/scorer/run.json").read_text())["evaluation"]["main"]["cost"]["sign_accuracy"]
        card = Path("runs/scorer/README.md").read_text()
        assert 'AutoModelForSequenceClassification.from_pretrained("runs/scorer/reward")' in card
        assert "| main | cost | sign accuracy |" in card


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_saved_heads(folder):
    run = run_score(recipe(lora={"r": 2}))
    check_readers(run, HELD)
    assert run["trained"]["parameters"] < 0.3 * run["trained"]["of"]
    assert not list(Path("runs/scorer/reward").glob("adapter*"))


@pytest.mark.slow
def test_the_packing_does_not_change_what_is_trained(folder):
    losses = [run_score(recipe(layout={"kind": kind}))["train_loss"] for kind in ("packed", "padded")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(folder, finished):
    run_score(
        recipe(trainer={"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "output_dir": "runs/resumed"})
    )
    trainer = {
        "resume_from_checkpoint": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "output_dir": "runs/resumed",
    }
    resumed = run_score(recipe(trainer=trainer))
    assert resumed["evaluation"] == finished[1]["evaluation"]
    with pytest.raises(RecipeError, match="regularization"):
        run_score(recipe(trainer=trainer, regularization=0.1))


@pytest.mark.slow
def test_train_only_trains_the_heads_too(folder):
    run = run_score(recipe(train_only=["down_proj"]))
    base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=1)
    trained = AutoModelForSequenceClassification.from_pretrained("runs/scorer/cost")
    changed = {
        name
        for name, weight in trained.named_parameters()
        if not torch.equal(weight, dict(base.named_parameters())[name])
    }
    assert {name.split(".")[-2] for name in changed} == {"down_proj", "score"}
    check_readers(run, HELD)


def test_one_head_needs_only_its_own_labels(folder):
    write_jsonl(folder / "main.jsonl", (replace(pair, labels=None).to_row() for pair in MAIN))
    with pytest.raises(DataError, match=r"pairs without safety labels \(row"):
        run_score(recipe())
    run = run_score(recipe(heads={"cost": False}))
    assert set(run["evaluation"]["main"]) == {"pairs", "loss", "reward"}
    assert not Path("runs/scorer/cost").exists()


def trainer_of(table, make_model, tokenizer, **options):
    model = add_score_heads(make_model(shape="nano"), 2, pad_id=padding_id(tokenizer), seed=0)
    args = TrainingArguments("unused", per_device_train_batch_size=4, use_cpu=True, report_to="none")
    return ScoreTrainer(model, args, table, {}, tokenizer, heads=("reward", "cost"), **options)


def encode(pairs, tokenizer, **options):
    return encode_scored(pairs, tokenizer, SourceReport("toy", Source(path="-")), **{"max_length": 512, **options})


def test_pairs_of_the_buffer_train_the_reward_alone(make_model, tokenizer):
    kept, examples = encode(BUFFER[:4], tokenizer)
    labeled = [replace(pair, labels=MAIN[1].labels) for pair in kept]
    trainer = trainer_of(score_table(examples, [*MAIN[:1], *labeled[1:]]), make_model, tokenizer)
    (batch,) = trainer.data_collator([WeightedRow(1, 1.0), WeightedRow(2, 1.0)])["packs"]
    trainer.example_losses(trainer.model, batch, trainer._train_sums, training=True).sum().backward()
    gradient = trainer.model.score.weight.grad
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0


def test_costs_order_answers_with_equal_labels(tokenizer):
    kept, examples = encode(MAIN[:4], tokenizer)
    # The second and the third have one unsafe answer, whose label decides; costs of the last say nothing.
    costs = [(-3.0, -1.0), (5.0, 1.0), (1.0, 2.0), (0.5, 0.5)]
    pairs = [
        replace(pair, signals=replace(pair.signals, chosen_cost=chosen, rejected_cost=rejected))
        for pair, (chosen, rejected) in zip(kept, costs, strict=True)
    ]
    assert score_table(examples, kept).order.tolist() == [0, -1, 1, 0]
    assert score_table(examples, pairs).order.tolist() == [-1, -1, 1, 0]
    swapped = [replace(pair, signals=pair.signals.swapped()) for pair in pairs[:1]]
    assert score_table(examples[:1], swapped).order.tolist() == [1]
    buffer = [replace(pair, provenance=replace(pair.provenance, stream="buffer")) for pair in pairs]
    assert score_table(examples, buffer).order.tolist() == [0, 0, 0, 0]


def test_ids_are_those_that_a_judge_reads(tokenizer):
    thought = Message("assistant", "red box", "round thing")
    call = Message("assistant", "", tool_calls=(ToolCall("look", FrozenJson.freeze({"place": "near"})),))
    pairs = [*MAIN[:3], replace(MAIN[3], chosen=(thought,), rejected=(call,))]
    kept, examples = encode(pairs, tokenizer)
    assert kept == pairs
    table = score_table(examples, kept)
    reader = ScoreJudge("cost", None, tokenizer, "toy")
    for index, original in enumerate(pairs):
        prompt, completions = table[index]
        for side, completion in enumerate(completions):
            text, _ = reader.render(read_part(as_completion(original, side)))
            assert [*prompt, *token_ids(completion[:-1])] == reader._encode(text)
            assert (completion >= 0).sum() == 1
        # What both texts share is fed once.
        assert token_ids(completions[0])[0] != token_ids(completions[1])[0]


def test_pairs_that_do_not_fit_are_counted(tokenizer):
    report = SourceReport("toy", Source(path="-"))
    long = replace(MAIN[0], chosen="red " * 600)
    same = replace(MAIN[1], chosen="red box", rejected="red box")
    kept, examples = encode_scored([long, same, MAIN[2]], tokenizer, report, max_length=512)
    assert kept == [MAIN[2]]
    assert len(examples) == 1
    assert {reason[0]: count for reason, count in report.dropped.items()} == {
        "longer than text.max_length": 1,
        "identical answers after the chat template": 1,
    }


def test_a_dry_run_trains_nothing(folder):
    shutil.rmtree("runs")
    manifest = run_score(recipe(), dry_run=True)
    assert manifest["train"]["main"]["us"] > 0
    assert not Path("runs").exists()


def test_a_resolved_recipe_reads_back_as_itself():
    checked = recipe(lora={"r": 2}, heads={"cost": False})
    assert check_recipe(parse_yaml(dump_recipe(checked), "resolved"), ScoreRecipe, "resolved") == checked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": {"reward": False, "cost": False}}, "heads has neither a reward nor a cost"),
        ({"heads": {"reward": False}}, r"buffer trains the reward alone.*leave buffer out"),
        ({"heads": {"rewards": True}}, "heads.rewards: unknown key; did you mean 'reward'"),
        ({"text": {"thinking": "score"}}, "text.truncation and text.thinking have no effect"),
        ({"model": {"path": "base", "load_in_4bit": True}}, "model.load_in_4bit isn't possible for score models"),
        ({"lora": {"r": 2}, "train_only": ["down_proj"]}, "train_only and lora can't be combined"),
        ({"regularization": -1}, "regularization"),
    ],
)
def test_wrong_keys_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)


def test_data_that_a_cost_can_not_learn_from_are_refused(folder):
    write_jsonl(folder / "main.jsonl", (pair.to_row() for pair in MAIN[::4]))
    with pytest.raises(DataError, match=r"all answers .* are labeled safe, so a cost has nothing to learn"):
        run_score(recipe())


def test_a_head_is_read_by_its_own_kind(folder):
    with pytest.raises(ModelError, match="a sequence classifier of transformers; cost:runs/scorer/cost reads it"):
        open_judge("beaver-cost:runs/scorer/cost")
    with pytest.raises(ModelError, match="no trained head for cost"):
        open_judge("cost:base")


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ModelError, match=r"no chat template; set text\.chat_template"):
        encode(MAIN[:1], plain)


def test_the_recipes_of_the_page_are_recipes():
    page = (Path(__file__).parents[2] / "docs" / "scores.md").read_text()
    text, per_token = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert check_recipe(parse_yaml(text, "page"), ScoreRecipe, "page").heads.names == ("reward", "cost")
    assert check_recipe(parse_yaml(per_token, "page"), PerTokenRecipe, "page").units == 256
