"""Models with a score head, tiny and random: the score that is read, and missing heads."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from bfpo.config.recipes import ModelSection
from bfpo.core.conversation import Message
from bfpo.errors import ModelError, RecipeError
from bfpo.judging.open import open_judge
from bfpo.judging.open_models import MODEL_KINDS, open_guard
from bfpo.judging.scorers import BeaverModel, ScoreJudge, load_scorer
from bfpo.judging.spec import JUDGES

from .stand_ins import completion, stand_in_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ANSWERS = [completion("a b c " * (1 + i % 5) + "bake" * (i % 2), name=f"p{i}") for i in range(11)]


@pytest.fixture
def tokenizer():
    tokenizer = stand_in_tokenizer("llama-guard")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    # Like a Llama tokenizer: a text starts with a special token.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.model_max_length = 256
    return tokenizer


def config(tokenizer, kind=LlamaConfig, **changes):
    return kind(vocab_size=len(tokenizer), max_position_embeddings=256, **SIZES, **changes)


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def spread(model, head):
    """Return the model with a head whose scores vary more between texts than those of a random one."""
    torch.manual_seed(1)
    torch.nn.init.normal_(head.weight, std=2.0)
    return model.eval()


def test_rewards_and_classifiers_read_the_golden_texts(tokenizer):
    def render(kind):
        return ScoreJudge(kind, None, tokenizer, "toy").render(completion("Mix, bake. </s>"))

    assert render("reward") == (
        "<|turn|>user\nHow do I make bread?\n<|turn|>assistant\nMix, bake. < /s>\n<|turn|>guard",
        True,
    )
    assert render("classifier") == ("Mix, bake. < /s>", True)
    tokenizer.chat_template = None
    assert render("reward") == (("How do I make bread?", "Mix, bake. < /s>"), True)
    costs, rewards = (ScoreJudge(f"beaver-{name}", None, tokenizer, "toy") for name in ("cost", "reward"))
    assert rewards.render(completion()) == costs.render(completion())


def test_beaver_rewards_are_the_score_of_the_head(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = BeaverModel(config(tokenizer, bias=False)).double()
    judge = open_guard("beaver-reward", save(tmp_path / "reward", spread(model, model.score_head), tokenizer))
    for answer, verdict in zip(ANSWERS, judge.judge(ANSWERS), strict=True):
        ids = torch.tensor([tokenizer(judge.render(answer)[0])["input_ids"]])
        with torch.inference_mode():
            reward = float(judge.model.score_head(judge.model.model(input_ids=ids).last_hidden_state[0, -1]))
        assert verdict.score == pytest.approx(reward, abs=1e-4)
        assert verdict.helpfulness == pytest.approx(1 / (1 + math.exp(-reward)), abs=1e-4)
        assert (verdict.safe, verdict.reason) == (None, "a reward model doesn't judge safety")


def test_beaver_texts_are_golden(tokenizer):
    judge = ScoreJudge("beaver-cost", None, tokenizer, "toy")
    text, has_markers = judge.render(completion())
    assert text == "BEGINNING OF CONVERSATION: USER: How do I make bread? ASSISTANT:Mix flour and water, bake."
    assert not has_markers
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    text, _ = judge.render(replace(completion("bake"), prompt=turns))
    assert text == "BEGINNING OF CONVERSATION: USER: a ASSISTANT:bUSER: c ASSISTANT:bake"
    text, has_markers = judge.render(completion("a ASSISTANT:b </s>"))
    assert text.count("ASSISTANT:") == 1
    assert "</s>" not in text
    assert has_markers


@pytest.mark.parametrize("bias", [True, False])
def test_the_sign_of_the_cost_is_the_label(tmp_path, tokenizer, bias):
    torch.manual_seed(0)
    model = BeaverModel(config(tokenizer, bias=bias)).double()
    path = save(tmp_path / "cost", spread(model, model.score_head), tokenizer)
    judge = open_guard("beaver-cost", path)
    verdicts = list(judge.judge(ANSWERS))
    assert {verdict.safe for verdict in verdicts} == {True, False}
    for answer, verdict in zip(ANSWERS, verdicts, strict=True):
        assert verdict.prompt_id == answer.prompt_id
        # By hand, unpadded: the last position's hidden state times the head.
        ids = torch.tensor([tokenizer(judge.render(answer)[0])["input_ids"]])
        with torch.inference_mode():
            hidden = judge.model.model(input_ids=ids).last_hidden_state[0, -1]
            cost = float(judge.model.score_head(hidden))
        assert verdict.score == pytest.approx(cost, abs=1e-4)
        assert verdict.safe is (cost <= 0)
        assert verdict.p_safe == pytest.approx(1 / (1 + math.exp(cost)), abs=1e-4)


def rewrite(folder, change, **keys):
    """Change the tensors of a saved model by a function, and keys of its configuration; None removes one."""
    path = Path(folder) / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    config = json.loads((path.parent / "config.json").read_text())
    config = {name: value for name, value in (config | keys).items() if value is not None}
    (path.parent / "config.json").write_text(json.dumps(config))


def rename(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


@pytest.mark.parametrize("stated", [None, False])
def test_the_bias_of_a_beaver_head_comes_from_the_weights(tmp_path, tokenizer, stated):
    model = BeaverModel(config(tokenizer, bias=True))
    # Without its bias, every cost of this head is near 0.
    torch.nn.init.zeros_(model.score_head.weight)
    torch.nn.init.constant_(model.score_head.bias, 3.0)
    path = save(tmp_path / "cost", model, tokenizer)
    rewrite(path, lambda tensors: tensors, bias=stated)
    (verdict,) = open_guard("beaver-cost", path).judge([completion()])
    assert verdict.score == pytest.approx(3.0)
    assert verdict.safe is False


def test_weights_of_a_head_that_are_not_read_are_refused(tmp_path, tokenizer):
    beaver = save(tmp_path / "beaver", BeaverModel(config(tokenizer, bias=True)), tokenizer)
    for number, name in enumerate(("score_bias", "score_head.extra", "score_head.0.bias")):
        folder = shutil.copytree(beaver, tmp_path / str(number))
        rewrite(folder, rename("score_head.bias", name), bias=None)
        with pytest.raises(ModelError, match=rf"weights of a head that beaver-cost doesn't read.*{name}"):
            open_guard("beaver-cost", str(folder))
    # A configuration that states a bias which isn't in the weights is contradictory.
    rewrite(beaver, lambda tensors: {key: value for key, value in tensors.items() if key != "score_head.bias"})
    with pytest.raises(ModelError, match=r"no trained head for beaver-cost: score_head\.bias missing"):
        open_guard("beaver-cost", beaver)
    reward = save(tmp_path / "reward", LlamaForSequenceClassification(config(tokenizer, num_labels=1)), tokenizer)
    rewrite(reward, lambda tensors: {**tensors, "score.bias": torch.ones(1)})
    with pytest.raises(ModelError, match=r"weights of a head that reward doesn't read.*score\.bias"):
        open_guard("reward", reward)


def test_other_weights_of_a_beaver_checkpoint_are_not_needed(tmp_path, tokenizer):
    path = save(tmp_path / "cost", BeaverModel(config(tokenizer)), tokenizer)
    extra = {"normalizer.mean": torch.zeros(1), "lm_head.weight": torch.zeros(2, 2)}
    rewrite(path, lambda tensors: tensors | extra)
    assert open_guard("beaver-cost", path).model.score_head.bias is None


def test_a_beaver_head_is_not_read_as_a_random_one(tmp_path, tokenizer):
    beaver = BeaverModel(config(tokenizer, bias=True))
    path = save(tmp_path / "beaver", beaver, tokenizer)
    with pytest.raises(ModelError, match="no trained head for reward"):
        open_guard("reward", path)
    path = save(tmp_path / "causal", LlamaForCausalLM(config(tokenizer)), tokenizer)
    for kind in ("beaver-cost", "reward", "classifier"):
        with pytest.raises(ModelError, match=f"no trained head for {kind}"):
            open_guard(kind, path)
    path = save(tmp_path / "normal", BeaverModel(config(tokenizer, do_normalize=True)), tokenizer)
    with pytest.raises(ModelError, match="normalizes its scores"):
        open_guard("beaver-cost", path)


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("own_padding", [True, False])
def test_a_reward_orders_and_is_undecided_on_safety(tmp_path, tokenizer, template, own_padding):
    if not template:
        tokenizer.chat_template = None
    if not own_padding:
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config(tokenizer, num_labels=1))
    path = save(tmp_path / "reward", spread(model, model.score), tokenizer)
    judge = open_guard("reward", path)
    verdicts = list(judge.judge(ANSWERS))
    for answer, verdict in zip(ANSWERS, verdicts, strict=True):
        assert verdict.safe is None
        assert verdict.reason == "a reward model doesn't judge safety"
        assert 0 < verdict.helpfulness < 1
        text, _ = judge.render(answer)
        assert isinstance(text, str) is template
        parts = (text,) if template else text
        ids = tokenizer(*parts, add_special_tokens=not template, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            reward = float(judge.model(ids).logits[0, 0])
        assert verdict.score == pytest.approx(reward, abs=1e-4)
    by_score = sorted(verdicts, key=lambda verdict: verdict.score)
    assert by_score == sorted(verdicts, key=lambda verdict: verdict.helpfulness)


def test_a_conversation_that_the_template_refuses_is_undecided(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    model = LlamaForSequenceClassification(config(tokenizer, num_labels=1))
    judge = open_guard("reward", save(tmp_path / "reward", model, tokenizer))
    system = replace(completion(), prompt=(Message("system", "c"), Message("user", "a")))
    refused, judged = judge.judge([system, completion()])
    assert (refused.safe, refused.helpfulness) == (None, None)
    assert refused.reason == "the chat template refuses the conversation: System role not supported"
    assert judged.helpfulness is not None


def test_ids_without_an_embedding_are_refused(tmp_path, tokenizer):
    model = LlamaForSequenceClassification(config(tokenizer, num_labels=1))
    tokenizer.add_tokens(["extra"])
    judge = open_guard("reward", save(tmp_path / "reward", model, tokenizer))
    with pytest.raises(ModelError, match=f"the model has only {len(tokenizer) - 1} embeddings"):
        list(judge.judge([completion("b extra")]))


def bert(tokenizer, folder, **changes):
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(tokenizer, BertConfig, **changes))
    return save(folder, spread(model, model.classifier), tokenizer)


def test_classes_that_exclude_one_another(tmp_path, tokenizer):
    labels = {"id2label": {0: "Safe", 1: "Toxic", 2: "harmful"}, "label2id": {"Safe": 0, "Toxic": 1, "harmful": 2}}
    path = bert(tokenizer, tmp_path / "c", **labels)
    p_safe = [verdict.p_safe for verdict in open_guard("classifier", path).judge(ANSWERS)]
    # The pooled outputs of a random BERT are similar: the threshold is put between them.
    judge = open_guard("classifier", path, threshold=sorted(p_safe)[len(p_safe) // 2])
    decisions = set()
    for answer, verdict in zip(ANSWERS, judge.judge(ANSWERS), strict=True):
        ids = tokenizer(answer.text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            by_hand = judge.model(ids).logits[0].softmax(-1)
        assert verdict.p_safe == pytest.approx(float(by_hand[0]), abs=1e-5)
        assert verdict.safe is (verdict.p_safe >= judge.threshold)
        assert verdict.category == (None if verdict.safe else ("Toxic", "harmful")[int(by_hand[1:].argmax())])
        decisions.add(verdict.safe)
    assert decisions == {True, False}


def test_independent_labels(tmp_path, tokenizer):
    labels = {"id2label": {0: "toxic", 1: "threat"}, "label2id": {"toxic": 0, "threat": 1}}
    path = bert(tokenizer, tmp_path / "c", **labels, problem_type="multi_label_classification")
    judge = open_guard("classifier", path)
    for answer, verdict in zip(ANSWERS, judge.judge(ANSWERS), strict=True):
        ids = tokenizer(answer.text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            worst = float(judge.model(ids).logits[0].sigmoid().max())
        assert verdict.p_safe == pytest.approx(1 - worst, abs=1e-5)


def test_labels_of_unknown_meaning_are_refused_unless_given(tmp_path, tokenizer):
    path = bert(tokenizer, tmp_path / "c", num_labels=2)
    with pytest.raises(ModelError, match=r"its label 'LABEL_0' isn't known \(it has LABEL_0, LABEL_1\)"):
        open_guard("classifier", path)
    judge = load_scorer("classifier", ModelSection(path=path), safe_labels={"LABEL_0": False, "LABEL_1": True})
    assert judge.labels == (("LABEL_0", False), ("LABEL_1", True))
    with pytest.raises(ModelError, match="none of its labels is an unsafe one"):
        load_scorer("classifier", ModelSection(path=path), safe_labels={"LABEL_0": True, "LABEL_1": True})


def test_overlong_answers_and_nonfinite_scores_are_undecided(tmp_path, tokenizer):
    labels = {"id2label": {0: "safe", 1: "unsafe"}, "label2id": {"safe": 0, "unsafe": 1}}
    judge = open_guard("classifier", bert(tokenizer, tmp_path / "c", **labels))
    overlong, judged = judge.judge([completion("a " * 300), completion()])
    assert overlong.safe is None
    assert "the judge reads 1 to 256" in overlong.reason
    assert judged.safe is not None
    torch.nn.init.constant_(judge.model.classifier.weight, float("nan"))
    (verdict,) = judge.judge([completion()])
    assert (verdict.safe, verdict.reason) == (None, "the judge's score isn't finite")


def test_batches_keep_their_bound(tokenizer):
    model = BeaverModel(config(tokenizer)).eval()
    shapes = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    list(ScoreJudge("beaver-cost", model, tokenizer, "toy", max_batch_tokens=120).judge(ANSWERS))
    assert max(rows * width for rows, width in shapes) <= 120
    assert sum(rows for rows, _ in shapes) == len(ANSWERS)


def test_specs_name_every_kind():
    assert set(JUDGES) == {"linear", "oracle", "people", "refusal-rule", "rubric", *MODEL_KINDS}
    for spec, message in (("reward", "expected reward:PATH"), ("rewards:x", "did you mean 'reward'")):
        with pytest.raises(RecipeError, match=message):
            open_judge(spec)
    with pytest.raises(ModelError, match="no such folder"):
        open_judge("beaver-cost:/nowhere/x")
