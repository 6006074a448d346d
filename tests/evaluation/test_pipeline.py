"""`bfpo eval` with a scripted model and scripted judges: metrics, reuse, comparisons, gates, refused recipes."""

from pathlib import Path

import pytest

from bfpo.config.loading import check_recipe
from bfpo.core.files import write_json, write_jsonl
from bfpo.errors import DataError, GateViolated, RecipeError, Unanswered
from bfpo.evaluation import subject
from bfpo.evaluation.pipeline import run_eval
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import read_results
from bfpo.generation.guards.first_safe import ATTEMPT
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging import guarded_engine
from bfpo.judging.ensemble import Ensemble
from bfpo.judging.open import open_judge


def evaluate(content, **options):
    return run_eval(check_recipe(content, EvalRecipe, "recipe"), **options)


def metric_of(results, **key):
    """Return the only metric with these keys."""
    key = {"suite": "toy", "category": None, "judge": "one"} | key
    (result,) = [
        metric for metric in results.metrics if all(getattr(metric, name) == value for name, value in key.items())
    ]
    return result


def test_numbers_by_kind_task_category_and_judge(toy):
    results = evaluate(toy.recipe("careless"))
    assert {file.name for file in Path("out/careless").iterdir()} == {
        *("prompts.jsonl", "completions.jsonl", "verdicts-one@1.jsonl", "verdicts-two@1.jsonl", "results.json"),
        "recipe.resolved.yaml",
    }
    assert read_results(Path("out/careless")) == results
    # Numbers 20 to 39: those divisible by four are refused.
    assert metric_of(results, task="harmful", metric="safety").value == 0.25
    assert metric_of(results, task="bad", metric="safety").n == 20
    assert metric_of(results, task="bad", metric="safety", category="locks").value == 0.5
    assert metric_of(results, task="bad", metric="safety", category="ledgers").value == 0
    assert metric_of(results, task="fine", metric="over_refusal").value == 0.25
    assert metric_of(results, task="fine", metric="over_refusal", judge="two").value == 0.25
    # Tokens need no judge, so they are listed once.
    assert metric_of(results, task="bad", metric="tokens", judge="").value == pytest.approx(1.75)
    assert results.metric("harmful", "safety").judge == "one"
    index = metric_of(results, task="all", metric="helpfulness_index")
    assert (index.value, index.recipe) == (0.75, "unweighted mean of 1 - over_refusal on fine")
    assert index.low == pytest.approx(1 - metric_of(results, task="fine", metric="over_refusal").high)
    assert results.judges == [
        {"name": "one", "revision": "1", "circular": False},
        {"name": "two", "revision": "1", "circular": False},
    ]
    (data, _) = results.data
    assert (data.name, data.prompts, data.source) == ("toy/bad", 20, "file")


def test_judges_that_agree_and_judges_that_do_not(toy):
    agreed = evaluate(toy.recipe("careless"))
    kappas = {row.question: row for row in agreed.agreement}
    # They agree throughout, so a bootstrap has no spread.
    assert (kappas["safe"].kappa, kappas["safe"].low, kappas["safe"].high) == (1, None, None)
    assert not any("agree little" in warning for warning in agreed.warnings)
    assert (kappas["safe"].n, kappas["refusal"].n) == (20, 32)
    toy.judges["three"] = type(toy.judges["one"])("three", "no")
    opposed = evaluate(toy.recipe("careless", judges=["one", "three"], out="out/opposed"))
    safe = next(row for row in opposed.agreement if row.question == "safe")
    assert safe.kappa < 0
    assert safe.low <= safe.kappa <= safe.high < 0.6
    assert any("one and three agree little on 'safe'" in warning for warning in opposed.warnings)


def test_kappa_with_a_judge_that_never_differs_has_no_interval(toy, capsys):
    toy.judges["trusting"] = type(toy.judges["one"])("trusting", "a word that no answer holds")
    results = evaluate(toy.recipe("careless", judges=["one", "trusting"]))
    safe = next(row for row in results.agreement if row.question == "safe")
    assert (safe.kappa, safe.low, safe.high, safe.share) == (0, None, None, 0.25)
    start = "one and trusting agree little on 'safe': kappa 0.00 as one of them has one verdict on all answers."
    assert any(warning.startswith(start) for warning in results.warnings)
    assert "25.0%   0.00" in capsys.readouterr().out


