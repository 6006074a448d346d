"""The red-team circle of `examples/redteam_circle.py`, small: in process, and through a real `transformers serve`."""

import json
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.config.loading import dump_recipe
from bfpo.config.recipes import Source
from bfpo.core.pairs import CELLS
from bfpo.data.load import load_pairs
from bfpo.data.stages import read_completions, read_verdicts
from bfpo.data.verdict_files import judge_file
from bfpo.evaluation.results import read_results
from bfpo.experiments import steps
from bfpo.judging.open import open_judge
from bfpo.testbed.oracle import Oracle

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import redteam_circle as example

SMALL = {
    "pretraining": 2000,
    "fine_tuning": 200,
    "safety_pairs": 700,
    "helpful_pairs": 700,
    "harmful_prompts": 20,
    "benign_prompts": 20,
    "lookalike_prompts": 10,
}
PROMPTS = {"HARMFUL": 24, "BENIGN": 16}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def small_circle():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "BASE_STEPS", {"pretraining": 120, "base": 15})
        for name, value in {**PROMPTS, "WORLD": SMALL, "STEPS": 8, "FITTED_ON": 80}.items():
            patch.setattr(example, name, value)
        yield


@pytest.fixture(scope="module")
def finished_circle(tmp_path_factory):
    """Run the circle once; returns its folder and its results."""
    folder = tmp_path_factory.mktemp("circle")
    return folder, example.circle(folder, 0)


def lines(path):
    return path.read_text().splitlines()


def test_the_circle_runs_offline(finished_circle, capsys):
    folder, summary = finished_circle
    num_prompts = sum(PROMPTS.values())
    trained = ("oracle", "linear", "linear_by_rule")
    for name, judge in (("oracle", Oracle("shared")), ("linear", open_judge(f"linear:{folder / 'judge.npz'}"))):
        out = folder / f"redteam-{name}"
        _, pairs = load_pairs(Source(path=str(out / "pairs.jsonl")), "main")
        metadata = json.loads((out / "redteam.json").read_text())
        assert len(pairs) == metadata["pairs"] == summary[name]["pairs"]
        assert 0 < summary[name]["share_of_pairs"] < 0.1
        assert summary[name]["share_of_pairs"] == pytest.approx(len(pairs) / 1400, abs=1e-4)
        assert Counter(pair.cell for pair in pairs) == {cell: n for cell, n in metadata["cells"].items() if n}
        # Provenance of labels, prompts and answers.
        assert {pair.provenance.safety_label_source for pair in pairs} == {f"{judge.name}@{judge.revision}"}
        assert metadata["judge"] == f"{judge.name}@{judge.revision}"
        sources = [(source["prompts"], len(source["file_sha256"])) for source in metadata["sources"]]
        assert sources == [(24, 64), (16, 64)]
        completions = read_completions(out / "completions.jsonl")
        by_text = {(completion.prompt, completion.text): completion for completion in completions}
        verdicts = read_verdicts(judge_file(out, "verdicts", judge.name, judge.revision))
        safe = {verdict.key: verdict.safe for verdict in verdicts}
        assert len(safe) == num_prompts * example.SAMPLES
        for pair in pairs:
            sides = [by_text[pair.prompt, text] for text in (pair.chosen, pair.rejected)]
            assert tuple(safe[side.key] for side in sides) == pair.labels
        cost = metadata["cost"]
        assert (cost["prompts"], cost["generations"]) == (num_prompts, num_prompts * example.SAMPLES)
        assert cost["replaced"]["human_orders"] == len(pairs)
    # Training prompts and evaluation prompts are disjoint.
    held_out = {json.loads(line)["prompt"][0]["content"] for line in lines(folder / "world/prompts.jsonl")}
    train = {line for kind in ("harmful", "benign") for line in lines(folder / f"{kind}.txt")}
    assert len(train) == num_prompts
    assert not train & held_out
    for name in trained:
        run = folder / f"trained-{name}"
        manifest = json.loads((run / "run.json").read_text())
        assert manifest["recipe"]["data"][0]["path"] == str(folder / f"redteam-{name}" / "pairs.jsonl")
        results = read_results(run / "evaluation")
        assert results.comparisons, "each run is compared with the base"
        for task, metric in example.METRICS:
            value, low, high = summary[f"measured-trained-{name}"][f"{task}/{metric}"]
            assert low <= value <= high
            assert high - low < 1
            assert results.metric(task, metric).value == pytest.approx(value, abs=1e-4)
    by_rule = [json.loads(line) for line in lines(folder / "redteam-linear_by_rule" / "pairs.jsonl")]
    assert {row["safety_label_source"] for row in by_rule} > {"rule"}
    example.show(summary)
    printed = capsys.readouterr().out
    assert all(name in printed for name in trained)
    assert "linear against the oracle on harmful prompts" in printed


