"""The step benchmark: its counts, its steps, and the agreement of the docs with its results file."""

import copy
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig

from bfpo.core.files import write_json
from bfpo.model.lora import add_adapter

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "step_speed.py"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "benchmarks/results/step_speed.json").read_text())


def synthetic_table(count):
    from speed.data import PROFILES, synthetic_pairs

    return synthetic_pairs(PROFILES["pku"], count, np.random.default_rng(0))


def test_docs_agree_with_the_results(results):
    from speed.report import with_results

    page = (ROOT / "docs/performance.md").read_text()
    assert with_results(page, results) == page


def test_the_profile_on_the_page_is_that_of_its_results():
    from speed.report import with_section
    from step_profile import as_table, kind_of

    results = json.loads((ROOT / "benchmarks/results/step_profile.json").read_text())
    page = (ROOT / "docs/performance.md").read_text()
    assert with_section(page, "profile", as_table(results)) == page
    kinds = results["seconds_by_kind"]
    assert 0.7 < (kinds["matrix products"] + kinds["attention"]) / sum(kinds.values()) < 0.8
    names = ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::mm", "aten::mul")
    assert [kind_of(name).split()[0] for name in names] == ["attention", "matrix", "element-wise"]


def test_a_slower_step_misses_its_target(results):
    from speed.report import HH, targets_table

    slower = copy.deepcopy(results)
    seconds = slower["groups"][HH]["seconds"]
    # Half of the target, 3.8 times as fast.
    seconds["bfpo"] = [trl_seconds / 1.9 for trl_seconds in seconds["TRL"]]
    line = next(line for line in targets_table(slower).splitlines() if "≥ 3.8" in line)
    assert "| 1.90 (1.90 to 1.90), n = 7 | missed by 50% |" in line


def test_useful_tokens_and_operations_by_hand():
    from speed.floor import num_tokens, useful_flops
    from speed.variants import SHAPES, VARIANTS, new_model

    table, shape = synthetic_table(3), SHAPES["tiny"]
    model = new_model(shape, VARIANTS["bfpo"])
    tokens = scored = attended = 0
    for prompt, (chosen, rejected) in (table[0], table[2]):
        for length, prefix in ((len(prompt), 0), (len(chosen) - 1, len(prompt)), (len(rejected) - 1, len(prompt))):
            tokens += length
            attended += sum(prefix + position + 1 for position in range(length))
        scored += len(chosen) + len(rejected)
    mlp = shape.hidden * shape.feed_forward
    body, head = 4 * shape.hidden**2 + 3 * mlp, shape.hidden * shape.vocabulary
    assert num_tokens(table, [0, 2]) == tokens
    full = 8 * body * tokens + 8 * head * scored + 16 * shape.hidden * attended
    assert useful_flops(model, table, [0, 2]) == full
    for name, weight in model.named_parameters():
        weight.requires_grad_("down_proj" in name)
    selective = (6 * body + 2 * mlp) * tokens + 6 * head * scored + 16 * shape.hidden * attended
    assert useful_flops(model, table, [0, 2]) == selective
    add_adapter(model, LoraConfig(r=3, target_modules=["down_proj"], task_type="CAUSAL_LM"), seed=0)
    adapter = 3 * (shape.feed_forward + shape.hidden)
    with_adapter = (6 * body + 6 * adapter) * tokens + 6 * head * scored + 16 * shape.hidden * attended
    assert useful_flops(model, table, [0, 2]) == with_adapter


@pytest.mark.filterwarnings("ignore")  # warnings of TRL
def test_both_trainers_step_on_the_same_batches(monkeypatch):
    pytest.importorskip("trl")
    import trl.trainer.utils
    from speed import measure
    from speed.measure import Group, measure_together
    from speed.variants import SHAPES

    monkeypatch.setitem(SHAPES, "toy", SHAPES["tiny"]._replace(hidden=16, feed_forward=16, vocabulary=8192))
    # Before each timing, a quarter of a second in a large test process.
    monkeypatch.setattr(measure.gc, "collect", lambda: None)
    use_triton = trl.trainer.utils._use_triton
    variants = ("TRL, completion-only head", "bfpo, padded", "bfpo")
    group = Group("pku", "toy", 2, variants, rounds=1, keeps_memory=False)
    table = synthetic_table(2)
    result = measure_together(group, table)
    assert trl.trainer.utils._use_triton is use_triton  # the head is forced within a step only
    assert all(len(seconds) == 1 and min(seconds) > 0 for seconds in result["seconds"].values())
    longest = max(prompt + max(completions) for prompt, *completions in table.lengths)
    assert result["padded_slots"] == [4 * longest]
    assert result["useful_flops"]["bfpo"] == result["useful_flops"]["TRL, completion-only head"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["TRL", "TRL, completion-only head"])