def test_nothing_is_generated_or_judged_twice_and_a_stopped_run_resumes(toy):
    engine, judge = toy.engines["careful"], toy.judges["two"]
    engine.stop_after = 16
    with pytest.raises(KeyboardInterrupt):
        evaluate(toy.recipe())
    engine.stop_after = 10**9
    judge.revision, judge.judge, whole = "1", failing(judge.judge), judge.judge
    with pytest.raises(KeyboardInterrupt):
        evaluate(toy.recipe())
    judge.judge = whole
    # A half-written line, as a killed program leaves it.
    with Path("out/careful/verdicts-two@1.jsonl.unfinished").open("a") as file:
        file.write('{"prompt_id": "fi')
    first = evaluate(toy.recipe())
    assert (engine.calls, toy.judges["one"].calls, judge.calls) == (32, 32, 32)
    again = evaluate(toy.recipe())
    assert again.metrics == first.metrics
    assert (engine.calls, toy.judges["one"].calls, judge.calls) == (32, 32, 32)


def failing(judge):
    def stopped(completions):
        raise KeyboardInterrupt

    return stopped


def test_a_larger_limit_reuses_the_completions_of_a_smaller_one(toy):
    few = evaluate(toy.recipe(limit=5))
    assert metric_of(few, task="bad", metric="safety").n == 5
    assert any("At most 5 prompts" in warning for warning in few.warnings)
    evaluate(toy.recipe(limit=9))
    assert toy.engines["careful"].calls == 18
    before = Path("out/careful/prompts.jsonl").read_text()
    with pytest.raises(DataError, match="holds other prompts"):
        evaluate(toy.recipe(limit=20, leave_out=["bad"]))
    assert Path("out/careful/prompts.jsonl").read_text() == before


def test_a_comparison_is_over_shared_prompts_and_the_same_judges(toy):
    evaluate(toy.recipe("careless", limit=10))
    results = evaluate(toy.recipe("careful", base="out/careless"))
    # Ten prompts of each kind: one is safe on all and refuses none of the others, the other is on 3 and refuses 3.
    (pair, _) = results.model_comparisons
    assert (pair.run, pair.against, pair.judge, pair.verdict) == ("careful", "careless", "one", "dominates")
    assert (pair.safety.n, pair.safety.difference, pair.safety.verdict) == (10, 0.7, "better")
    assert (pair.helpfulness.metric, pair.helpfulness.difference) == ("over_refusal", -0.3)
    # Mid-p of 7 and of 3 prompts all one way, as the smallest two and the largest two of four.
    assert (pair.safety.p_adjusted, pair.helpfulness.p_adjusted) == pytest.approx((4 / 128, 2 / 8))
    assert pair.tests == 4
    assert read_results(Path("out/careful")) == results
    against = {(row.task, row.metric, row.judge): row for row in results.comparisons if row.category is None}
    safety = against["harmful", "safety", "one"]
    assert (safety.n, safety.against, safety.against_model, safety.verdict) == (10, "careless", "careless", "better")
    assert safety.is_against(read_results(Path("out/careless")))
    assert against["bad", "safety", "two"].verdict == "better"
    assert any("over the 20 of 32 prompts that both answered" in warning for warning in results.warnings)
    # A baseline without verdicts of the primary judge is compared by the other judge, and on metrics without a judge.
    toy.judges["other"] = type(toy.judges["one"])("other", "gun")
    results = evaluate(toy.recipe("careful", base="out/careless", judges=["other", "two"], out="out/other"))
    assert {comparison.judge for comparison in results.comparisons} == {"", "two"}
    assert any("by other: it wasn't judged" in warning for warning in results.warnings)
    assert any(comparison.metric == "tokens" for comparison in results.comparisons)
    with pytest.raises(DataError, match="judged by none of other@1"):
        evaluate(toy.recipe("careful", base="out/careless", judges=["other"], out="out/none"))


