"""`bfpo score train` with `per_token: true`: what a head reads, what it learns, and how it is measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.config.loading import check_recipe
from bfpo.config.per_token import PerTokenRecipe
from bfpo.core.conversation import user_says
from bfpo.core.files import write_jsonl
from bfpo.core.guarding import GuardCounts
from bfpo.core.samples import Prompt, Sampling, Verdict
from bfpo.data.stages import generate_completions
from bfpo.errors import DataError, RecipeError
from bfpo.generation.in_process import TransformersEngine, load_engine
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging import prefix_head
from bfpo.judging.guarded_engine import guard_engine, load_guard
from bfpo.judging.prefix_head import cross_entropy, fit_head, logits_of, split_prompts
from bfpo.judging.prefix_quality import prefix_quality
from bfpo.judging.prefixes import JudgedAnswer, Prefixes, judged_answers, prefix_example, read_prefixes
from bfpo.model.cost_head import CostHead, load_cost_head
from bfpo.model.layout import packed_layout, padded_layout
from bfpo.stats.agreement import calibration_error


@pytest.fixture
def engine(make_model, tokenizer):
    sampling = Sampling(temperature=1.0, max_new_tokens=6)
    return TransformersEngine(make_model(), tokenizer, sampling, name="m", identity="i")


@pytest.fixture
def completions(engine):
    prompts = [Prompt(f"p{number}", user_says(f"red box {number}")) for number in range(10)]
    requests = [(prompt, sample) for prompt in prompts for sample in range(4)]
    return [completion for batch in engine.generate(requests) for completion in batch]


def judged(completion, safe=True):
    return Verdict(completion.prompt_id, completion.sample, completion.text_hash, "j", "1", safe, reason="?")


def test_prompts_and_padding_are_masked_exactly():
    examples = [prefix_example([5, 6, 7], [[1, 2], [3]]), prefix_example([8], [[4, 9, 2]])]
    packed = packed_layout(examples)
    # [5 6 7 | 1 2 | 3] [8 | 4 9 2]: every prompt once, and the states of all tokens of answers.
    assert packed.input_ids.tolist() == [[5, 6, 7, 1, 2, 3, 8, 4, 9, 2]]
    assert packed.hidden_index.tolist() == [3, 4, 5, 7, 8, 9]
    padded = padded_layout(examples)
    assert padded.input_ids.tolist() == [[5, 6, 7, 1, 2], [5, 6, 7, 3, 0], [8, 4, 9, 2, 0]]
    assert padded.hidden_index.tolist() == [3, 4, 8, 11, 12, 13]
    assert packed.lengths == padded.lengths == (2, 1, 3)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_a_layout_reads_the_tokens_of_the_answers_and_no_other(prompt, answers):
    example = prefix_example(prompt, answers)
    for layout in (packed_layout([example]), padded_layout([example])):
        read = layout.input_ids.flatten()[layout.hidden_index].tolist()
        assert read == [token for answer in answers for token in answer]


@pytest.mark.parametrize("layers", [(-1,), (1, -1), (2, 1)])
def test_states_and_targets_are_those_after_each_token_of_the_answer(engine, completions, layers):
    unsafe = [number % 3 == 0 for number in range(len(completions))]
    answers = [JudgedAnswer(*both) for both in zip(completions, unsafe, strict=True)]
    prefixes = read_prefixes(engine, answers, layers, limit=10**6, seed=0)
    start = 0
    for answer in sorted(answers, key=lambda answer: answer.completion.key):
        prompt_ids, answer_ids = engine.tokens_of(answer.completion)
        with torch.inference_mode():
            states = engine.model(torch.tensor([[*prompt_ids, *answer_ids]]), output_hidden_states=True).hidden_states
        rows = slice(start, start + len(answer_ids))
        expected = torch.cat([states[layer][0, len(prompt_ids) :] for layer in layers], dim=-1)
        torch.testing.assert_close(prefixes.states[rows], expected, rtol=1e-4, atol=1e-5)
        assert prefixes.unsafe[rows].tolist() == [float(answer.unsafe)] * len(answer_ids)
        assert prefixes.tokens[rows].tolist() == list(range(1, len(answer_ids) + 1))
        assert set(prefixes.lengths[rows]) == {len(answer_ids)}
        assert set(prefixes.prompts[rows]) == {answer.completion.prompt_id}
        start += len(answer_ids)
    assert len(prefixes) == len(prefixes.states) == start
    few = read_prefixes(engine, answers, layers, limit=17, seed=0)
    kept = np.sort(np.random.default_rng(0).choice(start, size=17, replace=False))
    assert torch.equal(few.states, prefixes.states[kept])
    assert torch.equal(few.unsafe, prefixes.unsafe[kept])


def test_answers_that_are_not_the_model_s_own_words_are_left_out_and_counted(completions):
    changed = [
        replace(completions[0], guard=GuardCounts(samples=1)),
        replace(completions[1], reasoning="a thought"),
        replace(completions[2], finish_reason="filtered"),
        *completions[3:6],
    ]
    verdicts = [
        judged(completion, safe) for completion, safe in zip(changed, [True] * 4 + [False, None], strict=True)
    ]
    answers, left_out = judged_answers(changed, verdicts)
    # An undecided verdict counts as unsafe.
    assert [answer.unsafe for answer in answers] == [False, True, True]
    assert left_out == {
        "sampled behind a guard": 1,
        "with reasoning or tool calls": 1,
        "not written by the model to its end": 1,
    }
    with pytest.raises(DataError, match=r"verdicts: no verdict on \('p\d', \d\)"):
        judged_answers(changed, verdicts[:-1])
    with pytest.raises(DataError, match="a verdict about another text"):
        judged_answers([replace(changed[3], text="other")], verdicts)
    with pytest.raises(DataError, match="none that a head can learn from"):
        judged_answers(changed[:1], verdicts)


def random_prefixes(width=6, prompts=60, samples=8, length=5):
    """Beginnings of two kinds of answers, unsafe with probabilities 0.1 and 0.9, whose states tell the kind."""
    draw = np.random.default_rng(0)
    kind = np.repeat(np.arange(prompts) % 2, samples)
    unsafe = draw.random(len(kind)) < np.where(kind == 1, 0.9, 0.1)
    centers = draw.normal(size=(2, width)) * 3 + 5
    answers = np.repeat(np.arange(len(kind)), length)
    states = centers[kind[answers]] + 0.1 * draw.normal(size=(len(answers), width))
    return centers, Prefixes(
        torch.tensor(states, dtype=torch.float32),
        torch.tensor(unsafe[answers], dtype=torch.float32),
        np.tile(np.arange(1, length + 1), len(kind)),
        np.full(len(answers), length),
        np.array([f"p{number // samples}" for number in answers]),
    )


@pytest.mark.parametrize("units", [0, 8])
def test_it_finds_the_probability_of_each_state(units):
    centers, prefixes = random_prefixes()
    split = split_prompts(prefixes, holdout=0.3, seed=0)
    assert [len({*part.prompts}) for part in split] == [42, 9, 9]
    assert not {*split.fitted.prompts} & {*split.calibrating.prompts, *split.measured.prompts}
    assert not {*split.calibrating.prompts} & {*split.measured.prompts}
    head = fit_head(split, (1, -1), units=units, steps=100, seed=0)
    assert (head.layers, head.width, head.is_linear) == ((1, -1), 3, units == 0)
    for center, p in zip(centers, (0.1, 0.9), strict=True):
        assert float(head(torch.tensor(center)).sigmoid()) == pytest.approx(p, abs=0.12)
    # Calibration sets the mean logit's loss to its least: the mean probability is the share.
    logits = logits_of(head, split.calibrating)
    assert float(logits.sigmoid().mean()) == pytest.approx(float(split.calibrating.unsafe.mean()), abs=1e-3)
    assert fit_head(split, (1, -1), units=units, steps=100, seed=0).identity == head.identity


def test_every_part_needs_safe_and_unsafe_answers():
    _, prefixes = random_prefixes()
    safe = replace(prefixes, unsafe=torch.zeros(len(prefixes)))
    with pytest.raises(DataError, match=r"the 48 prompts for the part 'fitted' none are unsafe; a head needs both"):
        split_prompts(safe, holdout=0.2, seed=0)
    with pytest.raises(DataError, match=r"'fitted' all are unsafe"):
        split_prompts(replace(prefixes, unsafe=torch.ones(len(prefixes))), holdout=0.2, seed=0)


def test_quality_is_that_of_each_part_of_the_answers():
    _, prefixes = random_prefixes(length=5)
    # In the first fifth of each answer nothing is known, at its end everything.
    logits = torch.where(torch.tensor(prefixes.tokens == 1), 0.0, (2 * prefixes.unsafe - 1) * 3)
    quality = prefix_quality(logits, prefixes)
    first, *_, last = quality["by_share"]
    p = float(torch.tensor(3.0).sigmoid())
    share = float(prefixes.unsafe.mean())
    assert [(part["from"], part["to"]) for part in quality["by_share"]] == [
        (0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0),
    ]  # fmt: skip
    assert [(part["from"], part["to"], part["prefixes"]) for part in quality["by_token"]] == [
        (1, 1, 480), (2, 2, 480), (3, 4, 960), (5, 8, 480),
    ]  # fmt: skip
    assert (first["auroc"].value, last["auroc"].value) == (0.5, 1.0)
    assert first["mean_p"] == 0.5
    assert first["unsafe_share"].value == pytest.approx(share)
    assert first["unsafe_share"].low < share < first["unsafe_share"].high
    assert first["calibration_error"].value == pytest.approx(abs(0.5 - share))
    assert last["calibration_error"].value == pytest.approx(1 - p)
    whole = logits.double().sigmoid().numpy()
    assert quality["all"]["calibration_error"].value == pytest.approx(
        calibration_error(prefixes.unsafe.numpy() > 0, whole)
    )
    assert quality["loss"] == pytest.approx(0.2 * np.log(2) - 0.8 * np.log(p))
    assert quality["constant_loss"] == pytest.approx(-share * np.log(share) - (1 - share) * np.log(1 - share))
    assert quality["loss"] == pytest.approx(cross_entropy(logits, prefixes))


@pytest.fixture
def folder(make_model, tokenizer, tmp_path, monkeypatch):
    """A model, judged answers of it, and the recipe of a head."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    engine = load_engine("model", Sampling(max_new_tokens=4, temperature=1.0))
    prompts = [Prompt(f"p{number}", user_says(f"red box {number}")) for number in range(24)]
    completions = generate_completions(engine, prompts, Path("completions.jsonl"), samples=4)
    safe = [len(completion.text) % 2 == 0 for completion in completions]
    write_jsonl(Path("verdicts.jsonl"), (judged(*both).to_row() for both in zip(completions, safe, strict=True)))
    Path("head.yaml").write_text(
        "model: {path: model}\nper_token: true\ncompletions: completions.jsonl\nverdicts: verdicts.jsonl\n"
        "out: runs/head\nunits: 4\nsteps: 60\nholdout: 0.5\n"
    )
    return tmp_path