def test_the_forced_head_scores_completion_tokens_only(name, monkeypatch):
    pytest.importorskip("trl")
    from speed.variants import SHAPES, VARIANTS, make_step

    table, num_scored, mm = synthetic_table(2), set(), torch.mm

    def record_mm(states, weight, **options):
        num_scored.add(len(states))
        return mm(states, weight, **options)

    step, _ = make_step(VARIANTS[name], SHAPES["tiny"], table, batch_size=2)
    monkeypatch.setattr(torch, "mm", record_mm)  # only the head calls it by name
    step([0, 1])
    slots = 4 * (int((table.lengths[:, :1] + table.lengths[:, 1:]).max()) - 1)
    completion_tokens = int(table.lengths[:, 1:].sum())
    assert num_scored == {completion_tokens if VARIANTS[name].compact_head else slots}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_memory_counts_the_gradients():
    pytest.importorskip("trl")
    from speed.measure import Group, measure_memory
    from speed.variants import SHAPES

    group = Group("pku", "9M", 2, ("bfpo",), rounds=1)
    memory = measure_memory(group, synthetic_table(2))["bfpo"]
    shape = SHAPES["9M"]
    weights = shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.feed_forward)
    weights += 2 * shape.hidden * shape.vocabulary
    assert memory["peak_mib"] > 4 * weights / 2**20  # one float32 per weight
    assert memory["static_mib"] > 4 * 4 * weights / 2**20  # policy, reference, two moments


def test_interrupted_results_are_resumed_on_the_same_code_only(tmp_path, capsys):
    import step_speed

    path = tmp_path / "results.json"
    results = step_speed.load_results(path, "command")
    step_speed.add_result(path, results, "groups", "a group", {"seconds": {}})
    assert step_speed.load_results(path, "command")["groups"] == {"a group": {"seconds": {}}}
    write_json(path, results | {"source": "another commit"})
    assert step_speed.load_results(path, "command")["groups"] == {}
    assert "starting over" in capsys.readouterr().out


def test_the_start_up_on_the_page_is_that_of_its_benchmark():
    import startup

    results = json.loads(startup.RESULT.read_text())
    page = startup.PAGE.read_text()
    assert startup.with_table(page, results) == page, "run python benchmarks/startup.py"
    assert results["after"]["bfpo --help"]["median"] <= 0.4
    assert results["after"]["bfpo env"]["median"] < results["before"]["bfpo env"]["median"] / 3