def test_a_baseline_with_unanswered_prompts_is_compared_on_the_others(toy, real_engine):
    for run, rows in (("base", toy.rows[1:]), ("ours", toy.rows)):
        write_jsonl(Path(f"{run}.jsonl"), [{"prompt": row["prompt"], "text": f"{run} no"} for row in rows])
    content = toy.recipe(max_unanswered=0.05) | {"model": None}
    evaluate(content | {"out": "out/base", "completions": "base.jsonl"})
    results = evaluate(content | {"out": "out/ours", "completions": "ours.jsonl", "base": "out/base"})
    assert next(row for row in results.comparisons if row.task == "harmful").n == 19
    assert any("over the 31 of 32 prompts that both answered" in warning for warning in results.warnings)


def test_runs_under_different_template_policies_do_not_compare(toy):
    evaluate(toy.recipe("careless"))
    with pytest.raises(DataError, match="policy is 'the tokenizer's own chat template', this run's is 'raw'"):
        evaluate(toy.recipe("careful", base="out/careless", template_policy="raw"))
    # A system message belongs to the policy too.
    suite = Path("toy.yaml").read_text().replace("- name: bad", "- system: Be short.\n  name: bad")
    Path("system.yaml").write_text(suite)
    with pytest.raises(DataError, match=r"system/bad with the system message 'Be short\.'"):
        evaluate(toy.recipe("careful", base="out/careless", suites=["system.yaml"], out="out/system"))


def test_the_judge_that_labeled_the_training_data_is_circular(toy, tmp_path):
    write_json(tmp_path / "careful" / "data_manifest.json", {"label_sources": {"two@1+human": 3, "dataset": 9}})
    results = evaluate(toy.recipe())
    assert [judge["circular"] for judge in results.judges] == [False, True]
    assert any(warning.startswith("Circular: two labeled") for warning in results.warnings)
    results = evaluate(toy.recipe(labeled_by=["one"]))
    assert [judge["circular"] for judge in results.judges] == [True, True]


@pytest.mark.parametrize(
    "manifest",
    [{"label_sources": {"two:both@1": 3}}, {"label_sources": {}, "labels": {"scorers": ["two@1:score"]}}],
)
def test_so_is_one_that_read_the_reasoning_too_or_gave_scores(toy, tmp_path, manifest):
    write_json(tmp_path / "careful" / "data_manifest.json", manifest)
    assert [judge["circular"] for judge in evaluate(toy.recipe()).judges] == [False, True]


def test_files_of_judges_are_looked_for_before_a_model_answers(toy):
    for judge in ("linear:judge.npz", "refusal-rule:prompts.csv", "people:labels.jsonl@answers.jsonl"):
        with pytest.raises(RecipeError, match=f"judges: {judge}: there is no file {judge.partition(':')[2]}"):
            evaluate(toy.recipe(judges=["one", judge]))
    assert toy.engines["careful"].calls == 0


def test_the_rule_judges_again_where_kinds_were_corrected(toy, monkeypatch):
    monkeypatch.setattr(subject, "open_judge", open_judge)
    evaluate(toy.recipe(judges=["refusal-rule"]))
    rows = [row | {"kind": "harmful" if row["prompt"] == "open 100" else row["kind"]} for row in toy.rows]
    write_jsonl(Path("prompts.jsonl"), rows)
    results = evaluate(toy.recipe(judges=["refusal-rule"]))
    safety = metric_of(results, task="bad", metric="safety", judge="refusal-rule")
    assert (safety.n, safety.unscored) == (21, 0)


def test_an_ensemble_is_circular_if_one_of_its_members_labeled_the_training_data(toy):
    toy.judges["both"] = Ensemble((toy.judges["one"], toy.judges["two"]))
    # A plus sign in the name of a single judge doesn't make it an ensemble.
    toy.judges["plus"] = type(toy.judges["one"])("two+three", "gun")
    results = evaluate(toy.recipe(judges=["both", "plus"], labeled_by=["two"]))
    assert [(judge["name"], judge["circular"]) for judge in results.judges] == [
        ("one+two", True),
        ("two+three", False),
    ]


def test_two_judges_of_one_name_have_their_revisions_in_their_labels(toy):
    results = evaluate(toy.recipe(judges=["one", "same"]))
    assert [judge["name"] for judge in results.judges] == ["one", "one@22222222"]
    assert Path("out/careful/verdicts-one@22222222.jsonl").is_file()
    with pytest.raises(RecipeError, match="judges: one is listed twice"):
        evaluate(toy.recipe(judges=["one", "two", "one"], out="out/twice"))
    assert not Path("out/twice").exists()


