import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo.config.recipes import LoraSection, ModelSection
from bfpo.errors import ModelError, RecipeError
from bfpo.model.load import load_model
from bfpo.model.lora import add_adapter, lora_config
from bfpo.model.merge import merge_checkpoint

IDS = torch.tensor([[3, 50, 7, 120, 9, 200, 31]])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, make_model, tokenizer):
    """Work in a folder with a base model and an adapter that changes its logits."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("base")
    save_adapter(add_adapter(base(), lora_config(LoraSection(r=4)), seed=0), tokenizer)
    return tmp_path


def base():
    return AutoModelForCausalLM.from_pretrained("base")


def save_adapter(adapted, tokenizer):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    adapted.save_pretrained("adapter")
    tokenizer.save_pretrained("adapter")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def test_the_merged_model_gives_the_logits_of_the_adapter(tokenizer):
    merge_checkpoint(Path("adapter"), Path("out/merged"))
    merged = AutoModelForCausalLM.from_pretrained("out/merged")
    assert not isinstance(merged, PeftModel)
    expected = logits(load_model(ModelSection(path="adapter")))
    # float32 sums in another order
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(base())).abs().max() > 0.1
    assert [file.name for file in Path("out").iterdir()] == ["merged"]
    assert (Path("out/merged") / "model.safetensors").is_file()
    assert AutoTokenizer.from_pretrained("out/merged").chat_template == tokenizer.chat_template


def test_weights_are_saved_in_the_requested_type():
    merge_checkpoint(Path("adapter"), Path("merged"), dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained("merged", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(RecipeError, match="dtype is 'int8'; expected one of float32"):
        merge_checkpoint(Path("adapter"), Path("other"), dtype="int8")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("base", "contains a whole model, which needs no merging; expected a folder with adapter_config.json"),
        ("empty", "contains no model"),
        ("nowhere", "no such folder; expected a run's output folder"),
    ],
)
def test_a_folder_without_an_adapter_is_refused(checkpoint, message):
    Path("empty").mkdir()
    with pytest.raises(ModelError, match=message):
        merge_checkpoint(Path(checkpoint), Path("merged"))
    assert not Path("merged").exists()


def test_another_kind_of_adapter_is_refused(tokenizer):
    get_peft_model(base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained("prompt")
    with pytest.raises(ModelError, match=r"type PROMPT_TUNING|type PeftType.PROMPT_TUNING"):
        merge_checkpoint(Path("prompt"), Path("merged"))


def test_an_output_folder_that_is_not_empty_is_refused_and_kept():
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    with pytest.raises(ModelError, match="out 'full' is not empty"):
        merge_checkpoint(Path("adapter"), Path("full"))
    with pytest.raises(ModelError, match="out 'file' is a file"):
        merge_checkpoint(Path("adapter"), Path("file"))
    assert Path("full/notes.txt").read_text() == Path("file").read_text() == "mine"


def test_a_quantized_base_is_refused():
    config = json.loads(Path("base/config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    Path("base/config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    with pytest.raises(ModelError, match=r"'base' is stored quantized.*set base_model_name_or_path"):
        merge_checkpoint(Path("adapter"), Path("merged"))


def test_an_adapter_trained_on_quantized_weights_is_merged_with_a_note(capsys):
    Path("adapter/recipe.resolved.yaml").write_text("model: {load_in_4bit: true}\n")
    merge_checkpoint(Path("adapter"), Path("merged"))
    assert "trained on 4-bit weights" in capsys.readouterr().out
    Path("adapter/recipe.resolved.yaml").write_text("model: {load_in_4bit: false}\n")
    merge_checkpoint(Path("adapter"), Path("again"))
    assert "4-bit" not in capsys.readouterr().out


def test_a_missing_base_is_named():
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(ModelError, match=r"its base model './gone' can't be read"):
        merge_checkpoint(Path("adapter"), Path("merged"))


def test_a_failed_write_leaves_no_files(monkeypatch, folder):
    def fail(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(load_model(ModelSection(path="base"))), "save_pretrained", fail)
    before = sorted(folder.iterdir())
    with pytest.raises(OSError, match="No space"):
        merge_checkpoint(Path("adapter"), Path("merged"))
    assert sorted(folder.iterdir()) == before


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft only warns of tied embeddings
def test_merging_that_would_change_the_model_is_refused(make_model, tokenizer):
    tied = make_model()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained("base")
    adapted = get_peft_model(base(), LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    save_adapter(adapted, tokenizer)
    with pytest.raises(ModelError, match="merging changes the logits"):
        merge_checkpoint(Path("adapter"), Path("merged"))
    assert not Path("merged").exists()