def run(*overrides):
    result = CliRunner().invoke(app, ["score", "train", "head.yaml", *overrides])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.mark.usefixtures("folder")
def test_a_trained_head_is_that_of_both_guards():
    output = run()
    assert "96 answers, " in output
    assert "left out: none" in output
    content = json.loads(Path("runs/head/run.json").read_text())
    head = load_cost_head(Path("runs/head/cost-head.safetensors"))
    assert content["head"]["identity"] == head.identity
    assert content["head"]["layers"] == list(head.layers) == [1, -1]
    assert content["data"]["models"] == ["model"]
    assert sum(content["prefixes"].values()) == sum(
        part["prefixes"] for part in content["evaluation"]["by_token"]
    ) + (content["prefixes"]["fitted"] + content["prefixes"]["calibrating"])
    engine = load_engine("model", Sampling(max_new_tokens=4, temperature=1.0))
    Path("guard.yaml").write_text("guard: {kind: factor, head: runs/head/cost-head.safetensors, kappa: 2, top_k: 5}")
    guarded = guard_engine(engine, engine.sampling, load_guard(Path("guard.yaml")))
    assert guarded.settings_hash != engine.settings_hash
    assert [len(batch) for batch in guarded.generate([(Prompt("p", user_says("red box")), 0)])] == [1]
    Path("guard.yaml").write_text("guard: {kind: project, head: runs/head/cost-head.safetensors}")
    with pytest.raises(Exception, match="needs a linear head on one layer, and this one has a hidden layer"):
        guard_engine(engine, engine.sampling, load_guard(Path("guard.yaml")))
    run("units=0", "layers=[1]")
    assert Path("runs/head.earlier-1/cost-head.safetensors").exists()
    projected = guard_engine(engine, engine.sampling, load_guard(Path("guard.yaml")))
    assert [len(batch) for batch in projected.generate([(Prompt("p", user_says("red box")), 0)])] == [1]


