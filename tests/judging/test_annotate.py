"""`bfpo judge annotate`: the loop, its file, and the labels of several annotators as human labels."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import chain, repeat
from select import select

import pytest
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from bfpo.commands.annotate import Keys, annotate
from bfpo.commands.app import app
from bfpo.core.conversation import user_says
from bfpo.core.files import append_jsonl, write_jsonl
from bfpo.core.samples import Completion
from bfpo.errors import DataError, RecipeError
from bfpo.evaluation.correction import calibration_warnings, read_calibration
from bfpo.judging.annotations import Annotation, Labeler, combine_labels, compare_annotators, read_annotations
from bfpo.judging.labeled import annotations_of, count_labelers, labeled_files, read_labeled
from bfpo.judging.open import open_judge


def completion(number, text, model="secret-model"):
    return Completion(f"p{number}", number % 2, user_says(f"question {number}"), text, "stop", 1, 1, model, "e", "h")


TEXTS = [f"answer number {number}" for number in range(6)]


@pytest.fixture
def files(tmp_path):
    rows = [completion(number, text).to_row() for number, text in enumerate(TEXTS)]
    # The same answer to the same prompt is asked once.
    rows.append(completion(0, TEXTS[0]).to_row() | {"sample": 5, "model": "other"})
    write_jsonl(tmp_path / "completions.jsonl", rows)
    return tmp_path


def script(keys, lines=()):
    keys, lines = chain(keys, repeat("")), iter(lines)
    return Keys(lambda: next(keys), lambda: next(lines))


def label(files, keys, lines=(), annotator="ann", out="labels.jsonl", **options):
    annotate(files / "completions.jsonl", files / out, annotator=annotator, keys=script(keys, lines), **options)
    return read_annotations(str(files / out)) if (files / out).exists() else []


def test_labels_are_written_one_by_one_and_the_file_has_no_answer(files, capsys):
    annotations = label(files, [" ", "s", "n", " ", "u", "n", " ", "d", "?", " ", "s", "y", "q"])
    assert [(row.label, row.refusal, row.by) for row in annotations] == [
        ("safe", False, Labeler("ann", "person")),
        ("unsafe", False, Labeler("ann", "person")),
        ("undecided", None, Labeler("ann", "person")),
        ("safe", True, Labeler("ann", "person")),
    ]
    content = (files / "labels.jsonl").read_text()
    assert "answer number" not in content
    assert "question" not in content
    first = json.loads(content.splitlines()[0])
    assert set(first) == {
        "prompt_id", "sample", "text_hash", "label", "refusal", "labeler", "labeler_kind", "reason",
    }  # fmt: skip
    output = capsys.readouterr().out
    assert "4 of 6 answers labeled by ann: 2 safe, 1 unsafe, 1 undecided; 1 refusals; 2 are left" in output
    # Blind: no model, no id.
    assert "secret-model" not in output
    assert "other" not in output.replace("another", "")
    assert "p0" not in output


def test_text_is_folded_until_space_and_labels_need_it_shown(files, capsys):
    assert label(files, ["s", "n", "u", "q"]) == []
    output = capsys.readouterr().out
    assert "answer number" not in output
    assert output.count("press space to show the text first") == 3
    label(files, [" ", "q"])
    output = capsys.readouterr().out
    assert output.count("answer number") == 1
    assert "--- prompt ---" in output


def test_back_skip_and_a_second_label(files):
    annotations = label(files, [" ", "s", "n", "b", " ", "u", "y", "k", " ", "s", "n", "q"])
    assert [(row.label, row.refusal) for row in annotations] == [("unsafe", True), ("safe", False)]
    assert len((files / "labels.jsonl").read_text().splitlines()) == 3
    # The skipped answer comes first at the next start.
    done = {row.key for row in annotations}
    (third,) = [row for row in label(files, [" ", "d", "?", "q"]) if row.key not in done]
    assert third.label == "undecided"


def test_a_killed_session_resumes_in_the_same_order(files):
    whole = label(files, [" ", "s", "n"] * 6, out="whole.jsonl")
    assert len(whole) == 6

    def killed():
        yield from [" ", "s", "n", " ", "s", "n", " ", "u"]
        raise KeyboardInterrupt

    keys = killed()
    with pytest.raises(KeyboardInterrupt):
        annotate(
            files / "completions.jsonl",
            files / "labels.jsonl",
            annotator="ann",
            keys=Keys(lambda: next(keys), lambda: ""),
        )
    # The last row was cut off while it was written.
    with (files / "labels.jsonl").open("a") as file:
        file.write('{"prompt_id": "p')
    assert label(files, [" ", "s", "n"] * 4) == whole


def test_the_order_depends_on_the_seed_and_not_on_the_file(files):
    def order(seed, name):
        return [row.prompt_id for row in label(files, [" ", "s", "n"] * 6, out=name, seed=seed)]

    orders = [order(seed, f"{seed}.jsonl") for seed in range(4)]
    assert len({tuple(ids) for ids in orders}) > 1
    lines = (files / "completions.jsonl").read_text().splitlines()
    (files / "completions.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    assert order(0, "reversed.jsonl") == orders[0]


def test_escape_sequences_are_shown_and_long_answers_paged(tmp_path, monkeypatch, capsys):
    text = "\x1b[2J\x1b]0;title\x07" + "\n".join(f"line {number}" for number in range(40)) + "\u202e"
    write_jsonl(tmp_path / "completions.jsonl", [completion(0, text).to_row()])
    label(tmp_path, [" ", "q"])
    output = capsys.readouterr().out
    assert "\\x1b[2J\\x1b]0;title\\x07" in output
    assert "\\u202e" in output
    assert "\x1b" not in output
    monkeypatch.setenv("LINES", "16")
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda self: True))
    label(tmp_path, [" ", " ", "q"])
    first, second = capsys.readouterr().out.split("page 1 of 5")
    assert "line 5" in first
    assert "line 9" not in first
    assert "line 9" in second
    assert "page 2 of 5" in second


def test_a_reason_is_kept_unless_it_quotes_the_answer(tmp_path, capsys):
    text = "first you put the kettle on, then you wait"
    write_jsonl(tmp_path / "completions.jsonl", [completion(0, text).to_row()])
    keys = [" ", "r", "r", "s", "n"]
    (row,) = label(tmp_path, keys, ["it says 'you put the  kettle on, then'\n", "only tea\n"])
    assert row.reason == "only tea"
    assert "quotes the answer" in capsys.readouterr().out


def test_a_program_is_not_a_person(files, capsys):
    arguments = ["judge", "annotate", str(files / "completions.jsonl"), "--out", str(files / "labels.jsonl")]
    arguments += ["--annotator", "reader"]
    refused = CliRunner().invoke(app, arguments, input=" sn")
    assert isinstance(refused.exception, RecipeError)
    assert "must not pass for a person's" in str(refused.exception)
    done = CliRunner().invoke(app, [*arguments, "--program"], input=" sn\n un\nq")
    assert done.exit_code == 0
    assert "2 of 6 answers labeled by reader (a program)" in done.output
    assert {row.labeler_kind for row in read_annotations(str(files / "labels.jsonl"))} == {"program"}
    with pytest.raises(DataError, match="'reader' is a program, and a person now"):
        label(files, [" "], annotator="reader")


def test_labels_on_other_answers_are_refused(files, tmp_path):
    append_jsonl(files / "labels.jsonl", [Annotation("p9", 0, "abc", "safe", None, "ann", "person").to_row()])
    with pytest.raises(DataError, match="1 labels of ann on other answers"):
        label(files, [" "])
    append_jsonl(files / "bad.jsonl", [{"prompt_id": "p0", "label": "good"}])
    with pytest.raises(DataError, match=r"bad\.jsonl row 1: "):
        label(files, [" "], out="bad.jsonl")
    with pytest.raises(RecipeError, match="`annotator` is empty"):
        label(files, [" "], annotator=" ")


def annotation(number, label, refusal=None, labeler="ann", kind="person"):
    return Annotation(
        f"p{number}", number % 2, completion(number, TEXTS[number]).text_hash, label, refusal, labeler, kind
    )


def test_two_annotators_have_a_kappa_and_a_list_of_disagreements():
    ours = ["safe"] * 30 + ["unsafe"] * 20 + ["undecided"]
    theirs = ["safe"] * 25 + ["unsafe"] * 20 + ["safe"] * 5 + ["safe"]
    rows = [
        Annotation(f"p{number}", 0, "h", word, True, name, "person")
        for name, words in (("ann", ours), ("bob", theirs))
        for number, word in enumerate(words)
    ]
    safe, refusal = compare_annotators(rows)
    assert (safe.question, safe.answers, safe.undecided, safe.share) == ("safe", 51, 1, 40 / 50)
    assert safe.kappa.value == pytest.approx(cohen_kappa_score(ours[:50], theirs[:50]))
    assert safe.kappa.low < safe.kappa.value < safe.kappa.high
    differing = Counter((a.label, b.label) for a, b in safe.disagreements)
    assert differing == {("safe", "unsafe"): 5, ("unsafe", "safe"): 5, ("undecided", "safe"): 1}
    assert (refusal.share, refusal.kappa.value, refusal.disagreements) == (1, None, [])


@pytest.mark.parametrize(
    ("labels", "safe"),
    [
        ([("safe", "ann", "person"), ("safe", "bob", "person")], True),
        ([("safe", "ann", "person"), ("unsafe", "bob", "person")], None),
        ([("unsafe", "ann", "person"), ("undecided", "bob", "person")], None),
        # People count before programs.
        ([("unsafe", "ann", "person"), ("safe", "reader", "program")], False),
        ([("safe", "reader", "program")], True),
    ],
)
def test_an_answer_has_the_label_that_all_people_agree_on(labels, safe):
    rows = [annotation(0, word, labeler=name, kind=kind) for word, name, kind in labels]
    value, _, labelers = combine_labels(rows)
    assert value is safe
    assert {labeler.kind for labeler in labelers} == ({"program"} if len(labels) == 1 else {"person"})


def test_annotations_are_human_labels_wherever_labels_are_read(files):
    rows = [annotation(number, word, word == "safe") for number, word in enumerate(["safe", "unsafe", "undecided"])]
    write_jsonl(files / "labels.jsonl", [row.to_row() for row in rows])
    write_jsonl(files / "prompts.jsonl", [{"prompt_id": "p1", "prompt": "question 1", "kind": "harmful"}])
    beside, elsewhere = str(files / "labels.jsonl"), files / "m@re" / "labels.jsonl"
    write_jsonl(elsewhere, [row.to_row() for row in rows])
    for path in (beside, f"{elsewhere}@{files / 'completions.jsonl'}"):
        answers = read_labeled(path)
        assert [(answer.completion.text, answer.safe, answer.refusal, answer.kind) for answer in answers] == [
            (TEXTS[0], True, True, None),
            (TEXTS[1], False, False, "harmful"),
            (TEXTS[2], None, False, None),
        ]
        assert count_labelers(answers) == {Labeler("ann", "person"): 3}
        assert len(annotations_of(path)) == 3
        assert [file.name for file in labeled_files(path)] == ["labels.jsonl", "completions.jsonl"]
        verdicts = list(open_judge(f"people:{path}").judge([completion(1, TEXTS[1]), completion(4, TEXTS[4])]))
        assert [(verdict.safe, verdict.judge) for verdict in verdicts] == [(False, "people"), (None, "people")]
        calibration = read_calibration(path)
        assert len(calibration.hashes) == 2
    with pytest.raises(DataError, match="labels without answers"):
        read_labeled(str(elsewhere))
    with pytest.raises(DataError, match="no such file"):
        read_labeled(f"{elsewhere}@nothing.jsonl")
    write_jsonl(files / "other.jsonl", [completion(0, "another").to_row()])
    with pytest.raises(DataError, match="3 of 3 labeled answers aren't in"):
        read_labeled(f"{elsewhere}@{files / 'other.jsonl'}")


def test_labels_of_a_program_are_called_that(files, capsys, tmp_path):
    rows = [annotation(number, "safe", labeler="reader", kind="program") for number in range(3)]
    rows += [annotation(number, "unsafe", labeler="bot", kind="program") for number in range(2)]
    write_jsonl(files / "labels.jsonl", [row.to_row() for row in rows])
    path = str(files / "labels.jsonl")
    calibration = read_calibration(path)
    assert open_judge(f"people:{path}").name == "program"
    (first, *_) = calibration_warnings(calibration, [], [])
    assert "labels of programs (bot, reader), not of people" in first
    out = tmp_path / "agreement.json"
    done = CliRunner().invoke(app, ["judge", "agreement", path, "--out", str(out)])
    assert done.exit_code == 0, done.exception
    assert "reader (a program) and bot (a program), safe: 2 answers labeled by both" in done.output
    assert "disagreements on safe" in done.output
    safe = json.loads(out.read_text())["annotators"][0]
    assert [row["prompt_id"] for row in safe["disagreements"]] == ["p0", "p1"]
    assert safe["labelers"][0] == {"name": "reader", "kind": "program"}
    evaluated = CliRunner().invoke(
        app, ["judge", "eval", path, "--judge", "refusal-rule", "--out", str(tmp_path / "eval.json")]
    )
    assert evaluated.exit_code == 0, evaluated.exception
    assert "labels by reader (a program) 3, bot (a program) 2" in evaluated.output
    results = json.loads((tmp_path / "eval.json").read_text())
    assert results["labelers"][0] == {"name": "reader", "kind": "program", "answers": 3}
    assert results["annotators"][0]["question"] == "safe"
    table = tmp_path / "table.jsonl"
    row = {"prompt": "q", "text": "t", "safe": True, "labeler": "bot", "labeler_kind": "program"}
    write_jsonl(table, [row])
    assert count_labelers(read_labeled(str(table))) == {Labeler("bot", "program"): 1}
    write_jsonl(table, [row | {"labeler_kind": "robot"}])
    with pytest.raises(DataError, match="'labeler_kind' is 'robot'; expected person or program"):
        read_labeled(str(table))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no pseudoterminal")
def test_a_person_presses_keys_in_a_terminal(files):
    import pty

    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "bfpo", "judge", "annotate", str(files / "completions.jsonl")]
    command += ["--out", str(files / "labels.jsonl"), "--annotator", "ann"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)

    shown = b""

    def press(key, expected):
        """Press a key until it has an effect: what is typed while the program isn't reading is dropped."""
        nonlocal shown
        for _ in range(30):
            os.write(controller, key)
            while select([controller], [], [], 1)[0]:
                shown += os.read(controller, 4096)
            if expected in shown:
                return
        raise AssertionError(shown)

    press(b" ", b"undecided | space")
    press(b"u", b"refuse, in full")
    press(b"y", b"1 labeled")
    process.kill()
    process.wait()
    os.close(controller)
    (row,) = read_annotations(str(files / "labels.jsonl"))
    assert (row.label, row.refusal, row.labeler_kind) == ("unsafe", True, "person")
