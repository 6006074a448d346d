"""Loading models of any kind: attention that the model supports, adapters with added tokens, malformed folders."""

import contextlib
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import LoraSection, ModelSection, NewModel, TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.errors import ModelError
from bfpo.model.load import JSON_FILES, add_experts, empty_model, load_model, load_tokenizer
from bfpo.model.lora import add_adapter, lora_config
from bfpo.model.merge import merge_checkpoint
from bfpo.model.new import new_model
from bfpo.training.run import run_training

from .families import SIZE, family

IDS = torch.tensor([[3, 50, 7, 120, 9, 200, 31]])
# The expected implementation is transformers' own statement about each architecture.
ATTENTION = {
    "llama": "sdpa",
    "mistral": "sdpa",
    "qwen3": "sdpa",
    "gemma3_text": "sdpa",
    "gemma2": "eager",
    "gpt_oss": "eager",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, make_model, tokenizer):
    folder = tmp_path_factory.mktemp("model") / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(model_folder):
    """Copy a model with its tokenizer to `base` in the working folder."""
    shutil.copytree(model_folder, "base")
    return Path("base")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# Attention.


@pytest.mark.parametrize(("name", "expected"), ATTENTION.items())
def test_the_attention_is_one_that_the_model_supports(name, expected):
    if name == "gpt_oss":
        torch.manual_seed(0)
        size = {**SIZE, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}
        model = GptOssForCausalLM(GptOssConfig(**size))
    else:
        model = family(name)
    model.save_pretrained("saved")
    loaded = load_model(ModelSection(path="saved"))
    assert loaded.config._attn_implementation == expected
    # float32 sums in another order where the model was made with another implementation
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_another_attention_is_used_as_requested(base):
    section = ModelSection(path=str(base), attn_implementation="eager")
    assert load_model(section).config._attn_implementation == "eager"


# Adapters whose tokenizer has more or fewer tokens than their base.


