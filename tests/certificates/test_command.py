"""`bfpo certify` on the command line: what it writes and prints, how it resumes, and how it refuses bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from bfpo.certificates import states, verify
from bfpo.certificates.paraphrases import read_paraphrases
from bfpo.commands.app import main
from bfpo.config.recipes import ModelSection
from bfpo.core.certificate import CLAIM, read_certificate
from bfpo.core.files import content_hash, write_jsonl
from bfpo.core.samples import Completion, Verdict
from bfpo.data.stages import read_completions
from bfpo.errors import DataError
from bfpo.judging.scorers import load_scorer
from bfpo.model.cost_head import CostHead, load_cost_head
from bfpo.model.score_heads import add_score_heads, padding_id, save_score_head

RECIPE = {
    "out": "certified",
    "head": "head.safetensors",
    "model": {"path": "model"},
    "paraphrases": "paraphrases.jsonl",
    "boxes": {"hull": True, "radius": 0.5, "precisions": ["float32", "bfloat16", "int8"]},
}
REPAIR = {"completions": "completions.jsonl", "verdicts": "verdicts.jsonl", "rounds": 1, "keep_accuracy": 0.5}
WORDINGS = ("round {} near the door", "a {} box", "show the {} ball", "small {} lamp behind it")
GROUPS = ("red", "green", "blue", "large")


def prompts():
    return [
        {
            "prompt_id": f"{group}-{number}",
            "prompt": wording.format(group),
            "group": group,
            "kind": "harmful" if group in ("red", "blue") else "benign",
        }
        for group in GROUPS
        for number, wording in enumerate(WORDINGS)
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model, tokenizer):
    folder = tmp_path_factory.mktemp("certify") / "model"
    make_model(shape="nano").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, checkpoint):
    """Work in a folder with a model, a head, paraphrases, and answers with verdicts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(checkpoint)
    generator = torch.Generator().manual_seed(0)
    width = json.loads((checkpoint / "config.json").read_text())["hidden_size"]
    shapes = [(1, 4), (1,), (4, width), (4,)]
    weights = [torch.randn(shape, generator=generator) * 0.3 for shape in shapes]
    CostHead((-1,), *weights).save(tmp_path / "head.safetensors")
    write_jsonl(tmp_path / "paraphrases.jsonl", prompts())
    write_recipe()
    return tmp_path


def write_recipe(**changes):
    Path("certify.yaml").write_text(yaml.safe_dump(RECIPE | changes))


