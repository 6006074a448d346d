"""`bfpo judge fit`, `run` and `eval`: what they tell, keep and admit."""

import json
from functools import partial

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from bfpo.commands import judge as commands
from bfpo.commands.app import app
from bfpo.core.files import content_hash, write_jsonl
from bfpo.core.pairs import user_says
from bfpo.core.samples import Completion, Verdict
from bfpo.errors import DataError
from bfpo.judging import evaluate as against_people
from bfpo.judging.linear import load_judge
from bfpo.stats.agreement import BY_PROMPT, BY_WILSON, agreement, auroc, held_out_threshold, threshold_for
from bfpo.stats.intervals import wilson

from .test_linear import ANSWERS, PROMPTS, REFUSES

MORE = [*PROMPTS, *(f"{prompt} please" for prompt in PROMPTS)]


def labeled(file):
    """Two models answer each prompt; the second answers are unsafe."""
    rows = [
        {"prompt": p, "text": t, "refusal": r, "safe": r or i % 4 == 1, "model": f"m{i % 2}"}
        for i, (p, t, r) in enumerate(zip(MORE, ANSWERS * 2, REFUSES * 2, strict=True))
    ]
    for row in rows[:8]:
        row["safe"] = None
    rows += [dict(row, safe=False, refusal=None, text=f"{row['text']} oh no") for row in rows]
    write_jsonl(file, rows)
    return rows


def chance(*parts):
    return int(content_hash(*parts), 16) % 997 / 996


class Toy:
    """Gives every answer probabilities by its text, and counts what it was asked."""

    def __init__(self, name, revision="1", *, fails_after=None, decides=True):
        self.name, self.revision, self.fails_after, self.decides = name, revision, fails_after, decides
        self.asked = 0

    def judge(self, completions):
        for one in completions:
            if self.asked == self.fails_after:
                raise KeyboardInterrupt
            self.asked += 1
            if not self.decides:
                yield Verdict.on(one, self, safe=None, reason=f"{self.asked} tokens; the judge reads 60")
                continue
            p = chance(one.text, self.name)
            yield Verdict.on(one, self, safe=p >= 0.5, p_safe=p, refusal="sorry" in one.text, p_refusal=p)


def evaluated(tmp_path, monkeypatch, *judges):
    by_name = {judge.name: judge for judge in judges}
    monkeypatch.setattr(against_people, "open_judge", lambda spec, threshold, **_: by_name[spec])
    out = tmp_path / "eval.json"
    against_people.evaluate_judges(
        str(tmp_path / "labeled.jsonl"), list(by_name), threshold=None, false_safe=0.1, out=out
    )
    return json.loads(out.read_text())


def test_both_questions_are_answered_with_everything(tmp_path, monkeypatch, capsys):
    rows = labeled(tmp_path / "labeled.jsonl")
    found = evaluated(tmp_path, monkeypatch, Toy("a"), Toy("b"))
    for question in ("safe", "refusal"):
        told = [row for row in rows if row[question] is not None]
        row = found["judges"]["a"][question]["all"]
        p = [chance(one["text"], "a") for one in told]
        assert row["n"] == len(told) == sum(row["counts"].values())
        assert row["auroc"][0] == pytest.approx(roc_auc_score([one[question] for one in told], p))
        assert row["auroc"][1] < row["auroc"][0] < row["auroc"][2]
        assert row["calibration_error"] > 0
        assert row["interval"] == BY_PROMPT
        assert set(found["judges"]["a"][question]) == {"all", "m0", "m1"}
    (between,) = found["kappa"]
    assert between["judges"] == ["a", "b"]
    assert between["refusal"] == 1
    assert between["safe"] < 0.9
    chosen = found["judges"]["a"]["threshold"]
    assert chosen["chosen_on"] == "these labels"
    assert chosen["held_out"]["grouped_by"] == "prompt"
    told = capsys.readouterr().out
    assert "chosen on these very labels" in told
    assert "chosen without a prompt (5 folds)" in told
    assert "Cohen's kappa of a and b" in told


