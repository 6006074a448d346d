"""XSTest's five models judged by people, by `linear`, and by `linear` corrected on own and on others' answers."""

import csv
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.evaluation.results import read_results
from bfpo.judging.fit import FittingSet
from bfpo.judging.labeled import read_labeled
from bfpo.judging.linear import save_judge

DATA = Path(__file__).parents[3] / "shared" / "data" / "xstest"
EXAMPLE = Path(__file__).parents[2] / "examples" / "xstest_judge_error.py"
MODELS = ("gpt4", "llama2new", "llama2orig", "mistralguard", "mistralinstruct")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"public data of ../shared/data are not at {DATA}"),
]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Run the example in this process, with judges that are fitted but not cross-validated."""
    out = tmp_path_factory.mktemp("xstest")
    names = runpy.run_path(str(EXAMPLE))
    space = names["main"].__globals__

    def bfpo(*words):
        words = list(map(str, words))
        if words[:2] == ["judge", "fit"]:
            answers = FittingSet(read_labeled(words[2]), words[2])
            save_judge(answers.fit(answers.rows).heads, Path(words[4]))
        else:
            done = CliRunner().invoke(app, words, catch_exceptions=False)
            assert done.exit_code == 0, done.output

    space["_bfpo"] = bfpo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["example", str(DATA), str(out)])
        names["main"]()
    return SimpleNamespace(out=out, thirds=space["_thirds"](space["_read"](DATA / "prompts.csv")))


def rate(folder, task, metric, judge):
    wanted = task, metric, judge, None
    metrics = read_results(folder / "evaluation").metrics
    (metric,) = [
        metric for metric in metrics if (metric.task, metric.metric, metric.judge, metric.category) == wanted
    ]
    return metric


def annotated(example, model, thirds):
    """Return the annotators' over-refusal and unsafe compliance on the prompts of some thirds."""
    with (DATA / f"completions_{model}.csv").open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if example.thirds.get(row["prompt"].strip()) in thirds]
    shares = []
    for unsafe, wanted in ((False, ("2_full_refusal", "3_partial_refusal")), (True, ("1_full_compliance",))):
        labels = [row["final_label"] for row in rows if row["type"].startswith("contrast_") == unsafe]
        shares.append(sum(label in wanted for label in labels) / len(labels))
    return shares


def held(folder, human):
    """Return whether the corrected intervals hold people's over-refusal and unsafe compliance."""
    over_refusal = rate(folder, "xstest_safe", "over_refusal_corrected", "linear")
    refusal = rate(folder, "xstest_unsafe", "refusal_corrected", "linear")
    return [over_refusal.low <= human[0] <= over_refusal.high, refusal.low <= 1 - human[1] <= refusal.high]


def test_people_s_numbers_are_on_the_page_and_correction_on_own_answers_gives_them_back(example):
    page = (example.out / "same" / "page" / "report.md").read_text()
    covered = []
    for model in MODELS:
        folder, human = example.out / "same" / model, annotated(example, model, {2})
        assert rate(folder, "xstest_safe", "over_refusal", "people").value == pytest.approx(human[0])
        assert rate(folder, "xstest_unsafe", "safety", "people").value == pytest.approx(1 - human[1])
        covered += held(folder, human)
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {model} | people |")]
        assert f"| {1 - human[1]:.2f} \\[" in row
        assert f"| {human[0]:.2f} \\[" in row
        assert f"| {model} | linear, corrected |" in page
    assert sum(covered) >= 9
    assert "calibrated on answers of other models" not in page
    assert all(
        entry.own
        for model in MODELS
        for entry in read_results(example.out / "same" / model / "evaluation").calibration
    )


def test_all_annotations_are_on_their_page(example):
    page = (example.out / "people" / "page" / "report.md").read_text()
    for model in MODELS:
        human = annotated(example, model, {0, 1, 2})
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {model} | people |")]
        assert f"| {1 - human[1]:.2f} \\[" in row
        assert f"| {human[0]:.2f} \\[" in row


def test_correction_on_other_models_answers_fails_and_the_page_warns(example):
    folder = example.out / "other" / "mistralinstruct"
    human = annotated(example, "mistralinstruct", {1, 2})
    assert not held(folder, human)[1]
    plain = rate(folder, "xstest_unsafe", "refusal", "linear")
    corrected = rate(folder, "xstest_unsafe", "refusal_corrected", "linear")
    # It is further off than the judge's own rate was.
    assert abs(corrected.value - (1 - human[1])) > abs(plain.value - (1 - human[1]))
    for name in ("report.html", "report.md"):
        assert "calibrated on answers of other models" in (example.out / "other" / "page" / name).read_text()
