import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from bfpo.errors import DataError
from bfpo.evaluation.results import METRIC_COLUMNS, MetricResult, Results, read_results
from bfpo.report.card import BEGIN, END, card_section, insert_card
from bfpo.report.html import write_report
from bfpo.report.plane import front, region
from bfpo.report.svg import DARK, LIGHT, STYLE, Drawing, Point, ticks
from bfpo.report.words import MISSING, number, short, signed
from bfpo.stats.intervals import wilson

VOID = {"meta", "img", "br", "link", "hr", "input", "source"}


class Page(HTMLParser):
    """A page taken apart: its tags, its text, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self._open):
            self.text += data

    @property
    def prose(self) -> str:
        return " ".join(self.text.split())

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]


def report(out, runs, **options) -> Page:
    return Page(write_report(out, runs, **options).read_text(encoding="utf-8"))


def lines(path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def change_results(folder, **changes) -> None:
    path = folder / "evaluation" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_verdict_is_told_from_the_numbers(tmp_path, runs):
    page = report(tmp_path / "out", runs)
    base, trained = (read_results(folder / "evaluation") for folder in runs)
    for task, metric, told in (
        ("harmful", "safety", "Safety on 40 harmful held-out prompts rose from {} to {} (better)"),
        (
            "lookalike",
            "over_refusal",
            "Over-refusal on 40 benign prompts that look harmful rose from {} to {} (worse)",
        ),
    ):
        numbers = [one.metric(task, metric) for one in (base, trained)]
        texts = [f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in numbers]
        assert told.format(*texts) in page.prose
    assert "bfpo is safer than base; in helpfulness the two are not distinguishable." in page.prose
    undecided = trained.metric("harmful", "safety").unscored
    assert undecided
    assert f"{undecided} answer" in page.prose
    safety = trained.metric("harmful", "safety")
    assert f"{undecided} undecided: {safety.least:.2f} to {safety.most:.2f}" in page.prose
    assert "nothing about training again with another seed" in page.prose


def test_what_got_worse_is_told_like_what_got_better(tmp_path, runs):
    comparisons = json.loads((runs[1] / "evaluation" / "results.json").read_text())["comparisons"]
    for row in comparisons:
        row["verdict"] = row["verdict"] and "worse"
    change_results(runs[1], comparisons=comparisons)
    page = report(tmp_path / "out", runs)
    assert "bfpo is less safe and less helpful than base." in page.prose
    assert "Also worse: severity on harmful prompts" in page.prose
    assert "distinguishably worse" not in page.prose


def test_every_metric_is_in_the_table_with_its_interval(tmp_path, runs):
    page = report(tmp_path / "out", runs)
    for folder in runs:
        for one in read_results(folder / "evaluation").metrics:
            assert f"{number(one.value)} [{number(one.low)}, {number(one.high)}]" in page.prose
    for one in read_results(runs[1] / "evaluation").comparisons:
        assert f"{signed(one.difference)} {one.verdict or ''}".strip() in page.prose
        assert f"[{signed(one.low)}, {signed(one.high)}]" in page.prose
    assert all(word in page.prose for word in ("Over-refusal", "Severity", "Malformed", "Cut off"))


def test_texts_of_models_and_files_stay_texts(tmp_path, runs, fake):
    change_results(runs[0], run=fake.script, model=fake.hostile, judges=[{"name": fake.hostile, "revision": "x"}])
    # A prompt whose texts are hostile is always among those shown when it is the only one.
    for folder in runs:
        for name in ("prompts", "completions", "verdicts"):
            path = folder / "evaluation" / f"{name}.jsonl"
            path.write_text("".join(f"{line}\n" for line in lines(path) if "harmful-000" in line))
    page = report(tmp_path / "out", runs, title=fake.hostile, note=fake.hostile)
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["script"]
    assert "{{ 7*7 }}" in page.text
    # Title twice, note, model, judge, recipes, prompt, and two answers.
    assert page.text.count(fake.hostile) >= 8
    assert len(page.ids()) == len(set(page.ids()))


def test_the_page_needs_nothing_but_itself(tmp_path, runs):
    path = write_report(tmp_path / "out", runs)
    page, text = Page(path.read_text()), path.read_text()
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert "src" not in attrs
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("href", "#").startswith("#"), tag
    assert {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"} <= set(page.ids())
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy


def test_a_reader_of_the_page_by_ear_finds_the_way(tmp_path, runs):
    page = report(tmp_path / "out", runs)
    ids = set(page.ids())
    for tag, attrs in page.tags:
        for name in (attrs.get("aria-labelledby") or "").split():
            assert name in ids
        assert tag != "th" or attrs.get("scope")
        assert tag != "svg" or (attrs["role"] == "img" and attrs["aria-labelledby"])
    assert [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2")][:2] == [1, 2]
    # Boxes that scroll can be reached from the keyboard.
    assert all("tabindex" in attrs for _, attrs in page.tags if "scroll" in (attrs.get("class") or "").split())


def test_answers_are_folded_and_failures_are_among_them(tmp_path, runs):
    page = report(tmp_path / "out", runs)
    assert all("open" not in attrs for tag, attrs in page.tags if tag == "details")
    assert page.text.count("shown because it failed") >= 2
    verdicts = [json.loads(line) for line in lines(runs[1] / "evaluation" / "verdicts.jsonl")]
    failed = sum(row["safe"] is not True or row["malformed"] for row in verdicts if "harmful-" in row["prompt_id"])
    assert f"4 of 40 shown; unsafe, undecided or malformed: bfpo {failed}" in page.prose


def test_labels_and_curves_come_from_the_run_that_has_them(tmp_path, runs):
    page = report(tmp_path / "out", runs)
    assert "loss bfpo, beta 0.05" in page.prose
    assert "−1 prefer the safe answer, though it is less helpful us: target −20 nats, margin at the end" in page.prose
    assert "target +20" in page.prose
    assert "no pairs of this kind in the log" in page.prose
    assert page.prose.count("loss of each stream") >= 1


def test_a_loss_without_a_table_says_so(tmp_path, runs, fake):
    fake.training(runs[1], "train", {"name": "dpo", "beta": 0.1})
    page = report(tmp_path / "out", runs)
    assert "trained with the loss dpo, which has no label table" in page.prose
    assert "this loss has no target" in page.prose
    fake.training(runs[1], "train", {"name": "somewhere:Loss"})
    assert "a loss of its own" in report(tmp_path / "out", runs).prose
    assert "somewhere" not in sys.modules


def test_one_run_is_told_without_a_comparison(tmp_path, runs):
    page = report(tmp_path / "out", runs[1:])
    assert "Safety on 40 harmful held-out prompts is" in page.prose
    assert "rose" not in page.prose
    assert "difference" not in page.prose
    assert "Pareto" not in page.prose


def test_several_runs_share_one_plane(tmp_path, runs, fake):
    asked = fake.prompts(40)
    base = fake.judged(asked, safe=0.3, helpful=0.75, refusing=0.05, seed=1)
    for name, seed in (("dpo", 3), ("bfpo", 4), ("safe_dpo", 5)):
        folder = runs[0].parent / f"more-{name}"
        found = fake.judged(asked, safe=0.5, helpful=0.1 * seed, refusing=0.3, seed=seed)
        fake.evaluation(folder, name, asked, found, base=base)
        runs.append(folder)
    page = report(tmp_path / "out", runs)
    # Two runs are called bfpo: their folders tell them apart.
    for name in ("bfpo (bfpo)", "bfpo (more-bfpo)", "dpo", "safe_dpo"):
        assert re.search(rf"{re.escape(name)} is |{re.escape(name)} and base are", page.prose), name
    assert "Pareto front" in page.prose
    figure = (tmp_path / "out" / "pareto.svg").read_text()
    assert figure.count('class="head"') == 4
    assert len(list(csv.DictReader(lines(tmp_path / "out" / "metrics.csv")))) == 5 * 18


def test_what_is_absent_is_left_out(tmp_path, runs):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(runs[1] / "evaluation" / "results.json", bare)
    page = report(tmp_path / "out", [bare])
    assert "Learning curves" not in page.text
    assert "label" not in page.prose.lower()
    assert "No answers to show" in page.prose
    assert "no run.json" in page.prose


def test_missing_numbers_are_dashes(tmp_path, runs):
    metrics = json.loads((runs[1] / "evaluation" / "results.json").read_text())["metrics"]
    metrics[0] |= {"value": None, "low": None, "high": None}
    change_results(runs[1], metrics=metrics, comparisons=[])
    page = report(tmp_path / "out", runs)
    assert "Safety share of answers judged safe; undecided counts as not safe; higher is better" in page.prose
    assert f" {MISSING} " in page.prose
    assert "Not drawn, for want of one of the two numbers: bfpo." in page.prose
    assert "(not compared)" in page.prose


def test_the_same_runs_give_the_same_bytes(tmp_path, runs):
    for name in ("one", "two"):
        write_report(tmp_path / name, runs)
    names = {file.name for file in (tmp_path / "one").iterdir()}
    assert names == {"report.html", "report.md", "pareto.svg", "metrics.csv", "comparisons.csv"}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_tables_hold_the_numbers_unrounded(tmp_path, runs):
    write_report(tmp_path / "out", runs)
    rows = list(csv.DictReader(lines(tmp_path / "out" / "metrics.csv")))
    assert tuple(rows[0]) == ("run", *METRIC_COLUMNS)
    found = {(row["run"], row["task"], row["metric"]): float(row["value"]) for row in rows}
    for name, folder in zip(("base", "bfpo"), runs, strict=True):
        for one in read_results(folder / "evaluation").metrics:
            assert found[name, one.task, one.metric] == one.value
    rows = list(csv.DictReader(lines(tmp_path / "out" / "comparisons.csv")))
    expected = read_results(runs[1] / "evaluation").comparisons
    assert [float(row["difference"]) for row in rows] == [one.difference for one in expected]
    assert {(row["run"], row["against"]) for row in rows} == {("bfpo", "base")}


def test_the_figure_is_a_file_of_its_own(tmp_path, runs):
    write_report(tmp_path / "out", runs)
    text = (tmp_path / "out" / "pareto.svg").read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]


def damage(folder, file, text):
    (folder / file).write_text(text)
    return [folder]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("evaluation/results.json", "{", "not JSON"),
        ("evaluation/results.json", '{"schema": 7}', "schema is 7"),
        ("run.json", "[1]", "list; expected the object"),
        ("run.json", "{", "not JSON"),
        ("metrics.jsonl", '{"step": 1}\n{"ste', "row 2: not JSON"),
        ("metrics.jsonl", '{"loss": 1}\n', "no step"),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n', "loss is 'x'"),
        ("evaluation/prompts.jsonl", "{}\n", "row 1"),
        ("evaluation/completions.jsonl", '{"prompt_id": "x"}\n', "row 1"),
    ],
)
def test_malformed_files_are_named(tmp_path, runs, file, text, said):
    with pytest.raises(DataError, match=re.escape(said)) as error:
        write_report(tmp_path / "out", damage(runs[1], file, text))
    assert file.rpartition("/")[2] in str(error.value)
    assert not (tmp_path / "out" / "report.html").exists()


def test_runs_that_do_not_compare_are_refused(tmp_path, runs):
    change_results(runs[1], template_policy="another")
    with pytest.raises(DataError, match="don't compare"):
        write_report(tmp_path / "out", runs)
    with pytest.raises(DataError, match="evaluate the run first"):
        write_report(tmp_path / "out", [tmp_path])
    with pytest.raises(DataError, match="at least one run"):
        write_report(tmp_path / "out", [])


def test_prompts_and_verdicts_must_belong_together(tmp_path, runs):
    path = runs[1] / "evaluation" / "verdicts.jsonl"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match=r"verdict on 'harmful-000' is missing; judge"):
        write_report(tmp_path / "out", runs)
    path.write_text(re.sub(r'"text_hash": "\w+"', '"text_hash": "other"', whole, count=1))
    with pytest.raises(DataError, match="another text; judge"):
        write_report(tmp_path / "out", runs)
    path.write_text(whole)
    prompts = runs[1] / "evaluation" / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("number 7 ?", "number 8 ?"))
    with pytest.raises(DataError, match="isn't the prompt of that id"):
        write_report(tmp_path / "out", runs)


def test_a_number_that_is_none_is_refused(tmp_path, runs):
    metrics = json.loads((runs[1] / "evaluation" / "results.json").read_text())["metrics"]
    metrics[0]["value"] = "0.9"
    change_results(runs[1], metrics=metrics)
    with pytest.raises(DataError, match=r"results.json: metrics.0.value: .*number .it holds '0.9'"):
        write_report(tmp_path / "out", runs)


def test_runs_judged_or_sampled_differently_are_flagged(tmp_path, runs):
    change_results(runs[1], judges=[{"name": "another", "revision": "1"}])
    assert "judged by different judges" in report(tmp_path / "out", runs).prose


def test_a_text_with_half_a_character_is_shown(tmp_path, runs):
    # Only the title here: the same path as every text.
    page = report(tmp_path / "out", runs, title="half \ud83d here")
    assert "half \\ud83d here" in page.text


def test_results_of_unknown_suites_are_shown_by_name(tmp_path, runs):
    found = read_results(runs[1] / "evaluation")
    changed = [{**row, "suite": "mine", "task": "odd", "metric": "strange_thing"} for row in as_rows(found)[:1]]
    change_results(runs[1], metrics=changed, comparisons=[])
    page = report(tmp_path / "out", runs[1:])
    assert "strange thing" in page.text
    assert "Neither safety on harmful prompts nor helpfulness" in page.prose
    assert not (tmp_path / "out" / "pareto.svg").exists()


def as_rows(results: Results) -> list[dict]:
    return [{name: getattr(one, name) for name in METRIC_COLUMNS} for one in results.metrics]


def test_the_front_holds_what_no_other_run_dominates():
    assert front([(0.2, 0.9), (0.8, 0.3), (0.1, 0.8), (0.5, 0.5)]) == [0, 3, 1]
    assert front([(0.5, 0.5), (0.5, 0.5), (0.4, 0.9)]) == [2, 0, 1]
    assert front([(0.5, 0.5), (0.5, 0.6)]) == [1]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-24, 24, [-20, -10, 0, 10, 20]), (0, 0, [0]), (0, 7, [0, 2, 4, 6])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == expected


def test_numbers_read_well():
    assert (number(None), number(-0.041), number(15.234), number(12345.6)) == (MISSING, "−0.04", "15.2", "12,346")
    assert (signed(0.571), signed(-0.571), short(50.0), short(-0.5)) == ("+0.57", "−0.57", "+50", "−0.5")


def test_drawings_escape_what_they_are_given():
    drawing = Drawing("x", 10, 10, title="<b>&", description="\x00\ud800")
    drawing.text(Point(1, 2), "</svg><script>")
    assert "<script>" not in drawing.inline()
    ElementTree.fromstring(drawing.standalone())


def contrast(one: str, other: str) -> float:
    def light(color: str) -> float:
        parts = (int(color[index : index + 2], 16) / 255 for index in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((light(one), light(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_texts_stand_out_from_their_ground(palette):
    assert set(re.findall(r"var\(--([\w-]+)\)", STYLE)) <= set(palette)
    for name in set(palette) - {"paper", "panel", "line", "grid"}:
        # 4.5 is what WCAG 2 asks of text (level AA).
        assert min(contrast(palette[name], palette[ground]) for ground in ("paper", "panel")) >= 4.5, name


def test_importing_the_report_loads_no_torch():
    script = "import sys, bfpo.report.html; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": 3}, "metrics: Input should be a valid"),
        ({"run": None}, "run: Input should be a valid string"),
        ({"judges": ["x"]}, "judges.0: Input should be"),
        ({"warnings": [1]}, "warnings.0: Input should be a valid string"),
        ({"comparisons": [{"against": "x"}]}, "comparisons.0.suite: Field required"),
        ({"agreement": [{"judges": 3, "question": []}]}, "agreement.0.judges: Input should be"),
        ({"data": [{"name": 1}]}, "data.0.name: Input should be a valid string"),
    ],
)
def test_results_of_wrong_types_are_refused_with_their_place(tmp_path, runs, changes, said):
    change_results(runs[1], **changes)
    with pytest.raises(DataError, match=re.escape(said)):
        write_report(tmp_path / "out", runs)


@pytest.mark.parametrize("name", ["report.html", "report.md", "pareto.svg", "metrics.csv", "comparisons.csv"])
def test_files_of_others_are_neither_overwritten_nor_removed(tmp_path, runs, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(DataError, match=f"{name} isn't from bfpo report; choose another folder"):
        write_report(out, runs)
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [(name, "mine")]


def test_further_judges_agreement_categories_and_warnings_are_shown(tmp_path, runs):
    found = json.loads((runs[1] / "evaluation" / "results.json").read_text())
    safety = next(row for row in found["metrics"] if row["metric"] == "safety")
    other = safety | {"judge": "second", "value": 0.42, "low": 0.3, "high": 0.5}
    change_results(
        runs[1],
        judges=[*found["judges"], {"name": "second", "revision": "9", "circular": True}],
        metrics=[
            *found["metrics"],
            other,
            other | {"category": "arson | <b>", "value": 0.11, "low": 0.1, "high": 0.2},
        ],
        warnings=["calibrated on other models"],
        agreement=[
            {
                "judges": ["x", "second"],
                "question": "safe",
                "kappa": 0.37,
                "low": 0.2,
                "high": 0.5,
                "n": 40,
                "share": 0.7,
            }
        ],
        data=[{"name": "a set", "license": "CC-BY-4.0", "hash": "abc", "prompts": 40}],
    )
    page = report(tmp_path / "out", runs)
    assert "bfpo: calibrated on other models" in page.prose
    assert "bfpo: Circular: second labeled" in page.prose
    assert "second circular" in page.prose
    assert "0.37 [0.20, 0.50]" in page.prose
    assert "arson | <b>" in page.prose
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 0.37 \\[0.20, 0.50\\] |" in text
    assert "arson \\| &lt;b&gt;" in text
    assert "<b>" not in text
    section = card_section(runs[1])
    assert all(said in section for said in ("CC-BY-4.0", "0.42", "second", "1a2b3c4d", "Known limits", "calibrated"))


def test_composite_indices_stand_with_their_recipes(tmp_path, runs):
    for folder, value, recipe in (
        (runs[0], None, "no number, for want of safety on alert"),
        (runs[1], 0.6, "unweighted mean of safety on advbench, safety on alert"),
    ):
        row = {
            "suite": "paper", "task": "all", "metric": "harmlessness_index", "value": value, "n": 20, "unscored": 0,
            "low": value and 0.5, "high": value and 0.7, "interval": "i", "higher_is_better": True,
            "judge": "testbed-oracle", "recipe": recipe,
        }  # fmt: skip
        old = json.loads((folder / "evaluation" / "results.json").read_text())["metrics"]
        change_results(folder, metrics=[*old, row])
    page = report(tmp_path / "out", runs)
    text = (tmp_path / "out" / "report.md").read_text()
    recipe = "Harmlessness index of paper: unweighted mean of safety on advbench, safety on alert."
    assert f"bfpo: {recipe}" in page.prose
    assert f"bfpo: {recipe}" in text
    assert "base: Harmlessness index of paper: no number, for want of safety on alert." in page.prose
    assert "0.60 [0.50, 0.70]" in page.prose
    card = card_section(runs[1])
    assert recipe in card
    assert "paper: Harmlessness index" in card


def test_every_pair_of_runs_is_told_of(tmp_path, runs, fake):
    asked = fake.prompts(40)
    third = runs[0].parent / "silent"
    fake.evaluation(third, "silent", asked, fake.judged(asked, safe=1.0, helpful=0.0, refusing=1.0, seed=3))
    page = report(tmp_path / "out", [*runs, third])
    rows = [line for line in lines(tmp_path / "out" / "report.md") if " prompts: " in line]
    told = [[cell.strip() for cell in row.split("|")[1:4]] for row in rows]
    assert told == [["bfpo", "dominates", "base"], ["silent", "trade-off", "base"], ["silent", "dominated", "bfpo"]]
    assert "safety on 40 harmful prompts: +" in rows[0]
    assert "helpfulness on 40 benign prompts: " in rows[0]
    assert "by testbed-oracle@1a2b3c4d; p-values of the 6 tests adjusted together" in page.prose
    # Without its answers nothing can be said of a run.
    (third / "completions.jsonl").unlink()
    page = report(tmp_path / "out", [*runs, third])
    assert "of the 2 tests" in page.prose
    assert "Nothing is said of silent and base (no answers with verdicts of one judge)" in page.prose
    assert 'id="pairs"' not in write_report(tmp_path / "alone", runs[:1]).read_text(encoding="utf-8")


def test_a_card_keeps_the_text_of_its_owner(tmp_path, runs):
    card = tmp_path / "README.md"
    card.write_bytes(b"# Mine\r\nbefore")
    insert_card(card_section(runs[0]), card)
    card.write_bytes(card.read_bytes() + b"after\r\n")
    insert_card(card_section(runs[1]), card)
    text = card.read_bytes().decode()
    assert text.startswith("# Mine\r\nbefore")
    assert text.endswith("after\r\n")
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
    assert "bfpo" in text
    card.write_text(f"{END} mine {BEGIN}")
    with pytest.raises(DataError, match="nothing was changed"):
        insert_card("x", card)
    assert card.read_text() == f"{END} mine {BEGIN}"


def test_twelve_runs_are_rows(tmp_path, runs):
    several = []
    for place in range(12):
        folder = tmp_path / f"run-{place}"
        shutil.copytree(runs[place % 2], folder)
        change_results(folder, run=f"step-{place}")
        several.append(folder)
    page = report(tmp_path / "out", several)
    tables = [attrs for tag, attrs in page.tags if tag == "table"]
    assert tables
    assert "step-11" in page.prose
    assert page.prose.count("Over-refusal lower is better; 40 prompts") >= 1


def test_the_region_on_the_plane_holds_both_numbers_95_times_of_100():
    rng, n, truth, inside = np.random.default_rng(0), 250, (0.75, 0.9), 0
    for yes in rng.binomial(n, truth, (1500, 2)):
        numbers = []
        for metric, count in zip(("helpfulness", "safety"), yes, strict=True):
            interval = wilson(int(count), n)
            numbers.append(MetricResult("s", "t", metric, *interval, n, 0, "Wilson", True))
        outline = region(*numbers)
        right, top, left, bottom = (outline[len(outline) * quarter // 4] for quarter in range(4))
        x, y = truth[0] - numbers[0].value, truth[1] - numbers[1].value
        across, up = right[0] if x > 0 else left[0], top[1] if y > 0 else bottom[1]
        inside += (x / (across - numbers[0].value)) ** 2 + (y / (up - numbers[1].value)) ** 2 <= 1
    assert 0.935 < inside / 1500 < 0.965
