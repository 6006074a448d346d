"""The transformers engine: batching doesn't change completions, and only the sampling shapes the distribution."""

import json
import re
from copy import deepcopy
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import GenerationConfig
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.core import terminal
from bfpo.core.conversation import Message, user_says
from bfpo.core.files import content_hash, read_repaired_jsonl, write_jsonl
from bfpo.core.samples import Prompt, Sampling
from bfpo.core.tools import as_template_kwargs, as_tools
from bfpo.data import stages
from bfpo.data.stages import generate_completions, generate_most, read_completions
from bfpo.errors import DataError, ModelError, RecipeError, Unanswered
from bfpo.generation.decoding import Decoder
from bfpo.generation.in_process import TokenAnswer, TransformersEngine, checkpoint_identity, load_engine
from bfpo.generation.slots import UnsupportedModel
from bfpo.model.new import CHAT_TEMPLATE

PROMPTS = [Prompt(f"p{i}", user_says(" ".join(["small red box"] * (1 + i % 4)) + f" near {i}")) for i in range(9)]
REQUESTS = [(prompt, sample) for prompt in PROMPTS for sample in range(2)]


@pytest.fixture
def engine(make_model, tokenizer):
    def make(dtype=torch.float64, max_batch_tokens=4096, **sampling):
        settings = Sampling(**{"max_new_tokens": 12, "temperature": 1.0} | sampling)
        model = make_model().to(dtype)
        return TransformersEngine(
            model, tokenizer, settings, name="m", identity="i", max_batch_tokens=max_batch_tokens
        )

    return make


def texts(engine, requests=REQUESTS):
    completions = [completion for batch in engine.generate(requests) for completion in batch]
    return {completion.key: (completion.text, completion.finish_reason) for completion in completions}


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.8}, {"temperature": 0.0}])
def test_completions_do_not_depend_on_batching(engine, sampling):
    together = texts(engine(**sampling))
    assert texts(engine(max_batch_tokens=1, **sampling)) == together
    assert texts(engine(max_batch_tokens=90, **sampling), REQUESTS[::-1]) == together
    assert len(together) == len(REQUESTS)


def test_seed_and_sample_change_completions_except_greedy_ones(engine):
    sampled = texts(engine())
    assert texts(engine(seed=1)) != sampled
    assert any(sampled[f"p{i}", 0] != sampled[f"p{i}", 1] for i in range(9))
    greedy = texts(engine(temperature=0.0))
    assert all(greedy[f"p{i}", 0] == greedy[f"p{i}", 1] for i in range(9))


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.8}, {"temperature": 0.0}])
def test_a_model_whose_cache_cannot_be_edited_gives_the_same_answers(engine, monkeypatch, capsys, sampling):
    expected = texts(engine(**sampling))
    assert capsys.readouterr().out == ""

    def refuse(self, token_ids):
        raise UnsupportedModel("a layer caches its state as a convolution")

    monkeypatch.setattr(Decoder, "check", refuse)
    assert texts(engine(max_batch_tokens=90, **sampling)) == expected
    assert "note: m is decoded in whole batches by transformers' generate: a layer" in capsys.readouterr().out


def test_an_interrupted_run_keeps_the_finished_answers(engine, tmp_path, monkeypatch):
    # Few rows, so that some answers end while others wait.
    long = engine(max_new_tokens=30, max_batch_tokens=200)
    whole = generate_completions(long, PROMPTS, tmp_path / "whole.jsonl", samples=2)
    path, write = tmp_path / "killed.jsonl", stages.append_jsonl

    def killed(file, rows):
        write(file, rows)
        if len(file.read_text().splitlines()) > 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages, "append_jsonl", killed)
    with pytest.raises(KeyboardInterrupt):
        generate_completions(long, PROMPTS, path, samples=2)
    monkeypatch.undo()
    kept = read_repaired_jsonl(tmp_path / "killed.jsonl.unfinished")
    assert 5 < len(kept) < len(whole)
    assert generate_completions(long, PROMPTS, path, samples=2) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_tokens_are_counted_while_answers_are_generated(engine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BEFORE_FIRST_LINE", 0.0)
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    generate_completions(engine(max_batch_tokens=150), PROMPTS, tmp_path / "a.jsonl")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("generating: ")]
    # The first line comes after the first forward pass, long before an answer ends.
    assert re.fullmatch(r"generating: 0 of 9 \(\d+ tokens, [\d,]+ per second\)", lines[0])
    assert re.search(r"generating: [1-8] of 9, about \d+ min left \(\d+ tokens", lines[-1])