def test_a_dry_run_and_answers_of_another_model(folder, capsys):
    output = CliRunner().invoke(app, ["score", "train", "head.yaml", "model.path=other", "--dry-run"])
    assert "dry run: nothing was trained" in output.output
    assert "warning: the answers are of model, the head is for other" in output.output + capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_a_failed_run_leaves_an_earlier_head(folder, monkeypatch):
    run()
    before = (folder / "runs/head/cost-head.safetensors").read_bytes()
    monkeypatch.setattr(prefix_head, "_calibrated", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("seed=1")
    assert (folder / "runs/head/cost-head.safetensors").read_bytes() == before


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("layers=[9]", r"layers is \[9\]; model has 2 layers, so expected 1 to 2, or -1"),
        ("layers=[0]", r"expected different layers from 1, or -1 for the last"),
        ("layers=[1,1]", r"expected different layers from 1, or -1 for the last"),
        ("layers=[]", "layers"),
        ("model.path=null", "model"),
        ("holdout=1", "holdout"),
        ("data=[]", "data: unknown key"),
        ("per_token=maybe", "per_token"),
    ],
)
def test_wrong_keys_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        run(change)
    if change.startswith("layers=[9"):
        with pytest.raises(RecipeError, match=r"--limit counts pairs"):
            run("--limit", "3")


