"""`bfpo judge fit`, `run` and `eval`: their output, their files and how they resume."""

import json
from functools import partial

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from bfpo.commands import judge as commands
from bfpo.commands.app import app
from bfpo.core.conversation import user_says
from bfpo.core.files import content_hash, write_jsonl
from bfpo.core.samples import Completion, Verdict
from bfpo.data.stages import judge_completions
from bfpo.errors import DataError, RecipeError
from bfpo.judging import evaluate
from bfpo.judging.annotations import Annotation
from bfpo.judging.labeled import read_labeled
from bfpo.judging.linear import load_judge
from bfpo.judging.refusal_rule import RefusalRule
from bfpo.losses.label_errors import LabelErrors, read_label_errors
from bfpo.stats.agreement import BY_PROMPT, BY_WILSON, agreement, auroc, held_out_threshold, threshold_for
from bfpo.stats.intervals import wilson

from .test_linear import ANSWERS, PROMPTS, REFUSES

MORE = [*PROMPTS, *(f"{prompt} please" for prompt in PROMPTS)]


def write_labeled(path):
    """Write labeled answers of two models to each prompt; the second half of the answers is unsafe."""
    rows = [
        {"prompt": prompt, "text": text, "refusal": refuses, "safe": refuses or i % 4 == 1, "model": f"m{i % 2}"}
        for i, (prompt, text, refuses) in enumerate(zip(MORE, ANSWERS * 2, REFUSES * 2, strict=True))
    ]
    for row in rows[:8]:
        row["safe"] = None
    rows += [dict(row, safe=False, refusal=None, text=f"{row['text']} oh no") for row in rows]
    write_jsonl(path, rows)
    return rows


def hash_probability(*parts):
    return int(content_hash(*parts), 16) % 997 / 996


class HashJudge:
    """Judge with probabilities from a hash of the text; counts the answers that it judged."""

    def __init__(self, name, revision="1", *, fails_after=None, decides=True):
        self.name, self.revision, self.fails_after, self.decides = name, revision, fails_after, decides
        self.judged = 0

    def judge(self, completions):
        for completion in completions:
            if self.judged == self.fails_after:
                raise KeyboardInterrupt
            self.judged += 1
            if not self.decides:
                yield Verdict.on(completion, self, safe=None, reason=f"{self.judged} tokens; the judge reads 60")
                continue
            p = hash_probability(completion.text, self.name)
            refusal = "sorry" in completion.text
            yield Verdict.on(completion, self, safe=p >= 0.5, p_safe=p, refusal=refusal, p_refusal=p)


def run_evaluation(tmp_path, monkeypatch, *judges):
    by_name = {judge.name: judge for judge in judges}
    monkeypatch.setattr(evaluate, "open_judge", lambda spec, threshold, **_: by_name[spec])
    labeled, out = str(tmp_path / "labeled.jsonl"), tmp_path / "eval.json"
    evaluate.evaluate_judges(labeled, list(by_name), threshold=None, max_false_safe=0.1, out=out)
    return json.loads(out.read_text())


def test_the_results_have_the_rates_that_a_loss_corrects_labels_for(tmp_path, monkeypatch):
    rows = write_labeled(tmp_path / "labeled.jsonl")
    labels = {row["text"]: row["safe"] for row in rows}

    class MostlyRight(HashJudge):
        def judge(self, completions):
            for completion in completions:
                is_right = hash_probability(completion.text, self.name) < 0.9
                yield Verdict.on(completion, self, safe=labels[completion.text] is True and is_right)

    row = run_evaluation(tmp_path, monkeypatch, MostlyRight("right"))["judges"]["right"]["safe"]["all"]
    errors = read_label_errors(tmp_path / "eval.json")
    assert errors == LabelErrors(row["recall_yes"][0], row["recall_no"][0])
    assert errors.specificity == 1 > errors.sensitivity > 0.5
    run_evaluation(tmp_path, monkeypatch, HashJudge("chance"))
    with pytest.raises(RecipeError, match="may be no better than chance"):
        read_label_errors(tmp_path / "eval.json")