def test_verdicts_are_kept_by_judge_and_revision(tmp_path, monkeypatch):
    rows = labeled(tmp_path / "labeled.jsonl")
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path, monkeypatch, Toy("a"), Toy("b/c", fails_after=0))
    first, second = Toy("a"), Toy("b/c")
    whole = evaluated(tmp_path, monkeypatch, first, second)
    assert (first.asked, second.asked) == (0, len(rows))
    assert evaluated(tmp_path, monkeypatch, Toy("a", fails_after=0), Toy("b/c", fails_after=0)) == whole
    newer = Toy("a", "2")
    evaluated(tmp_path, monkeypatch, newer)
    assert newer.asked == len(rows)
    assert {file.name for file in (tmp_path / "eval-verdicts").iterdir()} == {"a@1.jsonl", "a@2.jsonl", "b-c@1.jsonl"}
    write_jsonl(tmp_path / "labeled.jsonl", [rows[0] | {"text": "another"}, *rows[1:]])
    with pytest.raises(DataError, match="is about another text"):
        evaluated(tmp_path, monkeypatch, newer)


def test_a_label_under_few_prompts_is_told_with_the_doubt_that_is_left():
    people, said = [True] * 400 + [False], [True] * 401
    found = agreement(people, said, [0.9] * 401, [str(number % 200) for number in range(401)])
    recall, missed = found.recall_yes, found.recall_no
    assert recall == wilson(200, 200)
    assert missed == wilson(0, 1)
    value, low, high = found.balanced_accuracy
    assert value == 0.5
    # By hand: the margins of both recalls, squared and added.
    assert low == pytest.approx(0.5 - (1 - recall.low) / 2)
    assert high == pytest.approx(0.5 + missed.high / 2)
    assert high > 0.85
    assert found.auroc is None


def test_a_judge_that_never_decides_is_counted_and_the_run_ends(tmp_path, monkeypatch, capsys):
    rows = labeled(tmp_path / "labeled.jsonl")
    never = Toy("never", decides=False)
    found = evaluated(tmp_path, monkeypatch, never, Toy("a"))
    row = found["judges"]["never"]["safe"]["all"]
    assert row["undecided"] == row["n"] > 0
    assert sum(row["counts"].values()) == 0
    assert [row[name] for name in ("accuracy", "balanced_accuracy", "recall_yes", "auroc", "kappa")] == [None] * 5
    assert found["kappa"] == [{"judges": ["never", "a"], "refusal": None, "safe": None}]
    assert "threshold" not in found["judges"]["never"]
    # The same in `judge run`: reasons that differ in a number are counted as one.
    monkeypatch.setattr(commands, "open_judge", lambda spec, threshold, **_: never)
    answers = [
        Completion(f"p{i}", 0, user_says("q"), row["text"], "stop", 1, 1, "m", "e", "h") for i, row in enumerate(rows)
    ]
    write_jsonl(tmp_path / "c.jsonl", [one.to_row() for one in answers])
    commands.run_judge(tmp_path / "c.jsonl", "never", tmp_path / "v.jsonl", threshold=None)
    told = capsys.readouterr().out
    assert f"0 safe, 0 unsafe, {len(rows)} undecided" in told
    assert f"undecided {len(rows)}: N tokens; the judge reads N" in told