def save_adapter(base, tokenizer, *, rows=None, path="adapter", **options):
    """Save an adapter that was trained after its base was resized to some rows; returns its logits."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return logits(adapted)


@pytest.fixture
def larger(base):
    """The base's tokenizer with two added tokens."""
    tokenizer = load_tokenizer(ModelSection(path=str(base)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra1|>", "<|extra2|>"]})
    return tokenizer


@pytest.mark.parametrize(
    ("extra_rows", "options"),
    [
        (2, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        # Rows are often padded to a multiple, so that there are more of them than tokens.
        (48, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (2, {}),
        (-20, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (0, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_an_adapter_with_added_tokens_has_the_logits_it_was_saved_with(base, larger, extra_rows, options):
    rows = AutoModelForCausalLM.from_pretrained(base).config.vocab_size + extra_rows
    expected = save_adapter(base, larger, rows=rows, **options)
    loaded = load_model(ModelSection(path="adapter"))
    assert loaded.config.vocab_size == rows
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)


def test_an_adapter_with_single_trained_rows_has_the_logits_it_was_saved_with(base, larger):
    added = [len(larger) - 2, len(larger) - 1]
    expected = save_adapter(base, larger, rows=len(larger), trainable_token_indices=added)
    loaded = load_model(ModelSection(path="adapter"))
    assert loaded.config.vocab_size == len(larger)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)


def test_an_adapter_without_added_tokens_keeps_the_rows_of_its_base(base, tokenizer):
    expected = save_adapter(base, tokenizer)
    torch.testing.assert_close(logits(load_model(ModelSection(path="adapter"))), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_with_added_tokens_is_merged_and_trained_further(base, larger, main_pairs):
    expected = save_adapter(base, larger, rows=len(larger), modules_to_save=["embed_tokens", "lm_head"])
    merge_checkpoint(Path("adapter"), Path("merged"))
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert merged.config.vocab_size == len(larger)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    write_jsonl(Path("pairs.jsonl"), (pair.to_row() for pair in main_pairs))
    trainer = {"output_dir": "run", "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    content = {"model": {"path": "adapter"}, "data": [{"path": "pairs.jsonl"}], "trainer": trainer}
    run = run_training(check_recipe(content, TrainRecipe, "toy"))
    assert run["start_check"]["largest_margin"] == 0
    assert load_model(ModelSection(path="run")).config.vocab_size == len(larger)


def test_added_tokens_without_their_rows_of_the_head_are_refused(base, larger):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(base, larger, rows=len(larger), modules_to_save=["embed_tokens", "lm_head"])
    from safetensors.torch import load_file, save_file

    file = "adapter/adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}, file)
    with pytest.raises(ModelError, match=r"trained with 2 added tokens, but contains no weights of lm_head"):
        load_model(ModelSection(path="adapter"))


# Models without weights.


def test_an_empty_model_has_the_shapes_of_the_real_one(base, tokenizer):
    save_adapter(base, tokenizer)
    for section in (ModelSection(path="base"), ModelSection(path="adapter")):
        empty, real = empty_model(section), load_model(section)
        shapes = {name: parameter.shape for name, parameter in real.named_parameters()}
        assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes
        assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    new = NewModel(shape="nano")
    shapes = [parameter.shape for parameter in new_model(new, tokenizer).parameters()]
    empty = empty_model(ModelSection(new=new), vocab_size=len(tokenizer))
    assert [parameter.shape for parameter in empty.parameters()] == shapes


def test_adapters_are_made_and_loaded_without_a_warning(base, tokenizer):
    """peft asks transformers for a deprecated property, which would print a FutureWarning in every LoRA run."""
    save_adapter(base, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapter(AutoModelForCausalLM.from_pretrained(base), lora_config(LoraSection(r=2)), seed=0)
        load_model(ModelSection(path="adapter"))
        empty_model(ModelSection(path="adapter"))


# Malformed and hostile folders.


class Touch:
    """A pickle that makes a file where it is loaded."""

    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


def test_a_pickle_is_not_executed_and_is_named(base):
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(), protocol=2))
    with pytest.raises(ModelError, match=r"model 'base': pytorch_model\.bin: a pickle .* save the weights"):
        load_model(ModelSection(path="base"))
    assert not Path("EXECUTED").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b"{'a': 1}"])
@pytest.mark.parametrize("name", JSON_FILES)
def test_a_file_that_is_not_a_json_object_is_named(base, name, content):
    (base / name).write_bytes(content)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=rf"base/{name}: .*JSON"):
            load(ModelSection(path="base"))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0},
        {"hidden_size": "large"},
        {"num_attention_heads": 0},
        {"num_attention_heads": None},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 3},
        {"vocab_size": 7},
        {"model_type": "evil"},
        {"model_type": 5},
        {"model_type": None},
        {"rope_parameters": "none"},
        {"torch_dtype": "float7"},
        {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"},
        {"quantization_config": {"quant_method": "evil"}},
    ],
)
def test_a_configuration_with_wrong_values_is_a_model_error_or_loads(base, changes):
    (base / "evil.py").write_text("open('EXECUTED', 'w')\n")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    # Some values load: transformers ignores them.
    with contextlib.suppress(ModelError):
        load_model(ModelSection(path="base"))
    assert not Path("EXECUTED").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"version": "1.0", "model": 5}', b"\xff"])
def test_a_damaged_tokenizer_is_named(base, content):
    (base / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer of model 'base': .*tokenizer"):
        load_tokenizer(ModelSection(path="base"))


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08" + b"\0" * 7 + b'{"a": 1}'])
def test_damaged_weights_are_a_model_error(base, content):
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="model 'base': "):
        load_model(ModelSection(path="base"))


def rename_tensors(file, old, new):
    tensors = load_file(file)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def test_missing_weights_are_not_taken_for_trained_ones(base):
    rename_tensors(base / "model.safetensors", "mlp.down_proj", "mlp.other")
    with pytest.raises(ModelError, match=r"model 'base': 2 weights of LlamaForCausalLM are missing .*down_proj"):
        load_model(ModelSection(path="base"))


def test_an_adapter_of_another_model_is_refused(base, tokenizer):
    save_adapter(base, tokenizer)
    rename_tensors(Path("adapter/adapter_model.safetensors"), "model.model.", "model.transformer.")
    message = r"adapter 'adapter': \d+ of its weights are missing, or it is for another base model: base_model\.model"
    with pytest.raises(ModelError, match=message):
        load_model(ModelSection(path="adapter"))
    with pytest.raises(ModelError, match=message):
        merge_checkpoint(Path("adapter"), Path("merged"))
    shutil.copytree("adapter", "other")
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ModelError, match=message):
        add_experts(model, {"answer": "adapter"})
    rename_tensors(Path("adapter/adapter_model.safetensors"), "model.transformer.", "model.model.")
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ModelError, match=r"adapter 'other': .* of its weights are missing"):
        add_experts(model, {"analysis": "adapter", "guidance": "adapter", "answer": "other"})


def test_a_file_in_place_of_a_folder_is_named(base):
    with pytest.raises(ModelError, match=r"model 'base/config\.json' is a file; name its folder"):
        load_model(ModelSection(path="base/config.json"))
