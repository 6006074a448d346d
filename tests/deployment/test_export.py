"""Exports to merged models and to adapters, and what every export refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.core.files import file_hash
from bfpo.deployment.export import export_checkpoint
from bfpo.deployment.gguf_export import GgufOptions
from bfpo.errors import ModelError, RecipeError
from bfpo.model.shared_adapter import SharedAdapter

IDS = torch.tensor([[3, 50, 7, 120, 9, 200, 31]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def record(folder="out"):
    return json.loads((Path(folder) / "export.json").read_text())


def export(checkpoint, to, **options):
    export_checkpoint(Path(checkpoint), Path("out"), to=to, **options)


def test_a_whole_model_is_copied_as_it_is(model_folder, tokenizer):
    export(model_folder, "merged")
    assert load_file("out/model.safetensors").keys() == load_file("model/model.safetensors").keys()
    for name, tensor in load_file("model/model.safetensors").items():
        assert torch.equal(load_file("out/model.safetensors")[name], tensor)
    assert AutoTokenizer.from_pretrained("out").chat_template == tokenizer.chat_template
    assert record()["lost"] == []
    assert Path("out/generation_config.json").read_text() == Path("model/generation_config.json").read_text()


def test_a_whole_model_is_converted(model_folder):
    export(model_folder, "merged", dtype="bfloat16")
    copied = load_file("out/model.safetensors")
    for name, tensor in load_file("model/model.safetensors").items():
        assert torch.equal(copied[name], tensor.bfloat16())
    assert record()["lost"] == ["weights rounded from float32 to bfloat16"]


def test_an_adapter_is_merged(save_adapter):
    expected = logits(save_adapter())
    export("adapter", "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained("out")), expected, rtol=1e-4, atol=1e-4)
    assert record()["source"]["path"] == "adapter"
    assert record()["lost"] == []


def test_an_adapter_gives_the_same_logits_with_peft(save_adapter, tokenizer, capsys):
    expected = logits(save_adapter(r=12))
    export("adapter", "adapter")
    printed = capsys.readouterr().out
    assert "vllm serve model --enable-lora --max-lora-rank 16 --lora-modules out=out\n" in printed
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "out")
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("out")), expected)
    assert AutoTokenizer.from_pretrained("out").chat_template == tokenizer.chat_template
    assert {name.rpartition(".lora_")[2] for name in load_file("out/adapter_model.safetensors")} == {
        "A.weight",
        "B.weight",
    }
    assert {path.name for path in Path().iterdir()} == {"model", "adapter", "out"}


def test_an_adapter_of_rank_stabilized_lora_keeps_its_factor(save_adapter):
    expected = logits(save_adapter(use_rslora=True, revision="v2"))
    export("adapter", "adapter", dtype="float32")
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["use_rslora"], config["revision"]) == (True, "v2")
    assert torch.equal(
        logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "out")), expected
    )


def test_an_adapter_is_converted(save_adapter):
    save_adapter()
    export("adapter", "adapter", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file("out/adapter_model.safetensors").values()} == {torch.bfloat16}
    assert record()["lost"] == ["matrices rounded from float32 to bfloat16"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft warns of saved embeddings
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is True: DoRA changes the size"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]: whole modules are trained"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"rank_pattern": {"q_proj": 8}}, "layers have different ranks"),
        ({"alpha_pattern": {"q_proj": 2}}, "layers have different factors"),
        ({"trainable_token_indices": [1]}, "embeddings of single tokens are trained"),
        ({"r": 520, "target_modules": ["q_proj"]}, "its rank is 520: the highest is 512"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*: only LoRA matrices of linear layers are loaded"),
    ],
)
def test_what_vllm_does_not_load_is_refused(save_adapter, settings, message):
    save_adapter(**settings)
    with pytest.raises(ModelError, match=f"{message}.*--to merged"):
        export("adapter", "adapter")
    assert not Path("out").exists()


def test_adapters_of_other_kinds_are_refused(save_adapter, model_folder):
    save_adapter()
    SharedAdapter("shared", "0" * 64).write_record(Path("adapter"))
    for form in ("adapter", "merged", "gguf"):
        with pytest.raises(
            ModelError, match="was trained beside the shared adapter 'shared', and it is used without"
        ):
            export("adapter", form)
    Path("adapter/shared_adapter.json").unlink()
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base.gguf"}))
    with pytest.raises(ModelError, match=r"'base.gguf' is a GGUF file.*bfpo model import"):
        export("adapter", "adapter")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    Path("adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./gone"}))
    for form in ("adapter", "merged", "gguf"):
        with pytest.raises(ModelError, match=r"its base model .*can't be read"):
            export("adapter", form)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained("prompt")
    with pytest.raises(ModelError, match="PROMPT_TUNING; only LORA"):
        export("prompt", "adapter")
    with pytest.raises(ModelError, match="contains a whole model, as a training of all weights or with train_only"):
        export(model_folder, "adapter")
    assert not Path("out").exists()


def test_other_checkpoints_are_refused(model_folder, make_model):
    Path("empty").mkdir()
    Path("file.gguf").write_bytes(b"GGUF")
    for checkpoint, message in {
        "nowhere": "'nowhere': no such folder",
        "empty": "'empty' contains no model",
        "file.gguf": "is a GGUF file already; bfpo model import",
    }.items():
        with pytest.raises(ModelError, match=message):
            export(checkpoint, "merged")
    LlamaForSequenceClassification(make_model().config).save_pretrained("scores")
    shutil.copytree(
        "model", "scores", dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json", "*.safetensors")
    )
    for form, message in {
        "merged": "contains a LlamaForSequenceClassification",
        "gguf": "of LlamaForSequence",
    }.items():
        with pytest.raises(ModelError, match=message):
            export("scores", form)
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="out 'out' is not empty"):
        export(model_folder, "merged")
    assert {path.name for path in Path("out").iterdir()} == {"mine.txt"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "`to` is 'onnx'; known: adapter, gguf, merged"),
        ({"to": "gguf", "dtype": "float16"}, "`dtype` is for merged and adapter"),
        ({"to": "merged", "gguf": GgufOptions()}, "`quantize` and `converter` are for gguf"),
        ({"to": "merged", "dtype": "int8"}, "`dtype` is 'int8'; expected one of float32"),
        ({"to": "gguf", "gguf": GgufOptions("q4_k")}, "`quantize` is 'q4_k'; expected one of f16, q8_0"),
        ({"to": "gguf", "gguf": GgufOptions(converter=Path("no.py"))}, "`converter` is 'no.py': no such file"),
    ],
)
def test_options_that_do_not_fit_are_refused(model_folder, options, message):
    with pytest.raises(RecipeError, match=message):
        export(model_folder, **options)
    assert not Path("out").exists()


@pytest.mark.parametrize("out", [".", "link"])
def test_the_folder_may_be_this_one_or_a_link(model_folder, tmp_path, monkeypatch, out):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    monkeypatch.chdir(empty if out == "." else tmp_path)
    export_checkpoint(tmp_path / model_folder, Path(out), to="merged")
    assert (empty / "export.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if "tmp" in path.name) == []


def test_the_source_is_identified_by_its_content(model_folder, make_model, save):
    export(model_folder, "merged")
    first = record()["source"]["identity"]
    save(make_model(seed=3), "other")
    export_checkpoint(Path("other"), Path("out2"), to="merged")
    export_checkpoint(Path("model"), Path("out3"), to="merged")
    assert record("out2")["source"]["identity"] != first == record("out3")["source"]["identity"]
    assert record()["versions"]["bfpo"]


def test_a_failed_export_leaves_no_files(save_adapter, folder, monkeypatch):
    save_adapter()
    before = sorted(folder.iterdir())
    monkeypatch.setattr("bfpo.deployment.lora_adapter.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        export("adapter", "adapter")
    assert sorted(folder.iterdir()) == before


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def test_the_commands(save_adapter, model_folder):
    save_adapter()
    result = CliRunner().invoke(app, ["export", "adapter", "--to", "adapter", "--out", "out"])
    assert result.exit_code == 0, result.output
    assert Path("out/adapter_model.safetensors").is_file()
    result = CliRunner().invoke(app, ["merge", "adapter", "--out", "merged"])
    assert result.exit_code == 0, result.output
    assert "`bfpo merge ADAPTER` is now `bfpo export ADAPTER --to merged`" in result.output
    result = CliRunner().invoke(app, ["export", "adapter", "--to", "merged", "--out", "again"])
    assert file_hash(Path("merged/model.safetensors")) == file_hash(Path("again/model.safetensors"))
    assert "merge" not in CliRunner().invoke(app, ["--help"]).output.split()


def test_the_page_has_the_numbers_of_the_results():
    root = Path(__file__).parents[2]
    page = (root / "docs/deployment.md").read_text()
    files = json.loads((root / "benchmarks/results/export.json").read_text())["files"]
    assert set(files) == {"f16", "q8_0"}
    for quantization, content in files.items():
        for engine, found in content["check"]["agreement"].items():
            gap = max((each["gap"] for each in found["differences"]), default=0)
            row = f"{quantization} | {engine} | {found['equal_prompts']} | {found['equal_answers']}"
            assert f"| {row} | {found['token_agreement']:.1%} | {gap:.2f} |" in page
