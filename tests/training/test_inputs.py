"""Trainers from a path and rows, as in TRL: defaults, the model's own tokenizer, and inputs of the wrong type."""

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from bfpo import BFPOTrainer, SFTTrainer
from bfpo.config.recipes import TextSection
from bfpo.data.table import token_table
from bfpo.errors import DataError, ModelError
from bfpo.losses.pairwise import BFPO
from bfpo.training.encode import as_pairs, encode_demonstrations, encode_pairs

ROWS = [
    {
        "prompt": f"{color} box",
        "chosen": "round lamp",
        "rejected": "small door",
        "is_chosen_safe": True,
        "is_rejected_safe": is_safe,
    }
    for color in ("red", "green", "blue")
    for is_safe in (True, False)
]
COMPLETIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, make_model, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    make_model(shape="nano").save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return folder


@pytest.fixture(autouse=True)
def folder(model_folder, tmp_path, monkeypatch):
    """Work in a folder with the model `org/tiny` and its tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").symlink_to(model_folder)


def arguments(**changes):
    return TrainingArguments("out", max_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, **changes)


def test_bfpo_trainer_needs_only_a_path_and_rows():
    trainer = BFPOTrainer(model="org/tiny", train_dataset=ROWS)
    assert trainer.args.output_dir == "tiny-BFPO"
    assert (trainer.args.learning_rate, trainer.args.logging_steps, trainer.args.report_to) == (1e-6, 10, [])
    assert trainer.model.dtype == torch.float32
    result = trainer.train()
    # Three epochs of the six rows in batches of eight.
    assert result.global_step == 3
    trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained("tiny-BFPO")
    tokenizer = AutoTokenizer.from_pretrained("tiny-BFPO")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red box"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert saved.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]
    start = AutoModelForCausalLM.from_pretrained("org/tiny")
    assert not torch.equal(saved.lm_head.weight, start.lm_head.weight)


def test_sft_trainer_needs_only_a_path_and_rows():
    trainer = SFTTrainer(model="org/tiny", train_dataset=COMPLETIONS, eval_dataset=COMPLETIONS)
    assert (trainer.args.output_dir, trainer.args.learning_rate) == ("tiny-SFT", 2e-5)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model()
    AutoModelForCausalLM.from_pretrained("tiny-SFT")
    assert AutoTokenizer.from_pretrained("tiny-SFT").chat_template


def test_a_path_gives_the_numbers_of_the_model_and_its_tokenizer(tokenizer):
    from_path = BFPOTrainer("org/tiny", arguments(), ROWS)
    model = AutoModelForCausalLM.from_pretrained("org/tiny")
    from_model = BFPOTrainer(model, arguments(), ROWS, processing_class=tokenizer)
    for trainer in (from_path, from_model):
        trainer.train()
    first, second = (trainer.model.state_dict() for trainer in (from_path, from_model))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("make_path", [lambda folder: "org/tiny", lambda folder: folder / "org/tiny"])
def test_a_path_may_be_a_string_or_a_path(make_path, tmp_path):
    assert SFTTrainer(make_path(tmp_path), train_dataset=COMPLETIONS).args.output_dir == "tiny-SFT"


def test_the_tokenizer_of_a_model_is_found_by_its_name(tokenizer):
    model = AutoModelForCausalLM.from_pretrained("org/tiny")
    trainer = BFPOTrainer(model, train_dataset=datasets.Dataset.from_list(ROWS), eval_dataset=ROWS)
    assert trainer.args.output_dir == "tiny-BFPO"
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()
    assert trainer.evaluate()["eval_loss"] > 0


def test_all_data_sets_and_a_new_adapter(make_model, tokenizer):
    trainer = BFPOTrainer(
        model="org/tiny",
        args=arguments(),
        train_dataset=datasets.Dataset.from_list(ROWS),
        buffer_dataset=ROWS[::2],
        eval_dataset=datasets.DatasetDict(first=datasets.Dataset.from_list(ROWS)),
        loss=BFPO(beta=0.5),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        text=TextSection(max_length=64),
    )
    assert (len(trainer.plan.main), len(trainer.plan.buffer)) == (6, 3)
    trainer.train()
    assert trainer.evaluate()["eval_first_loss"] > 0
    trainer.save_model("adapter")
    # A path to an adapter is its base model with the adapter on it, which is trained further.
    further = SFTTrainer("adapter", train_dataset=COMPLETIONS)
    assert isinstance(further.model, PeftModel)
    assert further.args.output_dir == "adapter-SFT"


def test_sft_trainer_adds_an_adapter():
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer("org/tiny", arguments(), COMPLETIONS, peft_config=config)
    trainer.train()
    assert trainer.selection.trained < 0.2 * trainer.selection.total


def test_tables_of_a_model_without_a_name_need_no_tokenizer(make_model, tokenizer):
    pairs = encode_pairs(as_pairs(ROWS, "rows"), BFPO(), tokenizer)
    assert BFPOTrainer(make_model(), arguments(), pairs, eval_dataset=pairs).processing_class is None
    examples = [pairs[row]._replace(completions=pairs[row].completions[:1]) for row in range(len(pairs))]
    assert SFTTrainer(make_model(), arguments(), token_table(examples, pairs.row_ids)).processing_class is None


def test_messages_are_demonstrations(tokenizer):
    messages = [{"role": "user", "content": "red box"}, {"role": "assistant", "content": "round lamp"}]
    from_messages = SFTTrainer("org/tiny", train_dataset=[{"messages": messages}]).table
    from_columns = SFTTrainer("org/tiny", train_dataset=COMPLETIONS[:1]).table
    assert from_messages.ids.tolist() == from_columns.ids.tolist()


@pytest.mark.parametrize("trainer", [BFPOTrainer, SFTTrainer])
def test_a_missing_model_is_named(trainer):
    with pytest.raises(ModelError, match=r"model './nothing': no such folder, and not a hub id"):
        trainer("./nothing", train_dataset=ROWS)


def test_a_missing_tokenizer_is_named(make_model, tmp_path):
    with pytest.raises(ModelError, match="processing_class is missing, and the model has no path"):
        BFPOTrainer(make_model(), train_dataset=ROWS)
    make_model(shape="nano").save_pretrained("bare")
    with pytest.raises(ModelError, match="tokenizer of model 'bare'"):
        BFPOTrainer("bare", train_dataset=ROWS)
    with pytest.raises(
        ModelError, match=r"processing_class is missing, .* can't be loaded: tokenizer of model 'bare'"
    ):
        BFPOTrainer(AutoModelForCausalLM.from_pretrained("bare"), train_dataset=ROWS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_dataset": None}, TypeError, "BFPOTrainer needs a train_dataset"),
        ({"model": None}, TypeError, "model is a NoneType; expected a folder, a hub id or a model of transformers"),
        ({"args": ROWS}, TypeError, "args is a list; expected transformers.TrainingArguments"),
        ({"processing_class": "org/tiny"}, TypeError, "processing_class is a str; expected a tokenizer"),
        (
            {"train_dataset": "pairs.jsonl"},
            TypeError,
            "train_dataset is a str; expected a data set or a list of rows",
        ),
        ({"train_dataset": ROWS[0]}, TypeError, "train_dataset is a dict; expected a data set or a list of rows"),
        ({"train_dataset": 5}, TypeError, "train_dataset is a int; expected a data set or a list of rows"),
        (
            {"train_dataset": ["text"]},
            TypeError,
            "train_dataset row 1 is a str; expected a PreferencePair, or a dict",
        ),
        ({"eval_dataset": ROWS[0]}, TypeError, "eval_dataset is a str; expected"),
        ({"buffer_dataset": [{}]}, DataError, "buffer_dataset row 1: "),
        ({"train_dataset": COMPLETIONS}, DataError, "train_dataset row 1: no column 'chosen'"),
        (
            {"eval_dataset": [{"prompt": ROWS[0]["prompt"], "chosen": "lamp", "rejected": "door"}]},
            DataError,
            "eval_dataset row 1 has no safety labels; add the columns is_chosen_safe and is_rejected_safe",
        ),
        (
            {"train_dataset": [ROWS[0], {**ROWS[1], "is_chosen_safe": "perhaps"}]},
            DataError,
            "train_dataset row 2: column 'is_chosen_safe'",
        ),
        ({"train_dataset": []}, DataError, "there are no pairs to train on"),
    ],
)
def test_wrong_inputs_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        BFPOTrainer(**{"model": "org/tiny", "train_dataset": ROWS, **options})


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
def test_arguments_of_trl_are_refused():
    trl = pytest.importorskip("trl")
    with pytest.raises(TypeError, match=r"args is TRL's DPOConfig, .*loss=BFPO\(beta=0.1\)"):
        BFPOTrainer("org/tiny", trl.DPOConfig("out", beta=0.2, bf16=False), ROWS)


def test_a_row_that_is_too_long_is_named():
    long = {**ROWS[0], "prompt": "red box " * 40}
    with pytest.raises(DataError, match=r"^buffer_dataset row 2 can't be encoded in 64 tokens, as 1 of 8 pairs"):
        BFPOTrainer("org/tiny", None, ROWS, buffer_dataset=[ROWS[0], long], text=TextSection(max_length=64))
    demonstrations = [COMPLETIONS[0], {**COMPLETIONS[0], "prompt": long["prompt"]}]
    with pytest.raises(DataError, match=r"train_dataset row 2 can't be encoded in 64 tokens"):
        SFTTrainer("org/tiny", None, demonstrations, text=TextSection(max_length=64))


def test_truncation_is_logged(caplog):
    long = {**ROWS[0], "rejected": "red box " * 40}
    BFPOTrainer("org/tiny", None, [*ROWS, long], text=TextSection(max_length=64))
    assert "1 of 7 pairs: completion truncated (text.max_length: 64)" in caplog.text


def test_wrong_demonstrations_are_refused(tokenizer):
    with pytest.raises(TypeError, match="SFTTrainer needs a train_dataset"):
        SFTTrainer("org/tiny")
    with pytest.raises(DataError, match="train_dataset row 1: no column 'completion'"):
        SFTTrainer("org/tiny", train_dataset=ROWS)
    with pytest.raises(DataError, match="there are no completions to train on"):
        encode_demonstrations([], tokenizer)
