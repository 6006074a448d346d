"""GGUF files: every weight, the tokenizer, the Modelfile, and models that aren't written."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.config.recipes import ModelSection
from bfpo.core.files import file_hash
from bfpo.deployment import answers, gguf_export
from bfpo.deployment.export import export_checkpoint
from bfpo.deployment.gguf_export import GgufOptions
from bfpo.deployment.gguf_vocabulary import read_vocabulary
from bfpo.errors import ExportMismatch, MissingExtra, ModelError
from bfpo.model.gguf import load_gguf_model, load_gguf_tokenizer
from bfpo.model.load import load_model

from .tiny import FAMILIES, SPLITS, make, pre_tokenizer, sentencepiece, sizes, train

TEXTS = [
    "<|im_start|>user\na small red box, number 1234!<|im_end|>\n",
    "Österreich  –  naïve\t\tcafé 12.5\n\n\nend ",
    "长城 🤖 <|im_end|> x==y; don't we're",
]


def export(checkpoint="model", quantization="f16", *, check=False, out="out", **options):
    settings = GgufOptions(quantization, check_answers=check, **options)
    export_checkpoint(Path(checkpoint), Path(out), to="gguf", gguf=settings)
    return str(Path(out) / f"{out}-{quantization}.gguf")


def record():
    return json.loads(Path("out/export.json").read_text())


def bound(weights, quantization):
    """Return the largest rounding error of each weight: half a unit of float16, or of a block's scale."""
    half_unit = weights.abs() * 2**-11 + 2**-25
    if weights.ndim == 1:
        return torch.zeros_like(weights)
    if quantization == "f16":
        return half_unit
    largest = weights.reshape(-1, 32).abs().amax(1, keepdim=True)
    # The scale itself is rounded to float16, which moves the largest weight most.
    return (largest / 254 + largest * 2**-11 + 2**-25).expand(-1, 32).reshape(weights.shape)


