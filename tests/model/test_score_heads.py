"""Score heads: the same numbers packed, padded and by transformers' own classifier, and after saving."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, CohereConfig, CohereForCausalLM

from bfpo.config.recipes import LoraSection
from bfpo.data.table import Example, score_table
from bfpo.errors import ModelError
from bfpo.model.layout import packed_layout, padded_layout
from bfpo.model.logps import add_layout_forward
from bfpo.model.lora import add_adapter, lora_config
from bfpo.model.score_heads import add_score_heads, check_against_classifier, completion_scores, save_score_head

from ..conftest import pair
from .families import FAMILIES, SIZE


def examples():
    generator = torch.Generator().manual_seed(1)
    lengths = [(5, 3, 7), (1, 1, 2), (9, 12, 1)]
    rows = [[torch.randint(3, 250, (n,), generator=generator).int().numpy() for n in row] for row in lengths]
    table = score_table([Example(prompt, tuple(rest)) for prompt, *rest in rows], [pair(n) for n in range(3)])
    return [table[index] for index in range(3)]


def scorer(family, count=2):
    torch.manual_seed(0)
    model = add_score_heads(FAMILIES[family](SIZE).double().eval(), count, pad_id=0, seed=3)
    add_layout_forward(model, completion_scores)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_classifier_at_the_last_token(family):
    model, rows = scorer(family), examples()
    with torch.no_grad():
        packed, padded = model(layout=packed_layout(rows)), model(layout=padded_layout(rows))
    assert packed.shape == (6, 2)
    assert packed.std(0).min() > 1e-3
    # Some families compute attention in float32.
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)
    assert check_against_classifier(model, rows, tolerance=1e-5) < 1e-5


def test_a_pair_feeds_its_prompt_once():
    assert packed_layout(examples()).num_tokens == sum((5 + 3 + 7, 1 + 1 + 2, 9 + 12 + 1))


def test_a_head_that_does_more_is_refused():
    model = scorer("llama")
    model.score.register_forward_hook(lambda module, args, output: output * 2 if args[0].ndim == 3 else output)
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification: scores .* differ .* by"):
        check_against_classifier(model, examples(), tolerance=1e-3)


def test_models_that_can_have_no_heads_are_refused():
    with pytest.raises(ModelError, match="no sequence classifier of CohereForCausalLM"):
        add_score_heads(CohereForCausalLM(CohereConfig(**SIZE)), 1, pad_id=0, seed=0)
    adapted = add_adapter(FAMILIES["llama"](SIZE), lora_config(LoraSection(r=2)), seed=0)
    with pytest.raises(ModelError, match="has an adapter; merge it first"):
        add_score_heads(adapted, 1, pad_id=0, seed=0)


@pytest.mark.parametrize("lora", [False, True])
def test_each_head_is_saved_as_a_classifier_with_one_output(tmp_path, tokenizer, lora):
    model, rows = scorer("llama"), examples()
    if lora:
        model = add_adapter(model, lora_config(LoraSection(r=2), task_type="SEQ_CLS"), seed=0)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any("score" in name for name in trained)
        assert not any("score" in name and "lora" in name for name in trained)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        scores = model(layout=packed_layout(rows))
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    for index, name in enumerate(("reward", "cost")):
        save_score_head(merged, index, name, tokenizer, tmp_path / name)
        read = AutoModelForSequenceClassification.from_pretrained(tmp_path / name, dtype=torch.float64)
        assert read.config.num_labels == 1
        assert read.config.id2label == {0: name}
        assert read.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        add_layout_forward(read, completion_scores)
        with torch.no_grad():
            torch.testing.assert_close(read(layout=packed_layout(rows))[:, 0], scores[:, index], rtol=1e-6, atol=1e-6)
    assert merged.config.num_labels == 2