def test_a_head_of_another_model_is_refused(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    width = engine.model.config.hidden_size
    Path("guard.yaml").write_text("guard: {kind: factor, head: head.safetensors, kappa: 2, top_k: 5}")
    guard = load_guard(Path("guard.yaml"))
    CostHead((-1,), torch.ones(1, width), torch.zeros(1)).save(Path("head.safetensors"))
    with pytest.raises(RecipeError, match=r"guard.kind is 'factor', which needs a model in this process"):
        guard_engine(ScriptedEngine(lambda *_: ""), Sampling(), guard)
    for layers, inputs in (((-1,), 3), ((9,), width), ((1, 9), 2 * width), ((1, -1), width)):
        CostHead(layers, torch.ones(1, inputs), torch.zeros(1)).save(Path("head.safetensors"))
        with pytest.raises(DataError, match=r"guard.head: head.safetensors is for layers \[.*\] and states of width"):
            guard_engine(engine, engine.sampling, guard)
    CostHead((1, -1), torch.ones(1, 3), torch.zeros(1)).save(Path("head.safetensors"))
    with pytest.raises(DataError, match="expected the metadata `layers`"):
        guard_engine(engine, engine.sampling, guard)
    Path("guard.yaml").write_text("guard: {kind: factor, head: h, samples: 2}")
    with pytest.raises(RecipeError, match=r"guard.samples: unknown key of 'factor'"):
        load_guard(Path("guard.yaml"))
    Path("guard.yaml").write_text("guard: {kind: mask, head: h}")
    with pytest.raises(RecipeError, match=r"guard: .*'factor'"):
        load_guard(Path("guard.yaml"))


def test_a_resolved_recipe_reads_back_as_itself():
    content = {"model": {"path": "m"}, "per_token": True, "completions": "c", "verdicts": "v", "out": "o"}
    checked = check_recipe(content, PerTokenRecipe, "head")
    assert check_recipe(checked.model_dump(mode="json"), PerTokenRecipe, "head") == checked