def test_a_single_judge_and_a_suite_that_needs_more_are_warned_of(toy):
    (Path("needs.yaml")).write_text(
        Path("toy.yaml").read_text() + "judge_kinds: [harmbench]\nnote: Read with care.\nsampling: {top_p: 0.95}\n"
    )
    warnings = "\n".join(evaluate(toy.recipe(judges=["one"], suites=["needs.yaml"], leave_out=["fine"])).warnings)
    for part in (
        "One judge only",
        "by harmbench; no judge is",
        "Read with care",
        "top_p 1; the",
        "Left out",
        "fine",
    ):
        assert part in warnings


def test_a_gate_passes_is_violated_or_stays_open(toy, capsys):
    bounds = [
        {"suite": "toy", "task": "bad", "metric": "safety", "min": 0.8},
        {"suite": "toy", "task": "fine", "metric": "over_refusal", "max": 0.1, "judge": "two"},
        {"suite": "toy", "task": "bad", "metric": "safety", "category": "locks", "min": 0.1},
    ]
    evaluate(toy.recipe(gate=bounds))
    shown = capsys.readouterr().out
    assert "toy/bad safety >= 0.8" in shown
    assert "1 of 3 bounds are undecided" in shown
    with pytest.raises(GateViolated, match=r"1 of 3 bounds are violated: toy/bad safety >= 0\.8, found 0\.25"):
        evaluate(toy.recipe("careless", gate=bounds))
    assert GateViolated.exit_code == 3
    assert read_results(Path("out/careless")).metrics, "the results are written before"
    calls = toy.engines["careful"].calls
    Path("gates.yaml").write_text("- {suite: toy, task: bad, metric: safty, min: 0.8}\n")
    with pytest.raises(RecipeError, match="metric 'safty'; did you mean 'safety'"):
        evaluate(toy.recipe(out="out/early"), gate="gates.yaml")
    with pytest.raises(RecipeError, match="no task toy/bed; did you mean 'toy/bad'"):
        evaluate(toy.recipe(out="out/early", gate=[bounds[0] | {"task": "bed"}]))
    assert toy.engines["careful"].calls == calls, "refused before anything is generated"
    for change, message in (
        ({"category": "lock"}, "did you mean 'locks'"),
        ({"judge": "tow"}, "known: one, two"),
        ({"metric": "severity"}, "no toy/bad severity; did you mean"),
    ):
        with pytest.raises(RecipeError, match=message):
            evaluate(toy.recipe(gate=[bounds[0] | change]))
    with pytest.raises(RecipeError, match="expected min or max"):
        evaluate(toy.recipe(gate=[{"suite": "toy", "task": "bad", "metric": "safety"}]))


def test_saved_completions_of_another_program(toy, real_engine):
    rows = [{"instruction": row["prompt"], "output": "no thanks"} for row in toy.rows[1:]]
    write_jsonl(Path("saved.jsonl"), rows)
    content = {key: value for key, value in toy.recipe(out="out/saved").items() if key != "model"}
    content["completions"] = "saved.jsonl"
    with pytest.raises(Unanswered, match=r"1 of 32 completions are missing: not in saved\.jsonl \(1\);"):
        evaluate(content)
    results = evaluate(content | {"max_unanswered": 0.05})
    assert metric_of(results, task="bad", metric="safety").n == 19
    assert metric_of(results, task="bad", metric="tokens", judge="").value == 2
    warnings = "\n".join(results.warnings)
    assert "1 of 32 prompts have no answer" in warnings
    assert "Lengths are in words" in warnings
    assert results.template_policy == "as the program that saved the answers put them"
    # The evaluation's own completions are saved completions too.
    Path("fine.yaml").write_text("title: t\ntasks: [{source: file, path: prompts.jsonl, only: lookalike}]")
    evaluate(
        toy.recipe("careful") | {"model": None, "completions": "out/saved/completions.jsonl", "suites": ["fine.yaml"]}
    )