FAST = ("llama", "tied", "llama3 rope", "qwen2")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_every_weight_is_read_back(name, save, tokenizer):
    model = save(make(name, tokenizer))
    for quantization in ("f16", "q8_0"):
        path = export(quantization=quantization, out=quantization)
        rope = {"rope_parameters": model.config.rope_parameters} if "rope" in name else {}
        loaded = load_gguf_model(path, dtype=torch.float32, attn_implementation=None, **rope)
        written, expected = loaded.state_dict(), model.state_dict()
        assert written.keys() == expected.keys()
        for key, weights in expected.items():
            error = (written[key] - weights).abs()
            assert (error <= bound(weights, quantization) * (1 + 1e-6)).all(), key
        # Norms are exact, and matrices are rounded at all.
        assert torch.equal(written["model.norm.weight"], expected["model.norm.weight"])
        assert not torch.equal(written["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        assert {types["token_embd.weight"], types["blk.1.ffn_down.weight"]} == {quantization.upper()}
        assert ("output.weight" in types) == (name != "tied")
    ids = torch.tensor([[3, 50, 7, 120, 9, 200, 31]])
    with torch.no_grad():
        ours, theirs = model.eval()(ids).logits, loaded.eval()(ids).logits
    assert (ours - theirs).abs().max() < 0.05 * (ours.max() - ours.min())


def test_the_factors_of_the_rotary_embeddings_are_those_of_llama3(save, tokenizer):
    save(make("llama3 rope", tokenizer))
    factors = next(t for t in gguf.GGUFReader(export()).tensors if t.name == "rope_freqs.weight").data
    # Wave lengths are 2π/f; below 64/4 nothing changes, above 64 all is divided by 8, smoothly between them.
    frequencies = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    waves = 2 * np.pi / frequencies
    smooth = (64 / waves - 1) / 3
    between = 1 / ((1 - smooth) / 8 + smooth)
    np.testing.assert_allclose(factors, np.where(waves < 16, 1, np.where(waves > 64, 8, between)), rtol=1e-5)


def test_a_row_that_is_no_multiple_of_a_block_is_stored_in_float16(save, tokenizer):
    save(LlamaForCausalLM(LlamaConfig(**sizes(tokenizer, intermediate_size=80))))
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(export(quantization="q8_0")).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


def test_shards_are_read(tokenizer, make_model):
    make_model().save_pretrained("model", max_shard_size="100KB")
    tokenizer.save_pretrained("model")
    assert Path("model/model.safetensors.index.json").is_file()
    loaded = load_model(ModelSection(path=export())).state_dict()
    torch.testing.assert_close(loaded, make_model().state_dict(), rtol=1e-3, atol=1e-6)


def test_the_tokenizer_is_read_back(model_folder, tokenizer):
    loaded = load_gguf_tokenizer(export(model_folder))
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    fields = gguf.GGUFReader("out/out-f16.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["llama.context_length"].contents() == 4096
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.parametrize("rule", SPLITS)
def test_known_rules_of_splitting_are_named(rule):
    kind, ignores_merges = SPLITS[rule]
    tokenizer = train(pre_tokenizer(kind), ignores_merges=ignores_merges)
    vocabulary = read_vocabulary(tokenizer, 500, [0], "model")
    assert (vocabulary.model, vocabulary.pre, vocabulary.special_ids["eos"]) == ("gpt2", rule, 0)
    assert len(vocabulary.tokens) == 500
    assert vocabulary.tokens[len(tokenizer)] == f"[PAD{len(tokenizer)}]"
    assert vocabulary.types[len(tokenizer)] == gguf.TokenType.UNUSED
    assert vocabulary.types[0] == gguf.TokenType.CONTROL


def test_other_rules_are_refused():
    bytes_only = pre_tokenizer(None)
    others = {
        "a prefix space": train(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "lower case": train(bytes_only, normalizer=normalizers.Lowercase()),
        "another regex": train(pre_tokenizer(r"\p{N}{1,2}")),
        "whole words": train(bytes_only, ignores_merges=True),
        "words": train(pre_tokenizers.Whitespace()),
    }
    for name, tokenizer in others.items():
        with pytest.raises(ModelError, match=r"no rule of llama.cpp that is known here splits texts.*--converter"):
            read_vocabulary(tokenizer, 500, [0], name)
    with pytest.raises(ModelError, match=r"has a token \d+, and the model has 200 embeddings"):
        read_vocabulary(train(bytes_only), 200, [0], "small")
    stripping = train(bytes_only)
    stripping.add_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(ModelError, match="'<mask>' takes spaces beside it"):
        read_vocabulary(stripping, 500, [0], "mask")


def test_composed_letters_are_noted():
    vocabulary = read_vocabulary(train(pre_tokenizer(r"\p{N}"), normalizer=normalizers.NFC()), 500, [0], "model")
    assert vocabulary.pre == "qwen2"
    assert "NFC" in vocabulary.notes[0]


def test_sentencepiece_merges_in_the_order_of_its_scores():
    tokenizer = sentencepiece()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), [2], "model")
    assert (vocabulary.model, vocabulary.pre, vocabulary.adds_space) == ("llama", None, True)
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert scores["▁a"] > scores["▁s"] > scores["▁small"] > scores["red"] > scores["x"]
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    kinds = gguf.TokenType
    assert [types[t] for t in ("<unk>", "<s>", "<0x0A>", "▁a")] == [
        kinds.UNKNOWN,
        kinds.CONTROL,
        kinds.BYTE,
        kinds.NORMAL,
    ]
    assert not read_vocabulary(sentencepiece(prepends=False), len(tokenizer), [2], "model").adds_space
    always = read_vocabulary(sentencepiece(metaspace="always"), len(tokenizer), [2], "model")
    assert always.adds_space
    assert "begins with one too" in always.notes[0]
    with pytest.raises(ModelError, match="puts spaces elsewhere than its SentencePiece tokenizer"):
        read_vocabulary(sentencepiece(metaspace="first"), len(tokenizer), [2], "model")


def test_more_end_tokens_have_names(tokenizer):
    vocabulary = read_vocabulary(tokenizer, 500, [tokenizer.eos_token_id, 5, 6, 7], "model")
    names = ("eos", "eot", "eom", "pad")
    assert [vocabulary.special_ids[name] for name in names] == [tokenizer.eos_token_id, 5, 6, tokenizer.pad_token_id]
    assert "names three tokens that end an answer" in vocabulary.notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is dynamic"),
    ],
)
def test_parts_that_are_not_written_are_refused(save, tokenizer, changes, message):
    save(LlamaForCausalLM(LlamaConfig(**sizes(tokenizer, **changes))))
    with pytest.raises(ModelError, match=rf"'model': {message}.*--converter PATH"):
        export()
    assert not Path("out").exists()


def test_other_models_are_refused(save, tokenizer, make_model, folder):
    save(GemmaForCausalLM(GemmaConfig(**sizes(tokenizer), head_dim=16)), "gemma")
    with pytest.raises(ModelError, match=r"of GemmaForCausalLM; known: LlamaForCausalLM, .*--converter PATH"):
        export("gemma")
    save(MistralForCausalLM(MistralConfig(**sizes(tokenizer), sliding_window=16)), "sliding")
    with pytest.raises(ModelError, match="sliding_window is 16"):
        export("sliding")
    large = make_model()
    with torch.no_grad():
        large.lm_head.weight[0, 0] = 1e6
    save(large, "large")
    with pytest.raises(
        ModelError, match=r"'large': the largest weight of lm_head.weight is 1e\+06; F16 ends at 65504"
    ):
        export("large")
    assert {path.name for path in folder.iterdir()} == {"gemma", "sliding", "large"}