def test_finished_samples_of_the_former_noise_are_kept_and_unfinished_ones_refused(engine, tmp_path):
    path = tmp_path / "c.jsonl"
    sampled = engine()
    made = generate_completions(sampled, PROMPTS[:3], path, samples=2)
    old = [replace(completion, text="former", settings_hash=sampled.former_settings_hash) for completion in made]
    write_jsonl(path, [completion.to_row() for completion in old])
    before = path.read_bytes()
    assert generate_completions(sampled, PROMPTS[:3], path, samples=2) == old
    assert path.read_bytes() == before
    for prompts, samples in ((PROMPTS[:4], 2), (PROMPTS[:3], 3)):
        with pytest.raises(DataError, match=r"sampled by an earlier version, .* and [23] completions are missing"):
            generate_completions(sampled, prompts, path, samples=samples)
    (tmp_path / "c.jsonl.unfinished").write_bytes(before)
    path.unlink()
    with pytest.raises(DataError, match="sampled by an earlier version"):
        generate_completions(sampled, PROMPTS[:4], path, samples=2)
    # Another seed is still another run.
    with pytest.raises(DataError, match="another model or other settings"):
        generate_completions(engine(seed=1), PROMPTS[:3], path, samples=2)


def test_the_version_of_the_noise_is_a_setting_of_samples_only(engine):
    greedy, sampled = engine(temperature=0.0), engine()
    for other, hashed in ((greedy, greedy.settings_hash), (sampled, None)):
        sampling, template = other.sampling, other.tokenizer.chat_template
        settings = (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed)
        former = content_hash("transformers", "i", str(other.model.dtype), template, settings)
        # Greedy answers are what they were; samples of the former noise are another model's for all purposes.
        assert (former == other.settings_hash) == (hashed is not None)


def test_the_checkpoints_generation_config_does_not_change_completions(make_model, tokenizer):
    results = []
    for config in (GenerationConfig(), GenerationConfig(do_sample=True, top_k=1, repetition_penalty=9.0)):
        model = make_model().double()
        model.generation_config = config
        sampling = Sampling(temperature=1.0, max_new_tokens=12)
        results.append(texts(TransformersEngine(model, tokenizer, sampling, name="m", identity="i")))
        assert model.generation_config is config
    assert results[0] == results[1]


def test_completions_have_a_finish_reason(engine, tokenizer):
    (cut,) = next(engine(max_new_tokens=1).generate(REQUESTS[:1]))
    assert (cut.finish_reason, cut.completion_tokens) == ("length", 1)
    equal_logits = engine()
    equal_logits.model.get_output_embeddings().weight.data.zero_()
    equal_logits.model.get_output_embeddings().weight.data[tokenizer.eos_token_id] = 0
    equal_logits.sampling = Sampling(temperature=0.0, max_new_tokens=4)
    # All logits are equal, so the likeliest token is number 0, which starts a turn and isn't shown.
    (same,) = next(equal_logits.generate(REQUESTS[:1]))
    assert (same.finish_reason, same.completion_tokens, same.text) == ("length", 4, "")


def test_an_answer_with_a_given_beginning_is_its_likeliest_continuation(engine, tokenizer):
    own = engine(temperature=0.0)
    prompt = Prompt("p", user_says("small box"), prefill="red door ")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "small box"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    given = tokenizer(prompt.prefill, add_special_tokens=False)["input_ids"]
    expected = list(given)
    while len(expected) < 12 and expected[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            expected.append(int(own.model(torch.tensor([ids + expected])).logits[0, -1].argmax()))
    assert 0 < len(given) < len(expected)
    ((completion,),) = own.generate([(prompt, 0)])
    assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert completion.text.startswith("red door")
    assert completion.completion_tokens == len(expected)
    with pytest.raises(RecipeError, match=r"prefill has .* tokens, and max_new_tokens is 1"):
        list(engine(max_new_tokens=1).generate([(prompt, 0)]))


def test_an_answer_is_not_begun_inside_a_thought(engine, tokenizer):
    thinking = engine()
    thinking.tokenizer = deepcopy(tokenizer)
    thinking.tokenizer.chat_template = THINKING
    with pytest.raises(Unanswered, match="begins a thought"):
        list(thinking.generate([(Prompt("p", user_says("small box"), prefill="Sure,"), 0)]))


def test_settings_hash_covers_what_completions_depend_on(engine):
    first = engine()
    assert engine(samples=5).settings_hash == first.settings_hash
    settings = ({"seed": 1}, {"temperature": 0.5}, {"top_p": 0.5}, {"max_new_tokens": 3})
    changed = [engine(**setting) for setting in settings]
    changed.append(engine(dtype=torch.float32))
    other = deepcopy(first.tokenizer)
    other.chat_template += " "
    for tokenizer, identity in ((other, "i"), (first.tokenizer, "j")):
        changed.append(TransformersEngine(first.model, tokenizer, first.sampling, name="m", identity=identity))
    assert len({first.settings_hash, *(other.settings_hash for other in changed)}) == 1 + len(changed)
    # The path and the batch size don't matter.
    moved = TransformersEngine(
        first.model, first.tokenizer, first.sampling, name="n", identity="i", max_batch_tokens=9
    )
    assert moved.settings_hash == first.settings_hash
    (batch,) = first.generate(REQUESTS[:1])
    assert batch[0].settings_hash == first.settings_hash


def test_prompts_that_do_not_fit_are_counted_and_the_others_answered(engine, tmp_path):
    short = engine(max_new_tokens=6)
    lengths = {prompt.prompt_id: len(short._prompt_ids(prompt)) for prompt in PROMPTS}
    # The two longest don't fit.
    short.model.config.max_position_embeddings = sorted(lengths.values())[-3] + 6
    long = {name for name, length in lengths.items() if length > sorted(lengths.values())[-3]}
    assert 0 < len(long) < 9
    with pytest.raises(Unanswered, match=rf"{2 * len(long)} of 18 completions .*prompt too long") as raised:
        generate_completions(short, PROMPTS, tmp_path / "a.jsonl", samples=2)
    assert {name for name, _ in raised.value.failed} == long
    completions, missing = generate_most(
        short, PROMPTS, tmp_path / "b.jsonl", samples=2, max_unanswered=2 * len(long)
    )
    assert set(missing) == long
    assert {completion.prompt_id for completion in completions} == set(lengths) - long
    assert read_completions(tmp_path / "b.jsonl") == completions
    with pytest.raises(Unanswered):
        generate_most(short, PROMPTS, tmp_path / "b.jsonl", samples=2, max_unanswered=2 * len(long) - 1)


# As Gemma's and Mistral's: no system message, and an addition that fails on some conversations.
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.content + ('!' if m.content != 'add' else 1) }}{% endfor %}"
)


