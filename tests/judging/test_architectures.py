"""Every guard on the architecture of its real weights, tiny and random: it loads from a folder and judges."""

import pytest
import torch
import transformers

from bfpo.judging import guards
from bfpo.judging.formats import GUARDS, GUIDELINES
from bfpo.judging.open_models import open_guard

from .stand_ins import completion, stand_in_tokenizer

# ShieldGemma is a Gemma 2, which caps its logits and alternates windows; WildGuard and HarmBench are a Mistral and a
# Llama 2.
ARCHITECTURES = {
    "llama-guard": ("Llama", {}),
    "wildguard": ("Mistral", {"sliding_window": 16}),
    "harmbench": ("Llama", {}),
    "shieldgemma": ("Gemma2", {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}),
    "qwen3guard": ("Qwen3", {"head_dim": 8}),
    "granite-guardian": ("Granite", {"logits_scaling": 2.0}),
}


@pytest.mark.parametrize("kind", GUARDS)
def test_a_guard_of_its_own_architecture_loads_and_judges(kind, tmp_path, monkeypatch):
    # A random model has little probability on the words.
    monkeypatch.setattr(guards, "_MIN_MASS", 0.0)
    name, options = ARCHITECTURES[kind]
    tokenizer = stand_in_tokenizer(kind)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    model_class = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(getattr(transformers, f"{name}Config")(**sizes, **options, pad_token_id=0))
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    guard = open_guard(kind, str(tmp_path))
    answers = [completion("a b c " * 3), completion("b a " * 20)]
    short, long = guard.judge(answers)
    assert short.safe is not None or "answers" in short.reason
    # The same probabilities as those of an unpadded row in transformers' own attention.
    own = model_class.from_pretrained(tmp_path, attn_implementation="eager").eval()
    question = GUARDS[kind].questions[0]
    for answer, verdict in zip(answers, (short, long), strict=True):
        p_safe = []
        for guideline in GUIDELINES if kind == "shieldgemma" else [None]:
            text = guard.render(answer, guideline)[0] + question.lead
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            words = [word for word, _ in question.words]
            with torch.inference_mode():
                p_words = own(ids).logits[0, -1][tokenizer.convert_tokens_to_ids(words)].softmax(-1)
            p_safe.append(sum(float(p) for p, (_, safe) in zip(p_words, question.words, strict=True) if safe))
        if question.about == "safe":
            assert verdict.p_safe == pytest.approx(min(p_safe), abs=1e-5)
        assert 0 < verdict.p_safe < 1
