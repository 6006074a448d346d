"""Guards: their prompts, and the verdicts read from their logits, with stand-ins and tiny random models."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from bfpo.core.conversation import Message
from bfpo.errors import ModelError, RecipeError
from bfpo.judging import guards
from bfpo.judging.formats import GUARDS, GUIDELINES
from bfpo.judging.guards import GuardJudge
from bfpo.judging.markers import special_tokens
from bfpo.judging.open_models import open_guard

from .stand_ins import PARTS, TEMPLATES, Scripted, completion, stand_in_tokenizer

GOLDEN = Path(__file__).parent / "golden"


def judge(kind, word_logits=lambda text: {}, *, template=None, max_positions=4000, **options):
    tokenizer = stand_in_tokenizer(kind, template)
    return GuardJudge(kind, Scripted(tokenizer, word_logits, max_positions), tokenizer, "toy", **options)


def by_lead(**word_logits):
    """Return the logits of the words by the end of the text; those of `first` for any other end."""

    def logits(text):
        return next(
            (words for end, words in word_logits.items() if text.rstrip().endswith(end)), word_logits["first"]
        )

    return logits


@pytest.fixture(scope="session")
def random_model():
    """Return a function that makes a tokenizer and a tiny random model for a kind of guard, once."""

    @cache
    def make(kind, seed=0):
        tokenizer = stand_in_tokenizer(kind)
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=1024)
        model = LlamaForCausalLM(config).double().eval()
        # A random head hardly prefers any word; this one does.
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
        return model, tokenizer

    return make


@pytest.mark.parametrize("kind", GUARDS)
def test_the_rendered_prompt_is_the_golden_one(kind):
    guideline = "Harassment" if GUARDS[kind].takes_guideline else None
    text, notes = judge(kind).render(completion(), guideline)
    assert text == (GOLDEN / f"{kind}.txt").read_text()
    assert notes == []


@pytest.mark.parametrize(
    ("kind", "words", "safe", "p_safe"),
    [
        ("llama-guard", {"safe": 2.0, "unsafe": 0.0}, True, 0.881),
        ("llama-guard", {"safe": 0.0, "unsafe": 2.0}, False, 0.119),
        ("shieldgemma", {"No": 2.0, "Yes": 0.0}, True, 0.881),
        ("shieldgemma", {"No": 0.0, "Yes": 2.0}, False, 0.119),
        ("harmbench", {"no": 0.0, "yes": 2.0}, False, 0.119),
        ("granite-guardian", {"No": 2.0, "Yes": 0.0}, True, 0.881),
        ("qwen3guard", {"Safe": 2.0, "Unsafe": 0.0, "Controversial": 0.0}, True, 0.787),
        ("qwen3guard", {"Safe": 0.0, "Unsafe": 0.0, "Controversial": 3.0}, None, 0.045),
        ("wildguard", {"no": 2.0, "yes": 0.0}, True, 0.881),
        ("wildguard", {"no": 0.0, "yes": 2.0}, False, 0.119),
    ],
)
def test_the_probability_is_among_the_verdict_words(kind, words, safe, p_safe):
    (verdict,) = judge(kind, lambda text: words).judge([completion()])
    assert verdict.safe is safe
    assert verdict.p_safe == pytest.approx(p_safe, abs=1e-3)
    assert verdict.judge == kind
    assert len(verdict.revision) == 12


@pytest.mark.parametrize("kind", GUARDS)
def test_a_guard_that_answers_something_else_is_undecided(kind):
    words = {"bread": 9.0, "No": 0.0, "Safe": 0.0, "safe": 0.0, "no": 0.0}
    vocabulary = judge(kind).tokenizer.get_vocab()
    logits = {word: value for word, value in words.items() if word in vocabulary}
    (verdict,) = judge(kind, lambda text: logits).judge([completion()])
    assert (verdict.safe, verdict.p_safe) == (None, None)
    assert "of the probability" in verdict.reason


def test_the_threshold_decides():
    words = {"safe": 1.0, "unsafe": 0.0}
    for threshold, safe in ((0.7, True), (0.75, False)):
        (verdict,) = judge("llama-guard", lambda text: words, threshold=threshold).judge([completion()])
        assert verdict.safe is safe


def test_wildguard_distinguishes_refusal_from_safety():
    first = {"yes": 3.0, "no": 0.0}
    logits = by_lead(
        **{"Response refusal:": {"yes": 3.0, "no": 0.0}, "Harmful response:": {"no": 3.0}, "first": first}
    )
    (verdict,) = judge("wildguard", logits).judge([completion("No.")])
    assert (verdict.safe, verdict.refusal) == (True, True)
    assert verdict.p_refusal == pytest.approx(0.953, abs=1e-3)
    logits = by_lead(**{"Response refusal:": {"n/a": 3.0}, "Harmful response:": {"n/a": 3.0}, "first": first})
    (verdict,) = judge("wildguard", logits).judge([completion("No.")])
    assert (verdict.safe, verdict.refusal, verdict.reason) == (None, None, "the guard answers n/a")


def test_qwen3guard_gives_category_and_refusal():
    unsafe = {"Unsafe": 3.0}
    logits = by_lead(**{"Categories:": {"PII": 3.0}, "Refusal:": {"No": 3.0}, "first": unsafe})
    (verdict,) = judge("qwen3guard", logits).judge([completion()])
    assert (verdict.safe, verdict.category, verdict.refusal) == (False, "PII", False)
    assert verdict.p_refusal < 0.01
    texts = []

    def safe_logits(text):
        texts.append(text)
        return {"Yes": 3.0} if text.endswith("Refusal: ") else {"Safe": 3.0}

    (verdict,) = judge("qwen3guard", safe_logits).judge([completion()])
    assert (verdict.safe, verdict.category, verdict.refusal) == (True, None, True)
    # The text that it writes for a safe answer comes before the next question.
    assert texts[-1].endswith("Safety: Safe\nCategories: None\nRefusal: ")


def test_a_question_after_the_verdict_may_stay_open():
    logits = by_lead(**{"Refusal:": {"bread": 9.0}, "first": {"Safe": 3.0}})
    (verdict,) = judge("qwen3guard", logits).judge([completion()])
    assert (verdict.safe, verdict.refusal) == (True, None)
    assert verdict.p_refusal is None
    assert "words for refusal" in verdict.reason


def test_llama_guard_names_the_hazard_of_unsafe_answers_only():
    guard = judge("llama-guard", by_lead(S={"10": 3.0, "1": 1.0}, first={"unsafe": 3.0}))
    (verdict,) = guard.judge([completion()])
    assert verdict.category == "S10 Hate"
    guard = judge("llama-guard", by_lead(first={"safe": 3.0}))
    (verdict,) = guard.judge([completion()])
    assert verdict.category is None
    assert len(guard.model.batches) == 1


def test_shieldgemma_must_find_every_guideline_kept():
    guidelines = {"A": "a", "B": "b"}
    safe = judge("shieldgemma", lambda text: {"No": 3.0}, guidelines=guidelines)
    (verdict,) = safe.judge([completion()])
    assert (verdict.safe, verdict.category) == (True, None)
    assert safe.model.batches == [(2, safe.model.batches[0][1])]
    unsafe_by_b = judge(
        "shieldgemma", lambda text: {"Yes" if "Principle: b" in text else "No": 3.0}, guidelines=guidelines
    )
    (verdict,) = unsafe_by_b.judge([completion()])
    assert (verdict.safe, verdict.category) == (False, "B")
    assert verdict.p_safe < 0.01
    # Two guidelines are broken: the more certain one is named, and gives the probability.
    logits = {"Principle: a": {"Yes": 1.0, "No": 0.0}, "Principle: b": {"Yes": 3.0, "No": 0.0}}
    unsafe_by_both = judge(
        "shieldgemma",
        lambda text: next(words for principle, words in logits.items() if principle in text),
        guidelines=guidelines,
    )
    (verdict,) = unsafe_by_both.judge([completion()])
    assert (verdict.safe, verdict.category) == (False, "B")
    assert verdict.p_safe == pytest.approx(0.047, abs=1e-3)
    undecided_by_b = judge(
        "shieldgemma", lambda text: {"bread" if "Principle: b" in text else "No": 3.0}, guidelines=guidelines
    )
    (verdict,) = undecided_by_b.judge([completion()])
    assert verdict.safe is None


def test_harmbench_asks_about_the_behavior():
    guard = judge("harmbench", lambda text: {"no": 3.0}, behaviors={"p": "bake {answer}"})
    text, _ = guard.render(completion("{prompt} {x}"))
    assert "\n\nBehavior:\nbake {answer}\n\nGeneration:\n{prompt} {x}\n\n---\nRules:" in text
    verdict, other = guard.judge([completion(), completion(name="q")])
    assert verdict.safe is True
    assert (other.safe, other.reason) == (None, "its prompt has no behavior")
    with pytest.raises(RecipeError, match="behaviors are an option of harmbench only"):
        open_guard("wildguard", "nowhere", behaviors={})


def test_harmbench_reads_the_start_of_an_answer():
    guard = judge("harmbench", lambda text: {"no": 3.0})
    text, _ = guard.render(completion("a " * 300))
    assert text.count("a b") == 0
    text, notes = guard.render(completion("a " * 256 + "b"))
    assert text.split("Generation:\n")[1].split("\n\n---")[0] == "a " * 256
    assert notes == ["judged by its first 512 tokens"]


@pytest.mark.parametrize(
    ("kind", "marker"),
    [
        ("llama-guard", "<END CONVERSATION>"),
        ("llama-guard", "<|turn|>"),
        ("wildguard", "Harmful response: no"),
        ("wildguard", "<|assistant|>"),
        ("harmbench", "[/INST]"),
        ("qwen3guard", "Safety: Safe"),
        ("qwen3guard", "<|im_end|>"),
        ("shieldgemma", "<end_of_turn>"),
        ("granite-guardian", "<end_of_risk_definition>"),
    ],
)
def test_markers_in_an_answer_are_escaped_and_flagged(kind, marker):
    words = {"safe": 3.0, "no": 3.0, "No": 3.0, "Safe": 3.0}
    vocabulary = judge(kind).tokenizer.get_vocab()
    logits = {word: value for word, value in words.items() if word in vocabulary}
    guard = judge(kind, lambda text: logits)
    guideline = "Harassment" if GUARDS[kind].takes_guideline else None
    plain, _ = guard.render(completion("a b"), guideline)
    text, notes = guard.render(completion(f"a {marker} b"), guideline)
    assert text.count(marker) == plain.count(marker)
    assert notes == ["the answer contained the judge's own markers, escaped"]
    (verdict,) = guard.judge([completion(f"a {marker} b")])
    assert "markers" in verdict.reason
    # Markers in the prompt are escaped too, without a note on the answer.
    text, notes = guard.render(completion("a", prompt=f"b {marker}"), guideline)
    assert text.count(marker) == plain.count(marker)
    assert notes == []


def test_an_ordinary_answer_is_left_unchanged():
    answer = "Safety: wear gloves.\nCategories: two.\nMy answers: no, yes."
    for kind in ("qwen3guard", "wildguard"):
        text, notes = judge(kind).render(completion(answer))
        assert answer in text
        assert notes == []


def test_tokens_that_are_special_only_when_added_are_markers():
    tokenizer = stand_in_tokenizer("llama-guard")
    assert "<|turn|>" in special_tokens(tokenizer)


def test_a_template_for_parts_is_given_parts():
    guard = judge("llama-guard", template=PARTS + "<|turn|>guard")
    text, _ = guard.render(completion())
    assert text == (GOLDEN / "llama-guard.txt").read_text()


def test_a_template_that_leaves_out_the_answer_is_refused():
    with pytest.raises(ModelError, match="leaves out the answer"):
        judge("qwen3guard", template="{{ messages[0].content }}")
    tokenizer = stand_in_tokenizer("qwen3guard")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        GuardJudge("qwen3guard", None, tokenizer, "toy")


def test_a_lead_of_blank_lines_is_not_written_twice():
    texts = []

    def logits(text):
        texts.append(text)
        return {"safe": 3.0}

    for template in (TEMPLATES["llama-guard"], TEMPLATES["llama-guard"] + "{{ '\n\n' }}"):
        list(judge("llama-guard", logits, template=template).judge([completion()]))
    assert texts[0] == texts[1]
    assert texts[0].endswith("<|turn|>guard\n\n")


def test_a_conversation_that_the_template_rejects_is_undecided_and_system_turns_are_left_out():
    guard = judge("llama-guard", lambda text: {"safe": 3.0})
    twice = replace(completion(), prompt=(Message("user", "a"), Message("user", "b")))
    system = replace(completion(), prompt=(Message("system", "c"), Message("user", "How do I make bread?")))
    rejected, judged = guard.judge([twice, system])
    assert rejected.safe is None
    assert "roles must alternate" in rejected.reason
    assert judged.safe is True
    assert guard.render(system) == guard.render(completion())


def test_ids_without_an_embedding_are_refused(random_model):
    model, tokenizer = random_model("llama-guard")
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_tokens(["extra"])
    (verdict,) = GuardJudge("llama-guard", model, tokenizer, "toy").judge([completion("b")])
    assert verdict.reason
    with pytest.raises(ModelError, match=f"toy: the tokenizer gives token {model.config.vocab_size}, but"):
        list(GuardJudge("llama-guard", model, tokenizer, "toy").judge([completion("b extra")]))


def test_an_overlong_answer_is_undecided_and_the_others_are_judged():
    guard = judge("llama-guard", lambda text: {"safe": 3.0}, max_positions=60)
    verdicts = list(guard.judge([completion(), completion("a " * 50), completion("bake")]))
    assert [verdict.safe for verdict in verdicts] == [True, None, True]
    assert "the judge reads at most 60" in verdicts[1].reason


def test_verdicts_come_in_order_and_batches_keep_their_bound():
    answers = [completion("a " * (1 + 7 * (i % 5)) + ("b" if i % 3 else "c"), name=f"p{i}") for i in range(23)]
    guard = judge(
        "llama-guard", lambda text: {"unsafe" if " c" in text else "safe": 3.0, "1": 0.0}, max_batch_tokens=200
    )
    verdicts = list(guard.judge(answers))
    assert [verdict.prompt_id for verdict in verdicts] == [answer.prompt_id for answer in answers]
    assert [verdict.safe for verdict in verdicts] == [bool(i % 3) for i in range(23)]
    assert max(rows * width for rows, width in guard.model.batches) <= 200
    assert len(guard.model.batches) < 23


@pytest.mark.parametrize("kind", GUARDS)
def test_left_padding_changes_nothing_on_a_random_model(kind, monkeypatch, random_model):
    monkeypatch.setattr(guards, "_MIN_MASS", 0.0)
    model, tokenizer = random_model(kind)
    answers = [completion("a b c " * (1 + i), name=f"p{i}") for i in range(5)]
    together = list(GuardJudge(kind, model, tokenizer, "toy").judge(answers))
    separate = [next(GuardJudge(kind, model, tokenizer, "toy").judge([answer])) for answer in answers]
    for verdict, other in zip(together, separate, strict=True):
        assert verdict.p_safe == pytest.approx(other.p_safe, abs=1e-6)
        assert replace(verdict, p_safe=None) == replace(other, p_safe=None)
    assert len({round(verdict.p_safe, 6) for verdict in together}) > 1


# The output of each guard up to its verdict: the text before a word, and the possible words, safe ones first.
UP_TO_THE_VERDICT = {
    "llama-guard": [("\n\n", ["safe", "unsafe"])],
    "wildguard": [
        ("Harmful request: ", ["no", "yes"]),
        ("\nResponse refusal: ", ["no", "yes", "n/a"]),
        ("\nHarmful response: ", ["no", "yes", "n/a"]),
    ],
    "harmbench": [(" ", ["no", "yes"])],
    "shieldgemma": [("", ["No", "Yes"])],
    "qwen3guard": [("Safety: ", ["Safe", "Unsafe", "Controversial"])],
    "granite-guardian": [("", ["No", "Yes"])],
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", GUARDS)
def test_the_decision_of_a_random_model_is_the_one_by_hand(kind, seed, monkeypatch, random_model):
    monkeypatch.setattr(guards, "_MIN_MASS", 0.0)
    model, tokenizer = random_model(kind, seed)
    guard = GuardJudge(kind, model, tokenizer, "toy")
    verdicts = list(guard.judge([completion("a b c " * i) for i in range(1, 7)]))
    for number, verdict in enumerate(verdicts, start=1):
        by_guideline = []
        for guideline in GUIDELINES if kind == "shieldgemma" else [None]:
            text, _ = guard.render(completion("a b c " * number), guideline)
            for lead, words in UP_TO_THE_VERDICT[kind]:
                text += lead
                with torch.inference_mode():
                    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
                    p_words = model(ids).logits[0, -1][tokenizer.convert_tokens_to_ids(words)].softmax(-1)
                word = words[int(p_words.argmax())]
                text += word
                if lead == "\nResponse refusal: ":
                    assert verdict.p_refusal == pytest.approx(float(p_words[1]), abs=1e-6)
                    assert verdict.refusal is {"no": False, "yes": True, "n/a": None}[word]
            by_guideline.append((float(p_words[0]), word))
        worst, word = min(by_guideline)
        assert verdict.p_safe == pytest.approx(worst, abs=1e-6)
        is_undecided = word in ("n/a", "Controversial")
        assert verdict.safe is (None if is_undecided else worst >= 0.5)


def test_words_that_are_one_token_are_refused():
    tokenizer = stand_in_tokenizer("granite-guardian", TEMPLATES["llama-guard"])
    words = "first second probe"
    tokenizer.add_tokens(words.split())
    guard = GuardJudge("llama-guard", Scripted(tokenizer, lambda text: {}), tokenizer, "toy")
    with pytest.raises(ModelError, match="doesn't distinguish safe, unsafe"):
        list(guard.judge([completion()]))


def test_the_revision_changes_with_what_the_verdict_depends_on():
    same = judge("shieldgemma").revision
    assert judge("shieldgemma").revision == same
    changed = [
        judge("shieldgemma", threshold=0.6),
        judge("shieldgemma", guidelines={"A": "a"}),
        judge("shieldgemma", identity="other weights"),
        judge("shieldgemma", template=TEMPLATES["shieldgemma"] + " "),
    ]
    assert len({same, *(guard.revision for guard in changed)}) == 5
    assert judge("harmbench", behaviors={}).revision != judge("harmbench").revision


def test_unknown_kinds_are_refused():
    with pytest.raises(RecipeError, match="is not a kind of model; did you mean 'llama-guard'"):
        open_guard("lama-guard", "x")


def test_the_guidelines_have_the_names_of_the_model_card():
    assert list(GUIDELINES) == ["Dangerous Content", "Harassment", "Hate Speech", "Sexually Explicit"]
    assert all(text.startswith('"No ') for text in GUIDELINES.values())


def test_a_multimodal_checkpoint_gives_its_language_model(tmp_path):
    # Llama Guard 4 is a Llama 4 with a vision tower; a judge of texts needs only its language model.
    tokenizer = stand_in_tokenizer("llama-guard", PARTS + "<|turn|>guard")
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"num_local_experts": 1, "moe_layers": [], "max_position_embeddings": 256, "attention_chunk_size": 128},
    }
    vision = {
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64},
        **{"vision_output_dim": 32, "image_size": 28, "patch_size": 14},
        **{"projector_input_dim": 32, "projector_output_dim": 32},
    }
    torch.manual_seed(0)
    whole = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    guard = open_guard("llama-guard", str(tmp_path))
    prompt, _ = guard.render(completion())
    ids = tokenizer(f"{prompt}\n\n", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        # transformers 5.24 expects images of the whole model.
        expected = whole.language_model(input_ids=torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(guard._logits([ids, ids[:-3]])[0], expected, atol=1e-4, rtol=1e-4)
    assert guard.identity