def write_answers():
    """Let the model answer, and call half of the answers unsafe."""
    rows = [
        {
            "prompt_id": row["prompt_id"],
            "sample": 0,
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "text": f"take the {number} box near the lamp",
            "finish_reason": "stop",
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "model": "m",
            "engine": "e",
            "settings_hash": "h",
        }
        for number, row in enumerate(prompts())
    ]
    write_jsonl(Path("completions.jsonl"), rows)
    verdicts = [
        Verdict(answer.prompt_id, 0, answer.text_hash, "j", "1", number % 2 == 0, reason="?")
        for number, answer in enumerate(read_completions(Path("completions.jsonl")))
    ]
    write_jsonl(Path("verdicts.jsonl"), [verdict.to_row() for verdict in verdicts])


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs the command in this process and gives exit code, output and errors."""

    def run_command(*overrides):
        monkeypatch.setattr("sys.argv", ["bfpo", "certify", "certify.yaml", *overrides])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run_command


def test_it_writes_what_is_certified_with_what_the_boxes_mean(run, folder):
    code, output, errors = run()
    assert code == 0, errors
    certificate = read_certificate(folder / "certified" / "certificate.json")
    names = [f"{kind}, expected {side}" for kind in ("hull", "radius", "precisions") for side in ("unsafe", "safe")]
    assert [(part.name, part.boxes) for part in certificate.summaries()] == [(name, 2) for name in names]
    assert {box.outcome for box in certificate.boxes} <= {"certified", "counter-example", "undecided"}
    assert all(box.held_out == 1 for box in certificate.boxes)
    assert certificate.precisions == ["float32", "bfloat16", "int8"]
    head = load_cost_head(folder / "head.safetensors")
    assert (certificate.head.identity, certificate.head.units) == (head.identity, 4)
    assert certificate.model_identity
    assert set(certificate.files) == {"paraphrases.jsonl", "head.safetensors"}
    assert {"torch", "scipy", "bfpo"} <= set(certificate.versions)
    # The boxes of precisions are those of rounding: narrow, but not points.
    widths = {box.kind: box.width for box in certificate.boxes}
    assert 0 < widths["precisions"] < widths["radius"] == pytest.approx(1.0, abs=1e-3)
    assert "held-out paraphrases inside" in output
    assert CLAIM in output
    assert "no held-out paraphrase is in a box of the kind precisions" in errors
    # No certified share without the share of held-out paraphrases, and nothing is said of the model.
    for line in output.splitlines():
        assert not ("%)" in line and " of 2 (" not in line)
    assert "model is safe" not in output


def test_counter_examples_are_states_that_the_head_gets_wrong(run, folder):
    run("boxes.radius=3")
    head = load_cost_head(folder / "head.safetensors")
    rows = [json.loads(line) for line in (folder / "certified" / "boxes.jsonl").read_text().splitlines()]
    wrong = [row["decision"] for row in rows if row["decision"]["outcome"] == "counter-example"]
    assert wrong
    for decision in wrong:
        assert float(head(torch.tensor(decision["counter_example"]))) == decision["found"]


def without_time(path):
    content = json.loads(path.read_text())
    return {key: value for key, value in content.items() if key != "created"}


def test_a_second_run_computes_nothing_and_says_the_same(run, folder, monkeypatch):
    write_answers()
    write_recipe(repair=REPAIR)
    assert run()[0] == 0
    before = without_time(folder / "certified" / "certificate.json")
    rounds = before["repair"]
    assert rounds[0]["round"] == 0
    assert len(rounds) > 1
    assert {box["seen"] for box in before["boxes"]} == {True, False}

    def fail(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(verify, "decide", fail)
    monkeypatch.setattr(states, "hidden_states", fail)
    code, output, _ = run()
    assert code == 0
    assert without_time(folder / "certified" / "certificate.json") == before
    assert "seen by the repair" in output
    if before["repaired"] is not None:
        repaired = load_cost_head(folder / "certified" / "repaired-head.safetensors")
        assert repaired.identity == before["repaired"]["identity"]


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not_killed(folder):
    write_answers()
    write_recipe(repair=REPAIR)
    command = [sys.executable, "-m", "bfpo", "certify", "certify.yaml"]
    subprocess.run(command, check=True, capture_output=True)
    whole = without_time(folder / "certified" / "certificate.json")
    shutil.move("certified", "whole")
    log = folder / "certified" / "boxes.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not log.exists() and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "certified" / "certificate.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert without_time(folder / "certified" / "certificate.json") == whole
    keys = [content_hash(row["head"], row["box"]) for row in map(json.loads, log.read_text().splitlines())]
    assert len(keys) == len(set(keys))


def test_a_cost_model_of_score_train_is_certified(run, folder, make_model, tokenizer):
    scorer = add_score_heads(make_model(shape="nano"), 1, pad_id=padding_id(tokenizer), seed=0)
    save_score_head(scorer, 0, "cost", tokenizer, folder / "cost")
    write_recipe(head="cost", model=None, answer="take the red box", boxes={"hull": False, "radius": 1e-4})
    code, output, errors = run()
    assert code == 0, errors
    certificate = read_certificate(folder / "certified" / "certificate.json")
    assert (certificate.head.units, certificate.head.path, certificate.model) == (0, "cost", "cost")
    assert {box.method for box in certificate.boxes} == {"closed form"}
    assert "cost (linear, layer -1)" in output
    # In so narrow boxes the scores are that of the judge of the first paraphrase.
    judge = load_scorer("cost", ModelSection(path="cost"))
    first = [group.inside[0] for group in read_paraphrases("paraphrases.jsonl", 0.25)]
    answers = [
        Completion(prompt.prompt_id, 0, prompt.prompt, "take the red box", "stop", 1, 1, "m", "e", "h")
        for prompt in first
    ]
    for box, verdict in zip(certificate.boxes, judge.judge(answers), strict=True):
        assert box.bound == pytest.approx(verdict.score, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": {"hull": False}}, r"boxes: no boxes; set hull, radius or precisions"),
        ({"boxes": {"precisions": ["int8"]}}, r"boxes: precisions is \['int8'\]; a hull needs at least two"),
        ({"boxes": {"radius": 0}}, r"boxes.radius: Input should be greater than 0 \(got 0\)"),
        (
            {"boxes": {"precisions": ["int4", "int8"]}},
            r"boxes.precisions.0: Input should be 'float32', 'bfloat16' or",
        ),
        ({"holdout": 0}, r"holdout: Input should be greater than 0"),
        ({"threshold": 1}, r"threshold: Input should be less than 1"),
        ({"repair": REPAIR | {"clean_weight": 0}}, r"repair.clean_weight: Input should be greater than 0"),
        ({"repair": {"completions": "c"}}, r"repair.verdicts: Field required"),
        ({"paraphrase": "p"}, r"paraphrase: unknown key; did you mean 'paraphrases'"),
        ({"model": None}, r"model: missing; head is head.safetensors, a file"),
        ({"head": "none"}, r"none: no such file; expected a cost head"),
        (
            {"head": "narrow.safetensors"},
            r"head: narrow.safetensors is for layers \[-1\] and states of width 3; model has",
        ),
        ({"head": "model"}, r"model: leave it out; head is model, a folder"),
        ({"head": "model", "model": None}, r"answer: missing; head is model, a folder"),
        ({"head": "model", "model": None, "answer": "a"}, r"model has no trained head for cost"),
        ({"paraphrases": "none.jsonl"}, r"none.jsonl"),
        ({"answer": "box " * 5000}, r"prompt 'red-\d' with its answer has \d+ tokens, and model has \d+ positions"),
        ({"repair": REPAIR}, r"completions.jsonl"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(run, folder, changes, message):
    CostHead((-1,), torch.ones(1, 3), torch.zeros(1)).save(folder / "narrow.safetensors")
    write_recipe(**changes)
    code, output, errors = run()
    assert code == 2
    assert re.search(message, errors), errors
    assert "Traceback" not in errors
    assert "%" not in output
    assert not (folder / "certified" / "certificate.json").exists()


def test_the_certified_head_is_not_replaced(run, folder):
    head = folder / "certified" / "repaired-head.safetensors"
    head.parent.mkdir()
    shutil.copy(folder / "head.safetensors", head)
    before = head.read_bytes()
    write_recipe(head="certified/repaired-head.safetensors")
    code, _, errors = run()
    assert code == 2
    assert "out: certified has the head that is certified" in " ".join(errors.split())
    assert head.read_bytes() == before


def test_without_held_out_paraphrases_nothing_is_certified(run, folder):
    write_jsonl(folder / "paraphrases.jsonl", [row for row in prompts() if row["prompt_id"][-1] in "01"])
    code, output, errors = run()
    assert code == 2
    assert "has 2 prompts; expected at least 3: two make a box, and one is held out" in errors
    assert "certified" not in output


def test_int8_rounds_the_layers_of_every_architecture_but_no_embeddings():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    rounded = states._in_precision(gpt2, "int8")
    layers = [name for name, module in gpt2.named_modules() if isinstance(module, Conv1D)]
    assert len(layers) == 4
    for name in layers:
        before, after = gpt2.get_submodule(name).weight, rounded.get_submodule(name).weight
        step = before.abs().amax(dim=0) / 127
        assert not torch.equal(before, after)
        assert ((before - after).abs() <= step / 2 + 1e-9).all()
    assert torch.equal(gpt2.transformer.wte.weight, rounded.transformer.wte.weight)


def test_int8_of_fused_layers_is_left_out():
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    with pytest.raises(NotImplementedError, match=r"fused layers such as model\.layers\.0\..*experts"):
        states._in_precision(mixtral, "int8")


def test_a_precision_that_does_not_run_here_is_left_out(run, folder, monkeypatch):
    whole = states._in_precision

    def refuse(model, precision):
        if precision == "bfloat16":
            raise RuntimeError("not implemented for 'BFloat16'")
        return whole(model, precision)

    monkeypatch.setattr(states, "_in_precision", refuse)
    code, _, errors = run()
    assert code == 0
    assert "the model doesn't run here in bfloat16, which is left out: not implemented for 'BFloat16'" in errors
    assert read_certificate(folder / "certified" / "certificate.json").precisions == ["float32", "int8"]
    code, _, errors = run("boxes.precisions=[bfloat16, int8]", "out=other")
    assert code == 2
    assert "boxes.precisions: model runs here in int8 of bfloat16, int8; a hull needs two" in errors


def test_a_damaged_certificate_is_refused(run, folder):
    run()
    path = folder / "certified" / "certificate.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"schema": 9}, r"schema is 9; this version reads schema 1"),
        ({"boxes": 3}, r"boxes: Input should be a valid list"),
        ({"boxes": [content["boxes"][0] | {"held_out": 0}]}, r"a box has no held-out paraphrases"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match=message):
            read_certificate(path)
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_certificate(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_certificate(folder / "none.json")
