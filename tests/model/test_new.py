import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bfpo.config.recipes import ModelSection, NewModel
from bfpo.errors import ModelError
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.new import SHAPES, new_model, new_tokenizer


def test_a_new_model_loads_like_any_other_and_generates(tokenizer, make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = loaded.apply_chat_template(
        [{"role": "user", "content": "red box"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
    assert model.generation_config.do_sample


def test_the_same_seed_gives_the_same_weights_without_changing_the_global_generator(make_model):
    state = torch.random.get_rng_state()
    first, second, other = make_model(seed=3), make_model(seed=3), make_model(seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("red box", "Ünïcödé 字 🙂", "tabs\tand\nbreaks  "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("shape", ["tiny", "small"])
def test_the_initial_scale_depends_on_the_width(shape, tokenizer):
    model = new_model(NewModel(shape=shape), tokenizer)
    expected = 0.64 / SHAPES[shape].hidden ** 0.5
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(expected, rel=0.02)


def test_the_vocabulary_is_not_larger_than_requested():
    assert len(new_tokenizer(["a b c d " * 50, "some other words " * 50], 300)) <= 300


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_missing_model_is_named(load, tmp_path):
    with pytest.raises(ModelError, match=r"model '.*nothing': no such folder, and not a hub id"):
        load(ModelSection(path=str(tmp_path / "nothing")))