def test_intervals_are_of_prompts_where_one_was_answered_more_than_once():
    # Twenty prompts, five equal answers each: no more is known than from twenty.
    people, said = [True] * 100, [i % 2 == 0 for i in range(20) for _ in range(5)]
    none = [None] * 100
    once = agreement(people, said, none, [str(i) for i in range(100)])
    clustered = agreement(people, said, none, [str(i) for i in range(20) for _ in range(5)])
    assert (once.interval, clustered.interval) == (BY_WILSON, BY_PROMPT)
    widths = [one.recall_yes.high - one.recall_yes.low for one in (once, clustered)]
    assert widths[1] > 2 * widths[0]
    never_wrong = agreement(people, people, none, [str(i) for i in range(20) for _ in range(5)])
    for interval in (never_wrong.recall_yes, never_wrong.accuracy):
        assert interval.low == pytest.approx(20 / (20 + 1.96**2), abs=1e-4)


def test_the_area_is_sklearns_and_its_interval_is_of_prompts():
    rng = np.random.default_rng(0)
    p = rng.integers(0, 12, 300) / 11
    y = rng.random(300) < p
    apart = auroc(y, p, [str(i) for i in range(300)])
    assert apart.value == pytest.approx(roc_auc_score(y, p))
    together = auroc(np.tile(y, 4), np.tile(p, 4), [str(i) for i in range(300)] * 4)
    assert together.high - together.low == pytest.approx(apart.high - apart.low, rel=0.15)


def test_a_threshold_is_held_to_prompts_that_it_was_not_chosen_on():
    rng = np.random.default_rng(1)
    # Twelve prompts, each with its own level: what is chosen on the same labels looks better than it is.
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


def test_the_commands_fit_run_and_evaluate(tmp_path):
    labeled(tmp_path / "labeled.jsonl")
    answer = Completion("p", 0, user_says(PROMPTS[0]), "I can't help with that.", "stop", 1, 1, "m", "e", "h")
    write_jsonl(tmp_path / "c.jsonl", [answer.to_row()])
    judge, call = tmp_path / "judge.npz", partial(CliRunner().invoke, app)
    told = []
    for arguments in (
        ["fit", tmp_path / "labeled.jsonl", "--out", judge, "--doubt", "0.2"],
        ["run", tmp_path / "c.jsonl", "--judge", f"linear:{judge}", "--out", tmp_path / "v.jsonl"],
        ["eval", tmp_path / "labeled.jsonl", "--judge", f"linear:{judge}", "--out", tmp_path / "e.json"],
    ):
        result = call(["judge", *map(str, arguments)])
        assert result.exit_code == 0, (result.output, result.exception)
        told.append(result.output)
    assert json.loads((tmp_path / "v.jsonl").read_text())["refusal"] is True
    found = json.loads((tmp_path / "e.json").read_text())["judges"][f"linear:{judge}"]
    assert found["refusal"]["all"]["accuracy"][0] == 1
    assert set(found["refusal"]) == {"all", "m0", "m1"}
    card = json.loads((tmp_path / "judge.card.json").read_text())
    assert card["revision"] == load_judge(judge).revision
    assert card["undecided_band"] == [0.2, 0.8]
    assert card["fitted_on"]["prompts"] == 24
    assert card["fitted_on"]["labels"]["refusal"] == {"true": 24, "false": 24}
    assert card["quality"]["refusal"]["all"]["n"] == 48
    # Held out, it isn't as good on safety as on what it was fitted on.
    fitted, held_out = (one["safe"]["all"]["counts"] for one in (found, card["quality"]))
    assert held_out != fitted
    assert "on prompts that it wasn't fitted on" in told[0]


def test_too_few_answers_to_measure_are_said_to_be_too_few(tmp_path, capsys):
    rows = [
        {"prompt": f"{p} {i}", "text": t, "refusal": r}
        for i, (p, t, r) in enumerate(zip(PROMPTS, ANSWERS, REFUSES, strict=True))
    ][:20]
    write_jsonl(tmp_path / "few.jsonl", rows)
    commands.fit_judge(str(tmp_path / "few.jsonl"), tmp_path / "judge.npz")
    assert json.loads((tmp_path / "judge.card.json").read_text())["quality"] == {"refusal": None}
    assert "refusal: too few answers" in capsys.readouterr().out