def test_both_questions_have_all_metrics(tmp_path, monkeypatch, capsys):
    rows = write_labeled(tmp_path / "labeled.jsonl")
    results = run_evaluation(tmp_path, monkeypatch, HashJudge("a"), HashJudge("b"))
    for question in ("safe", "refusal"):
        labeled = [row for row in rows if row[question] is not None]
        metrics = results["judges"]["a"][question]["all"]
        p = [hash_probability(row["text"], "a") for row in labeled]
        assert metrics["n"] == len(labeled) == sum(metrics["counts"].values())
        assert metrics["auroc"][0] == pytest.approx(roc_auc_score([row[question] for row in labeled], p))
        assert metrics["auroc"][1] < metrics["auroc"][0] < metrics["auroc"][2]
        assert metrics["calibration_error"] > 0
        assert metrics["interval"] == BY_PROMPT
        assert set(results["judges"]["a"][question]) == {"all", "m0", "m1"}
    (kappas,) = results["kappa"]
    assert kappas["judges"] == ["a", "b"]
    assert kappas["refusal"] == 1
    assert kappas["safe"] < 0.9
    threshold = results["judges"]["a"]["threshold"]
    assert threshold["chosen_on"] == "these labels"
    assert threshold["held_out"]["grouped_by"] == "prompt"
    output = capsys.readouterr().out
    assert "at most 10.0% of the unsafe answers pass; chosen on these labels" in output
    assert "on prompts held out from the choice (5 folds)" in output
    assert "Cohen's kappa of a and b" in output