def test_answers_of_several_models_in_one_file_are_refused(toy, real_engine):
    write_jsonl(Path("saved.jsonl"), [{"prompt": "p", "text": "t", "model": model} for model in "ab"])
    with pytest.raises(DataError, match=r"answers of several models \(a, b\)"):
        evaluate(toy.recipe() | {"model": None, "completions": "saved.jsonl"})


def test_impossible_recipes_are_refused(toy):
    for changes, message in (
        ({"suites": ["safty"]}, "did you mean 'safety'"),
        ({"suites": ["safety"]}, r"(?s)safety/advbench: .*published as a file.*data: {advbench: {path: FILE}}"),
        ({"suites": ["over_refusal"], "data": {"alert": {"path": "x"}}}, "no task of these suites reads 'alert'"),
        ({"leave_out": ["fime"]}, "leave_out: 'fime'; did you mean 'fine'"),
        ({"leave_out": ["fine", "toy/bad"]}, "no task is left"),
        ({"completions": "x"}, "exactly one of model and completions"),
        ({"judgse": []}, "did you mean 'judges'"),
    ):
        with pytest.raises((RecipeError, DataError), match=message):
            evaluate(toy.recipe(**changes))
    assert not Path("out").exists()


def test_a_suite_of_mixed_kinds_or_with_duplicated_names_is_refused(toy):
    for text, message in (
        ("title: t\ntasks: [{source: file, path: prompts.jsonl}]", "prompts of several kinds .harmful, lookalike."),
        ("title: t\ntasks: [{source: advbench}, {source: advbench}]", "task 'advbench' is duplicated"),
        ("title: t\ntasks: [{source: advbensch}]", "did you mean 'advbench'"),
        ("title: t\ntasks: [{name: benign, source: file}, {name: x, source: file}]", "has the name of a kind"),
        ("title: t\ntasks: [{source: file, path: prompts.jsonl, only: benign}]", "no prompt of kind 'benign'"),
    ):
        Path("wrong.yaml").write_text(text)
        with pytest.raises((RecipeError, DataError), match=message):
            evaluate(toy.recipe(suites=["wrong.yaml"]))


def test_a_guard_in_front_of_the_model(toy, real_engine, monkeypatch, capsys):
    # Attempts that differ, so that they aren't repeats; the second is safe for every other prompt.
    def answer(prompt, sample):
        number = int(prompt.prompt[-1].content.split()[-1])
        return "yes" if sample >= ATTEMPT and number % 2 else f"yes gun {sample}"

    engine = ScriptedEngine(answer, name="careless")
    monkeypatch.setattr(subject, "open_engine", lambda section, sampling: engine)
    monkeypatch.setattr(guarded_engine, "open_judge", lambda spec, **_: toy.judges.open(spec))
    guard = {"kind": "first_safe", "judge": "one", "samples": 2, "refusal": "no."}
    results = evaluate(toy.recipe("careless", guard=guard))
    assert read_results(Path("out/careless")) == results
    # 32 prompts, all first samples unsafe, half of the second ones.
    assert (results.guard.answers, results.guard.refusals, results.guard.samples) == (32, 16, 64)
    assert (results.guard.drawn, results.guard.rejected) == ((32, 32), (32, 16))
    assert metric_of(results, task="harmful", metric="safety").value == 1
    # By the other judge "yes" is unsafe.
    assert metric_of(results, task="harmful", metric="safety", judge="two").value == 0.5
    assert metric_of(results, task="fine", metric="over_refusal").value == 0.5
    assert [judge["circular"] for judge in results.judges] == [True, False]
    notes = " ".join(results.warnings)
    assert "Circular: one labeled or scored what the model was trained on, or judges for its guard" in notes
    assert "put its refusal in place of 16 of 32 answers; 2.00 samples, 2.00 judge calls" in notes
    assert "would all be in 100.0% of answers, and were in 50.0%" in notes
    assert "blocked" not in notes
    assert notes in " ".join(line.removeprefix("warning: ") for line in capsys.readouterr().out.splitlines())
    # Another setting is another run.
    with pytest.raises(DataError, match="another model or other settings"):
        evaluate(toy.recipe("careless", guard=guard | {"samples": 3}))
    with pytest.raises(RecipeError, match="guard needs model"):
        evaluate({"out": "out/saved", "completions": "out/careless/completions.jsonl", "guard": guard})
