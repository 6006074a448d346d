"""Folders of tiny random models, and of a LoRA adapter on one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def save(tokenizer):
    """Return a function that saves a model with random weights, norms and biases included, and the tokenizer."""

    def save(model, folder="model", its_tokenizer=tokenizer):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
        model.save_pretrained(folder)
        its_tokenizer.save_pretrained(folder)
        return model

    return save


@pytest.fixture
def model_folder(save, make_model):
    save(make_model())
    return "model"


@pytest.fixture
def save_adapter(model_folder, tokenizer):
    """Return a function that saves a LoRA adapter which changes the logits, with settings of its own."""

    def save_adapter(folder="adapter", **settings):
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ["q_proj", "down_proj"], **settings})
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        adapted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return adapted.eval()

    return save_adapter
