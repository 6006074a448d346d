import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo.config.recipes import LoraSection
from bfpo.errors import ModelError, RecipeError
from bfpo.model.interpolate import interpolate_checkpoints
from bfpo.model.lora import add_adapter, lora_config


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, make_model, tokenizer):
    """Work in a folder with two models of one architecture, and an adapter of the first."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = make_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * seed * torch.randn_like(parameter))
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    adapted = add_adapter(AutoModelForCausalLM.from_pretrained("first"), lora_config(LoraSection(r=4)), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained("adapter")
    tokenizer.save_pretrained("adapter")


def parameters(path):
    return dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())


def test_weights_are_the_mean_and_the_tokenizer_is_kept(tokenizer):
    interpolate_checkpoints("first", "second", Path("out/mean"), weight=0.25)
    first, second, mean = map(parameters, ("first", "second", "out/mean"))
    for name, parameter in mean.items():
        torch.testing.assert_close(parameter, 0.75 * first[name] + 0.25 * second[name])
    assert max(float((first[name] - second[name]).detach().abs().max()) for name in first) > 0.1
    assert AutoTokenizer.from_pretrained("out/mean").chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("weight", "equal"), [(0.0, "first"), (1.0, "second")])
def test_the_ends_are_the_models_themselves(weight, equal):
    interpolate_checkpoints("first", "second", Path("mean"), weight=weight, dtype="bfloat16")
    expected = parameters(equal)
    for name, parameter in AutoModelForCausalLM.from_pretrained("mean", dtype="auto").named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16())


def test_an_adapter_counts_as_its_merged_model():
    interpolate_checkpoints("first", "adapter", Path("half"), weight=0.5)
    interpolate_checkpoints("first", "adapter", Path("whole"), weight=1.0)
    first, half, whole = map(parameters, ("first", "half", "whole"))
    for name, parameter in half.items():
        torch.testing.assert_close(parameter, (first[name] + whole[name]) / 2)
    assert any(not torch.equal(first[name], whole[name]) for name in first)


def test_models_that_do_not_fit_are_refused(make_model, tokenizer):
    make_model(shape="nano").save_pretrained("narrow")
    tokenizer.save_pretrained("narrow")
    message = r"parameter '\S+' is .* in 'first' and .* in 'narrow'; expected models of one architecture"
    with pytest.raises(ModelError, match=message):
        interpolate_checkpoints("first", "narrow", Path("out"), weight=0.5)
    shutil.copytree("first", "longer")
    config = json.loads(Path("longer/config.json").read_text())
    Path("longer/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "pad_token_id": 7}))
    message = r"'first' and 'longer' differ in rms_norm_eps of config\.json; expected models of one architecture"
    with pytest.raises(ModelError, match=message):
        interpolate_checkpoints("first", "longer", Path("out"), weight=0.5)
    AutoModelForCausalLM.from_pretrained("first").save_pretrained("other")
    larger = AutoTokenizer.from_pretrained("first")
    larger.add_tokens(["<new>"])
    larger.save_pretrained("other")
    with pytest.raises(ModelError, match="'first' and 'other' have different vocabularies"):
        interpolate_checkpoints("first", "other", Path("out"), weight=0.5)
    assert not Path("out").exists()


def test_wrong_options_are_refused_before_models_are_loaded():
    with pytest.raises(RecipeError, match=r"weight is 1\.5; expected a number from 0 to 1"):
        interpolate_checkpoints("nowhere", "second", Path("out"), weight=1.5)
    with pytest.raises(RecipeError, match="dtype is 'int8'; expected one of float32"):
        interpolate_checkpoints("nowhere", "second", Path("out"), weight=0.5, dtype="int8")
    with pytest.raises(ModelError, match="out 'first' is not empty"):
        interpolate_checkpoints("nowhere", "second", Path("first"), weight=0.5)
