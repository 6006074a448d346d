"""llama.cpp answers from an exported file as the source does, with the same tokens of the prompt."""

import json
from pathlib import Path

import pytest

from bfpo.deployment import answers
from bfpo.deployment.export import export_checkpoint
from bfpo.deployment.gguf_export import GgufOptions
from bfpo.deployment.llama_cpp import answer_with_llama_cpp
from bfpo.errors import ModelError

from .tiny import FAMILIES, SPLITS, make, pre_tokenizer, sentencepiece, train

pytestmark = pytest.mark.slow
xllamacpp = pytest.importorskip("xllamacpp")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(answers, "MAX_NEW_TOKENS", 12)


def agreement(quantization="f16"):
    settings = GgufOptions(quantization)
    export_checkpoint(Path("model"), Path("out"), to="gguf", gguf=settings)
    return json.loads(Path("out/export.json").read_text())["check"]["agreement"]


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_agrees(name, save, tokenizer):
    save(make(name, tokenizer))
    found = agreement()
    assert set(found) == {"transformers", "llama.cpp"}
    for engine in found.values():
        assert engine["equal_prompts"] == 20
        # Rounding may tip a near tie of these random models, and does so by little.
        assert engine["token_agreement"] > 0.8
        assert all(each["gap"] is None or each["gap"] < 0.1 for each in engine["differences"])


def test_llama_cpp_agrees_on_eight_bits(save, tokenizer):
    save(make("llama", tokenizer))
    for engine in agreement("q8_0").values():
        assert engine["equal_prompts"] == 20
        assert all(each["gap"] is None or each["gap"] < 0.5 for each in engine["differences"])


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"


@pytest.mark.parametrize("rule", SPLITS)
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_llama_cpp_encodes_prompts_as_the_tokenizer(rule, template, save, tokenizer):
    kind, ignores_merges = SPLITS[rule]
    own = train(pre_tokenizer(kind), ignores_merges=ignores_merges, bos_token="<|start|>", eos_token="<|end|>")
    own.chat_template = template
    save(make("llama", tokenizer), its_tokenizer=own)
    assert [engine["equal_prompts"] for engine in agreement().values()] == [20, 20]


@pytest.mark.parametrize(("prepends", "metaspace"), [(True, None), (False, None), (True, "always"), (True, "never")])
def test_llama_cpp_encodes_prompts_as_sentencepiece(prepends, metaspace, save, tokenizer):
    own = sentencepiece(prepends, metaspace)
    model = make("llama", tokenizer)
    model.resize_token_embeddings(len(own), mean_resizing=False)
    save(model, its_tokenizer=own)
    export_checkpoint(Path("model"), Path("out"), to="gguf", gguf=GgufOptions(check_answers=False))
    read = answer_with_llama_cpp(Path("out/out-f16.gguf"), has_template=False, context=1024)
    assert read.prompts == answers.encode_prompts(own)


def test_a_file_that_llama_cpp_cannot_load_is_named(folder):
    Path("bad.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ModelError, match=r"bad.gguf: llama.cpp can't load it"):
        answer_with_llama_cpp(Path("bad.gguf"), has_template=False, context=64)