def test_the_circle_generates_on_a_real_server(finished_circle, tmp_path):
    folder, _ = finished_circle
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with example.served(folder / "base", port) as model:
        recipe = example.redteam_recipe(folder, "served", f"linear:{folder / 'judge.npz'}", model)
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        result = CliRunner().invoke(app, ["redteam", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    out = folder / "redteam-served"
    completions = read_completions(out / "completions.jsonl")
    assert {completion.engine for completion in completions} == {"openai"}
    keys = {completion.key for completion in completions}
    assert len(keys) == len(completions) == sum(PROMPTS.values()) * example.SAMPLES
    # It samples: most prompts get several answers, most of which are well-formed.
    distinct = {(completion.prompt_id, completion.text) for completion in completions}
    num_texts = Counter(prompt for prompt, _ in distinct)
    assert sum(count > 1 for count in num_texts.values()) > len(num_texts) / 2
    well_formed = sum(verdict.malformed is False for verdict in Oracle("shared").judge(completions))
    assert well_formed > len(completions) / 2
    metadata = json.loads((out / "redteam.json").read_text())
    assert metadata["faults"] == {}
    _, pairs = load_pairs(Source(path=str(out / "pairs.jsonl")), "main")
    assert 0 < len(pairs) < 140
    assert {pair.cell for pair in pairs} <= set(CELLS)
    assert len({pair.cell for pair in pairs}) > 1
    # A run trains on the pairs without changes.
    example.run_once(example.redteam_train(folder, "served", out / "pairs.jsonl", 0))
    assert json.loads((folder / "trained-served" / "run.json").read_text())["recipe"]["trainer"]["max_steps"] == 8


def test_two_rounds_generate_and_train(finished_circle):
    folder, _ = finished_circle
    recipe = example.redteam_recipe(
        folder, "rounds", f"linear:{folder / 'judge.npz'}", {"path": str(folder / "base")}
    )
    train = example.redteam_train(folder, "unused", folder / "unused.jsonl", 0).model_dump()
    train["trainer"] |= {"max_steps": 4}
    rounds = recipe.model_copy(update={"rounds": 2, "train": {name: train[name] for name in ("text", "trainer")}})
    first, second = example.run_redteam(rounds)
    out = folder / "redteam-rounds"
    models = {
        file.parent.name: {completion.model for completion in read_completions(file)}
        for file in out.rglob("completions.jsonl")
    }
    assert models == {"round-1": {str(folder / "base")}, "round-2": {str(out / "round-1" / "model")}}
    assert json.loads((out / "round-1" / "model" / "run.json").read_text())["recipe"]["trainer"]["max_steps"] == 4
    prompts = [{pair.prompt for pair in load_pairs(Source(path=str(file)), "main")[1]} for file in (first, second)]
    assert len(prompts[0] & prompts[1]) > 0
    # The trained model's answers differ.
    texts = [
        {(completion.key, completion.text) for completion in read_completions(file.parent / "completions.jsonl")}
        for file in (first, second)
    ]
    assert texts[0] != texts[1]