def test_verdicts_are_kept_by_judge_and_revision(tmp_path, monkeypatch):
    rows = write_labeled(tmp_path / "labeled.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(tmp_path, monkeypatch, HashJudge("a"), HashJudge("b/c", fails_after=0))
    first, second = HashJudge("a"), HashJudge("b/c")
    results = run_evaluation(tmp_path, monkeypatch, first, second)
    assert (first.judged, second.judged) == (0, len(rows))
    again = HashJudge("a", fails_after=0), HashJudge("b/c", fails_after=0)
    assert run_evaluation(tmp_path, monkeypatch, *again) == results
    newer = HashJudge("a", "2")
    run_evaluation(tmp_path, monkeypatch, newer)
    assert newer.judged == len(rows)
    names = {path.name for path in (tmp_path / "eval-verdicts").iterdir()}
    assert names == {"verdicts-a@1.jsonl", "verdicts-a@2.jsonl", "verdicts-b-c@1.jsonl"}
    write_jsonl(tmp_path / "labeled.jsonl", [rows[0] | {"text": "another"}, *rows[1:]])
    with pytest.raises(DataError, match="is about another text"):
        run_evaluation(tmp_path, monkeypatch, newer)


def test_verdicts_of_earlier_versions_are_found(tmp_path, monkeypatch):
    write_labeled(tmp_path / "labeled.jsonl")
    results = run_evaluation(tmp_path, monkeypatch, HashJudge("b/c"))
    folder = tmp_path / "eval-verdicts"
    (folder / "verdicts-b-c@1.jsonl").rename(folder / "b-c@1.jsonl")
    again = HashJudge("b/c")
    renamed = run_evaluation(tmp_path, monkeypatch, again)["judges"]["b/c"]
    assert again.judged == 0
    assert renamed == results["judges"]["b/c"] | {"verdicts": str(folder / "b-c@1.jsonl")}
    assert len(list(folder.iterdir())) == 1


def test_a_label_under_few_prompts_has_a_wide_interval():
    labels, judged = [True] * 400 + [False], [True] * 401
    result = agreement(labels, judged, [0.9] * 401, [str(number % 200) for number in range(401)])
    recall, missed = result.recall_yes, result.recall_no
    assert recall == wilson(200, 200)
    assert missed == wilson(0, 1)
    value, low, high = result.balanced_accuracy
    assert value == 0.5
    # By hand: the margins of both recalls, squared and added.
    assert low == pytest.approx(0.5 - (1 - recall.low) / 2)
    assert high == pytest.approx(0.5 + missed.high / 2)
    assert high > 0.85
    assert result.auroc is None


def test_a_judge_that_never_decides_is_counted_and_the_run_ends(tmp_path, monkeypatch, capsys):
    rows = write_labeled(tmp_path / "labeled.jsonl")
    never = HashJudge("never", decides=False)
    results = run_evaluation(tmp_path, monkeypatch, never, HashJudge("a"))
    metrics = results["judges"]["never"]["safe"]["all"]
    assert metrics["undecided"] == metrics["n"] > 0
    assert sum(metrics["counts"].values()) == 0
    names = ("accuracy", "balanced_accuracy", "recall_yes", "auroc", "kappa")
    assert [metrics[name] for name in names] == [None] * 5
    assert results["kappa"] == [{"judges": ["never", "a"], "refusal": None, "safe": None}]
    assert "threshold" not in results["judges"]["never"]
    # The same in `judge run`: reasons that differ in a number only are counted together.
    monkeypatch.setattr(commands, "open_judge", lambda spec, threshold, **_: never)
    answers = [
        Completion(f"p{i}", 0, user_says("q"), row["text"], "stop", 1, 1, "m", "e", "h") for i, row in enumerate(rows)
    ]
    write_jsonl(tmp_path / "c.jsonl", [answer.to_row() for answer in answers])
    commands.run_judge(tmp_path / "c.jsonl", "never", tmp_path / "v.jsonl", threshold=None)
    output = capsys.readouterr().out
    assert f"0 safe, 0 unsafe, {len(rows)} undecided" in output
    assert f"undecided {len(rows)}: N tokens; the judge reads N" in output


def test_intervals_are_over_prompts_where_a_prompt_has_several_answers():
    # Twenty prompts with five equal answers each are no more evidence than twenty answers.
    labels, judged = [True] * 100, [i % 2 == 0 for i in range(20) for _ in range(5)]
    none = [None] * 100
    separate = agreement(labels, judged, none, [str(i) for i in range(100)])
    clustered = agreement(labels, judged, none, [str(i) for i in range(20) for _ in range(5)])
    assert (separate.interval, clustered.interval) == (BY_WILSON, BY_PROMPT)
    widths = [result.recall_yes.high - result.recall_yes.low for result in (separate, clustered)]
    assert widths[1] > 2 * widths[0]
    never_wrong = agreement(labels, labels, none, [str(i) for i in range(20) for _ in range(5)])
    for interval in (never_wrong.recall_yes, never_wrong.accuracy):
        assert interval.low == pytest.approx(20 / (20 + 1.96**2), abs=1e-4)


def test_the_area_is_sklearns_and_its_interval_is_over_prompts():
    rng = np.random.default_rng(0)
    p = rng.integers(0, 12, 300) / 11
    y = rng.random(300) < p
    separate = auroc(y, p, [str(i) for i in range(300)])
    assert separate.value == pytest.approx(roc_auc_score(y, p))
    together = auroc(np.tile(y, 4), np.tile(p, 4), [str(i) for i in range(300)] * 4)
    assert together.high - together.low == pytest.approx(separate.high - separate.low, rel=0.15)


def test_a_threshold_is_evaluated_on_held_out_prompts():
    rng = np.random.default_rng(1)
    # Twelve prompts, each with its own level: on the labels that it is chosen on a threshold looks better than it is.
    prompts = [f"p{i}" for i in range(12) for _ in range(10)]
    p = [float(level) for level in np.repeat(rng.random(12), 10) + rng.normal(0, 0.01, 120)]
    unsafe = [i % 10 < 7 for i in range(120)]
    threshold = threshold_for(unsafe, p, 0.1)
    in_sample = sum(q >= threshold for q, bad in zip(p, unsafe, strict=True) if bad) / sum(unsafe)
    assert in_sample <= 0.1
    held_out = held_out_threshold(unsafe, p, prompts, 0.1)
    assert held_out.false_safe.value > in_sample
    assert held_out.false_safe.low < held_out.false_safe.value < held_out.false_safe.high
    assert held_out.true_safe is not None
    assert held_out_threshold(unsafe[:40], p[:40], prompts[:40], 0.1) is None


def test_no_threshold_is_chosen_without_unsafe_answers():
    # Every fifth prompt is unsafe: folds by the order of the prompts would have all of them in one.
    unsafe = [number % 5 == 0 for number in range(50)]
    held_out = held_out_threshold(unsafe, [0.1 if bad else 0.9 for bad in unsafe], [f"p{i}" for i in range(50)], 0.1)
    assert (held_out.false_safe.value, held_out.true_safe.value) == (0, 1)


def test_labels_of_answers_of_several_models_in_one_file(tmp_path):
    """The answers of two models to a prompt have one number; a hash of the text tells them apart."""
    answers = [
        Completion("p", 0, user_says("open it"), text, "stop", 1, 1, model, "e", "h")
        for text, model in (("I can't.", "a"), ("Turn it.", "b"))
    ]
    write_jsonl(tmp_path / "completions.jsonl", [answer.to_row() for answer in answers])
    labels = [
        Annotation("p", 0, answer.text_hash, label, None, "r", "person")
        for answer, label in zip(answers, ("safe", "unsafe"), strict=True)
    ]
    write_jsonl(tmp_path / "labels.jsonl", [label.to_row() for label in labels])
    read = read_labeled(str(tmp_path / "labels.jsonl"))
    assert [(answer.completion.model, answer.safe) for answer in read] == [("a", True), ("b", False)]
    assert len({answer.completion.key for answer in read}) == 2
    with pytest.raises(DataError, match=r"two completions are \('p', 0\); judge the completions of each model by"):
        judge_completions(RefusalRule(), answers, tmp_path / "v.jsonl")


def test_the_commands_fit_run_and_evaluate(tmp_path):
    write_labeled(tmp_path / "labeled.jsonl")
    answer = Completion("p", 0, user_says(PROMPTS[0]), "I can't help with that.", "stop", 1, 1, "m", "e", "h")
    write_jsonl(tmp_path / "c.jsonl", [answer.to_row()])
    judge, call = tmp_path / "judge.npz", partial(CliRunner().invoke, app)
    outputs = []
    for arguments in (
        ["fit", tmp_path / "labeled.jsonl", "--out", judge, "--doubt", "0.2"],
        ["run", tmp_path / "c.jsonl", "--judge", f"linear:{judge}", "--out", tmp_path / "v.jsonl"],
        ["eval", tmp_path / "labeled.jsonl", "--judge", f"linear:{judge}", "--out", tmp_path / "e.json"],
    ):
        result = call(["judge", *map(str, arguments)])
        assert result.exit_code == 0, (result.output, result.exception)
        outputs.append(result.output)
    assert json.loads((tmp_path / "v.jsonl").read_text())["refusal"] is True
    results = json.loads((tmp_path / "e.json").read_text())["judges"][f"linear:{judge}"]
    assert results["refusal"]["all"]["accuracy"][0] == 1
    assert set(results["refusal"]) == {"all", "m0", "m1"}
    card = json.loads((tmp_path / "judge.card.json").read_text())
    assert card["revision"] == load_judge(judge).revision
    assert card["undecided_band"] == [0.2, 0.8]
    assert card["fitted_on"]["prompts"] == 24
    assert card["fitted_on"]["labels"]["refusal"] == {"true": 24, "false": 24}
    assert card["quality"]["refusal"]["all"]["n"] == 48
    # On held-out prompts it isn't as good on safety as on its training prompts.
    fitted, held_out = (metrics["safe"]["all"]["counts"] for metrics in (results, card["quality"]))
    assert held_out != fitted
    assert "on held-out prompts" in outputs[0]


def test_too_few_answers_to_evaluate_on_held_out_prompts_are_reported(tmp_path, capsys):
    rows = [
        {"prompt": f"{prompt} {i}", "text": text, "refusal": refuses}
        for i, (prompt, text, refuses) in enumerate(zip(PROMPTS, ANSWERS, REFUSES, strict=True))
    ][:20]
    write_jsonl(tmp_path / "few.jsonl", rows)
    commands.fit_judge([str(tmp_path / "few.jsonl")], tmp_path / "judge.npz")
    assert json.loads((tmp_path / "judge.card.json").read_text())["quality"] == {"refusal": None}
    assert "refusal: too few answers" in capsys.readouterr().out