def test_a_prompt_that_the_template_refuses_is_unanswered_and_the_others_are_not(engine, tmp_path):
    system = Prompt("s", (Message("system", "be kind"), *user_says("small")))
    failing = Prompt("t", user_says("add"))
    prompts = [PROMPTS[0], system, PROMPTS[1], failing, PROMPTS[2]]
    plain, strict = engine(), engine()
    plain.tokenizer = strict.tokenizer = deepcopy(plain.tokenizer)
    strict.tokenizer.chat_template = STRICT
    completions, missing = generate_most(strict, prompts, tmp_path / "c.jsonl", samples=2, max_unanswered=4)
    assert missing == {
        "s": "the chat template refuses the conversation: System role not supported",
        "t": missing["t"],
    }
    assert missing["t"].startswith("the chat template refuses the conversation: ")
    assert {completion.prompt_id for completion in completions} == {"p0", "p1", "p2"}
    # The others are what they are without the refused ones.
    others = [(prompt, sample) for prompt in PROMPTS[:3] for sample in range(2)]
    assert texts(strict, others) == {answer.key: (answer.text, answer.finish_reason) for answer in completions}
    strict.tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(ModelError, match="chat template, line 1"):
        texts(strict, others)


def test_ids_without_an_embedding_are_refused(engine):
    small = engine()
    rows = small.model.config.vocab_size
    small.tokenizer = deepcopy(small.tokenizer)
    while len(small.tokenizer) <= rows:
        small.tokenizer.add_tokens([f"extra{len(small.tokenizer)}"])
    # A token that isn't used does no harm: some tokenizers have more tokens than their text models.
    assert texts(small)
    largest = len(small.tokenizer) - 1
    with pytest.raises(ModelError, match=f"gives token {largest}, but the model has only {rows} embeddings"):
        texts(small, [(Prompt("p", user_says(f"small extra{largest}")), 0)])
    small.tokenizer.pad_token = f"extra{largest}"
    with pytest.raises(ModelError, match="embeddings"):
        texts(small)


def test_loading_a_checkpoint(tmp_path, make_model, tokenizer):
    for name, changes in (("first", {}), ("second", {"seed": 1})):
        make_model(**changes).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    sampling = Sampling(max_new_tokens=4)
    first, second = (load_engine(str(tmp_path / name), sampling) for name in ("first", "second"))
    assert first.settings_hash == load_engine(str(tmp_path / "first"), sampling).settings_hash
    assert first.settings_hash != second.settings_hash
    with pytest.raises(ModelError, match="no such folder"):
        load_engine(str(tmp_path / "third" / "x"), sampling)
    tokenizer_without = tokenizer.__class__.from_pretrained(tmp_path / "first")
    tokenizer_without.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        TransformersEngine(make_model(), tokenizer_without, sampling, name="m", identity="i")