def test_generation_is_as_fast_as_its_page_says():
    results = json.loads((ROOT / "benchmarks/results/generation_speed.json").read_text())
    page = (ROOT / "docs/generation.md").read_text()
    assert [*results["measured"]] == ["mixed", "equal"]
    for cell in results["measured"].values():
        ratios = sorted(round_["cpu_ratio"] for round_ in cell["rounds"])
        assert cell["median_cpu_ratio"] == ratios[len(ratios) // 2] >= cell["target"]
        rates = (round_["tokens_per_cpu_second"] for round_ in cell["rounds"])
        engine, generate = zip(*((rate["engine"], rate["generate"]) for rate in rates), strict=True)
        columns = (
            f"{min(engine):.0f} to {max(engine):.0f}",
            f"{min(generate):.0f} to {max(generate):.0f}",
            f"{cell['median_cpu_ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), n = {len(ratios)}",
            f"≥ {cell['target']}",
        )
        assert f"| {' | '.join(columns)} |" in page
    cells = results["measured"].values()
    # 1.615 is a little less in binary.
    medians = " and ".join(f"{cell['median_wall_ratio'] + 1e-9:.2f}" for cell in cells)
    wall = [round_["wall_ratio"] for cell in cells for round_ in cell["rounds"]]
    assert f"By the clock the medians were {medians}, with rounds from {min(wall):.2f} to {max(wall):.2f}." in page


def test_the_transfer_of_the_linear_judge_in_the_docs_is_the_result():
    from judge_transfer_study import make_table

    results = json.loads((ROOT / "benchmarks/results/judge_transfer.json").read_text())["results"]
    assert make_table(results) in (ROOT / "docs/judging.md").read_text()
    # Fitted on XSTest and judging GPTFuzz, the numbers of the text below the table.
    (result,) = [row for row in results if (row["fitted_on"], row["judged"]) == (["xstest"], "gptfuzz")]
    unsafe = [result[rule]["unsafe"] for rule in ("without_rule", "with_rule")]
    text = "calls {:,} of {:,} unsafe answers of GPTFuzz safe without it, and {:,} with it"
    page = " ".join((ROOT / "docs/judging.md").read_text().split())
    assert text.format(unsafe[0]["called_safe"], unsafe[0]["answers"], unsafe[1]["called_safe"]) in page


def test_the_linear_judge_is_as_fast_as_the_docs_say():
    results = json.loads((ROOT / "benchmarks/results/judge_speed.json").read_text())
    page = " ".join((ROOT / "docs/judging.md").read_text().split())
    before, after = (results["cpu_seconds"][name]["fit"][0] for name in ("before", "after"))
    rates = results["answers_per_cpu_second"]
    assert before > 2 * after
    assert f"{after:.0f} CPU seconds for the 2,250 answers of XSTest, its quality included" in page
    assert f"{round(rates['after'], -2):,} answers per CPU second" in page
    assert results["file_of_the_earlier_version"]["verdicts_are_bit_identical"]
    assert max(results["greatest_difference_of_the_two_fits"].values()) < 5e-4


def test_a_threshold_is_met_by_the_value_and_more_strictly_by_the_interval():
    from threshold_study import compare

    policy = {"state": "active", "achieved": [0.05, 0.04, 0.07]}
    assert compare(policy, 0.05) == {"is_met": True, "is_met_with_interval": False, "is_missed_with_interval": False}
    assert compare(policy, 0.07)["is_met_with_interval"]
    assert compare(policy, 0.03)["is_missed_with_interval"]
    assert compare({"state": "infeasible"}, 0.03) == {}


def test_the_optimum_is_extrapolated_from_two_sets_of_samples(tmp_path):
    from threshold_study import optimum

    from bfpo.constraints.samples import read_scored_samples
    from bfpo.constraints.solve import ConstraintRequest, solve_constraint
    from bfpo.core.files import write_jsonl

    def write(name, seed, samples):
        path, rng, rows = tmp_path / f"{name}.jsonl", np.random.default_rng(seed), []
        for prompt in range(40):
            for sample in range(samples):
                cost = float(rng.random() < 0.6) - 0.5
                reward = cost + float(rng.normal())
                row = {"prompt_id": f"harmful-{prompt}", "sample": sample, "reward": reward, "cost": cost}
                rows.append(row | {"kind": "harmful"})
        write_jsonl(path, rows)
        return path

    first, second, many = write("first", 0, 12), write("second", 1, 12), write("many", 2, 200)
    request = ConstraintRequest(max=0.05, kind="harmful", beta=0.5)
    dual = solve_constraint(read_scored_samples(first), request)
    truth = optimum(dual, request, many, many)
    # Twelve samples are off by more than the extrapolation from two sets of twelve.
    assert abs(optimum(dual, request, first, second) - truth) < abs(dual.achieved - truth)


def test_the_page_tells_what_was_measured_around_the_step():
    def result(name):
        return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())

    page = (ROOT / "docs" / "performance.md").read_text()
    section = page[page.index("## Around the step") : page.index("## On a GPU")]
    generation, judge, report = result("generation_speed")["measured"], result("judge_speed"), result("report_speed")
    ratios = [generation[name]["median_cpu_ratio"] for name in ("mixed", "equal")]
    assert f"{ratios[0]:.2f} / {ratios[1]:.2f} times the tokens" in section
    per_second = judge["answers_per_cpu_second"]
    assert f"{judge['answers']:,} answers of XSTest" in section
    assert f"{per_second['after']:,} answers a CPU second |" in section
    judging = (ROOT / "docs" / "judging.md").read_text()
    assert f"fits the `linear` judge in {judge['cpu_seconds']['after']['fit'][0]:.0f} CPU seconds" in judging
    assert f"about {round(per_second['after'], -2):,} answers per CPU second" in judging
    assert f"page of {report['runs']} runs of {report['prompts']:,} prompts" in section
    seconds, peak = statistics.median(report["cpu_seconds"]), report["peak_bytes"] / 2**20
    assert f"{seconds:.0f} CPU seconds, {peak:.0f} MiB" in section
    boot = result("bootstrap_speed")
    ours, scipy = (statistics.median(boot["cpu_seconds"][name]) for name in ("bfpo", "scipy"))
    assert f"{boot['prompts']:,} prompts, {boot['resamples']:,} resamples" in section
    assert f"| {ours:.2f} CPU seconds | scipy's, vectorized: {scipy:.2f} |" in section