def test_an_adapter_is_merged_first(save_adapter):
    adapted = save_adapter()
    merged = adapted.merge_and_unload().state_dict()
    loaded = load_model(ModelSection(path=export("adapter"))).state_dict()
    base = AutoModelForCausalLM.from_pretrained("model").state_dict()
    key = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(loaded[key], merged[key], rtol=1e-3, atol=1e-5)
    assert (loaded[key] - base[key]).abs().max() > 0.01
    assert {path.name for path in Path().iterdir()} == {"model", "adapter", "out"}


def test_without_the_package_the_extra_is_named(model_folder, monkeypatch):
    monkeypatch.setattr("bfpo.deployment.gguf_export.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"needs gguf; pip install 'bfpo\[gguf\]'"):
        export(model_folder)


def test_a_failed_write_leaves_no_files(model_folder, folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(OSError, match="No space"):
        export(model_folder)
    assert [path.name for path in folder.iterdir()] == ["model"]


CONVERTER = """
import shutil, sys
folder, *options = sys.argv[1:]
print("converting", folder, *options[2:])
if {fails}:
    sys.exit("Model FooForCausalLM is not supported")
shutil.copyfile("made.gguf", options[1])
"""


def test_a_converter_writes_the_file(model_folder, capsys):
    Path(export(model_folder, out="first")).rename("made.gguf")
    Path("convert.py").write_text(CONVERTER.format(fails=False))
    capsys.readouterr()
    path = export(model_folder, converter=Path("convert.py"))
    assert "convert.py: converting model --outtype f16" in capsys.readouterr().out
    assert file_hash(Path(path)) == file_hash(Path("made.gguf")) == record()["file"]["sha256"]
    assert "FROM ./out-f16.gguf" in Path("out/Modelfile").read_text()


def test_what_a_converter_says_is_passed_on(model_folder):
    Path("convert.py").write_text(CONVERTER.format(fails=True))
    with pytest.raises(ModelError, match=r"convert.py exited with 1 .*Model FooForCausalLM is not supported"):
        export(model_folder, converter=Path("convert.py"))
    assert not Path("out").exists()


def test_answers_are_compared(model_folder, monkeypatch):
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 6)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    result = CliRunner().invoke(app, ["export", model_folder, "--to", "gguf", "--out", "out"])
    assert result.exit_code == 0, result.output
    assert "not compared by llama.cpp; pip install 'bfpo[llama-cpp]'" in result.output
    agreement = record()["check"]["agreement"]["transformers"]
    assert agreement["equal_prompts"] == agreement["answers"] == 20
    # A rounded weight may tip a tie, but not many.
    assert agreement["token_agreement"] > 0.8
    assert len(agreement["differences"]) == 20 - agreement["equal_answers"]
    assert f"transformers: {agreement['equal_answers']} of 20 answers are equal" in result.output
    assert record()["lost"] == ["matrices rounded from float32 to f16"]
    assert record()["versions"]["gguf"]


def test_a_file_of_another_model_is_noticed(model_folder, save, make_model, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(gguf_export.llama_cpp, "is_installed", lambda: False)
    save(make_model(seed=3), "other")
    Path(export("other", out="wrong")).rename("made.gguf")
    Path("convert.py").write_text(CONVERTER.format(fails=False))
    export(model_folder, check=True, converter=Path("convert.py"))
    printed = capsys.readouterr()
    assert "which rounding doesn't explain" in printed.err
    assert record()["check"]["agreement"]["transformers"]["token_agreement"] < 0.5


def test_a_file_with_another_tokenizer_fails(model_folder, save, make_model, tokenizer, monkeypatch):
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(gguf_export.llama_cpp, "is_installed", lambda: False)
    other = PreTrainedTokenizerFast.from_pretrained(model_folder)
    other.chat_template = tokenizer.chat_template.replace("user", "USER").replace("\n", " ")
    save(make_model(), "other", other)
    Path(export("other", out="wrong")).rename("made.gguf")
    Path("convert.py").write_text(CONVERTER.format(fails=False))
    with pytest.raises(
        ExportMismatch, match=r"encoded as other tokens than by the source, by transformers \(20 of 20\)"
    ):
        export(model_folder, check=True, converter=Path("convert.py"))
    assert Path("out/out-f16.gguf").is_file()
    assert record()["check"]["agreement"]["transformers"]["equal_prompts"] == 0


def test_differences_of_answers_are_counted():
    source = answers.Answered([[1], [2], [3]], [[5, 6, 7], [8, 2], [9]])
    other = answers.Answered([[1], [4], [3]], [[5, 6, 1, 4], [8, 3], [9, 9]])
    agreement = answers.compare_answers(source, other, [2, 3])
    # The second answers end with different end tokens, which is no difference.
    assert [(each.prompt, each.position) for each in agreement.differences] == [(0, 2), (2, 1)]
    assert (agreement.equal_prompts, agreement.equal_answers, agreement.answers) == (2, 1, 3)
    assert agreement.token_agreement == pytest.approx((2 + 2 + 1) / 6)