def test_a_checkpoints_identity_covers_all_that_completions_depend_on(tmp_path, make_model, tokenizer, monkeypatch):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    first = checkpoint_identity(str(base))
    PeftModel(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    adapted = checkpoint_identity(str(adapter))
    assert adapted != first
    make_model(seed=1).save_pretrained(base)
    assert checkpoint_identity(str(base)) != first
    # The adapter's own files are unchanged, but its base model isn't.
    assert checkpoint_identity(str(adapter)) != adapted
    # A cache of the hub as it is after loading: the branch points to a commit.
    cache = tmp_path / "hub" / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / "main").write_text(commit)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        assert checkpoint_identity("org/name") == f"org/name@{commit}"
    assert checkpoint_identity("org/name", "a" * 40) == f"org/name@{'a' * 40}"


def test_end_tokens_are_a_setting(make_model, tokenizer):
    def settings(*ends):
        model = make_model()
        model.generation_config.eos_token_id = list(ends) or None
        return TransformersEngine(model, tokenizer, Sampling(), name="m", identity="i").settings_hash

    own = tokenizer.eos_token_id
    assert settings() == settings(own)
    assert len({settings(own), settings(own, 7), settings(own, 7, 9)}) == 3


def test_the_command_answers_a_file_and_resumes(tmp_path, make_model, tokenizer):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("small red box\nlarge blue door\n")
    out = tmp_path / "out.jsonl"
    arguments = ["generate", str(tmp_path / "model"), str(tmp_path / "prompts.txt"), "--out", str(out)]
    first = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "3", "--samples", "2"])
    assert first.exit_code == 0, first.output
    assert "4 completions of 2 prompts" in first.output
    before = out.read_bytes()
    assert len(read_completions(out)) == 4
    assert CliRunner().invoke(app, [*arguments, "--max-new-tokens", "3", "--samples", "2"]).exit_code == 0
    assert out.read_bytes() == before
    changed = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "4"])
    assert isinstance(changed.exception, DataError)


THINKING = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize(
    ("written", "ending", "expected"),
    [
        ("small</think>\n\nred box", "stop", ("red box", "small", False)),
        ("small and small", "length", ("", "small and small", True)),
        ("small and small", "stop", ("", "small and small", True)),
    ],
)
def test_a_thought_that_the_prompt_opens_is_split_off(engine, tokenizer, written, ending, expected):
    thinking = engine()
    thinking.tokenizer = deepcopy(tokenizer)
    thinking.tokenizer.chat_template = THINKING
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    new_ids = ids if ending == "length" else [*ids, tokenizer.eos_token_id]
    completion = thinking.completion_of(TokenAnswer(PROMPTS[0], 0, new_ids, 3))
    assert (completion.text, completion.reasoning, completion.lacks_answer) == expected
    assert completion.finish_reason == ending


def test_calls_are_read_where_the_prompt_has_tools(engine, tokenizer):
    tools = as_tools([{"type": "function", "function": {"name": "lamp"}}])
    prompt = Prompt("p", user_says("small"), tools=tools)
    ids = tokenizer('<tool_call>{"name": "lamp", "arguments": {"a": 1}}</tool_call>', add_special_tokens=False)
    with_tools, without = (
        engine().completion_of(TokenAnswer(asked, 0, ids["input_ids"], 3)) for asked in (prompt, PROMPTS[0])
    )
    assert (with_tools.text, with_tools.tool_calls[0].name) == ("", "lamp")
    assert with_tools.tools == tools
    assert without.text.startswith("<tool_call>")


def test_an_answer_in_a_channel_without_a_thought_has_no_name_of_a_channel(engine, tokenizer):
    harmony = engine()
    harmony.tokenizer = deepcopy(tokenizer)
    harmony.tokenizer.add_tokens(["<|channel|>", "<|message|>"], special_tokens=True)
    ids = harmony.tokenizer("<|channel|>final<|message|>red box", add_special_tokens=False)["input_ids"]
    completion = harmony.completion_of(TokenAnswer(PROMPTS[0], 0, (*ids, tokenizer.eos_token_id), 3))
    assert (completion.text, completion.reasoning) == ("red box", None)


def test_a_prompt_of_which_the_template_leaves_something_out_is_unanswered(engine, tmp_path):
    tools = as_tools([{"type": "function", "function": {"name": "lamp"}}])
    prompts = [PROMPTS[0], Prompt("t", user_says("add"), tools=tools)]
    completions, missing = generate_most(engine(), prompts, tmp_path / "c.jsonl", samples=1, max_unanswered=1)
    assert missing == {"t": "the chat template leaves out the tools"}
    assert len(completions) == 1


def test_an_argument_that_the_template_does_not_read_is_noted_once(engine, capsys):
    kwargs = as_template_kwargs({"enable_thinkin": False, "messages_": 1})
    prompts = [Prompt(name, user_says("add"), chat_template_kwargs=kwargs) for name in "ab"]
    list(engine().generate([(prompt, 0) for prompt in prompts]))
    assert capsys.readouterr().out.count("note: the chat template doesn't read its argument 'enable_thinkin'") == 1
