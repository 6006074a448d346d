"""Counts of public data, compared with counts taken straight from the files."""

import csv
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from bfpo.config.recipes import DataRecipe, Source
from bfpo.data.prepare import prepare, write_prepared

DATA = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"public data of ../shared/data are not at {DATA}")


def prepared(adapter, pattern, **options):
    source = Source(adapter=adapter, path=str(DATA / pattern), **options)
    return prepare(DataRecipe(data=[source]))


def reasons(counts):
    return {(reason.text, reason.cell): count for reason, count in counts.items()}


def json_lines(pattern):
    for file in sorted(DATA.glob(pattern)):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


@pytest.fixture(scope="module")
def xstest():
    """Completions as plain dictionaries."""
    rows = []
    for file in sorted((DATA / "xstest").glob("completions_*.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            rows += csv.DictReader(lines)
    assert len(rows) == 2250
    return rows


@pytest.mark.parametrize(
    ("partial_refusals", "complies", "refuses", "expected"),
    [
        ("refusal", "1", "23", {"ss": 778, "us": 531}),
        ("compliance", "13", "2", {"ss": 534, "us": 684}),
        ("drop", "1", "2", {"ss": 454, "us": 517}),
    ],
)
def test_xstest_has_each_compliance_with_each_refusal_of_its_prompt(
    partial_refusals, complies, refuses, expected, xstest
):
    pairs, lonely, partial = [], 0, 0
    by_prompt = {}
    for row in xstest:
        by_prompt.setdefault((row["prompt"].strip(), row["type"].startswith("contrast_")), []).append(row)
    for (prompt, unsafe), rows in by_prompt.items():
        yes, no = (
            [row["completion"].strip() for row in rows if row["final_label"][0] in kinds]
            for kinds in (complies, refuses)
        )
        pairs += [(prompt, chosen, rejected, "us" if unsafe else "ss") for chosen in yes for rejected in no]
        lonely += len(yes) + len(no) if not (yes and no) else 0
        partial += len(rows) - len(yes) - len(no)

    data = prepared("xstest_completions", "xstest/completions_*.csv", partial_refusals=partial_refusals)
    report = data.parts[0].report
    # Two models gave the same answer to one prompt: labeled once a partial refusal, once a full one.
    identical = {item for item in pairs if item[1] == item[2]}
    distinct = set(pairs) - identical
    assert Counter(cell for *_, cell in distinct) == expected
    assert report.read == len(pairs)
    assert data.manifest()["train"] == {"main": {"ss": 0, "su": 0, "us": 0, "uu": 0} | expected}
    assert {(p.prompt[0].content, p.chosen, p.rejected, p.cell) for p in data.train} == distinct
    assert reasons(report.dropped) == {("identical answers", item[3]): 1 for item in identical}
    assert report.removed.total() == len(pairs) - len(distinct) - len(identical)
    assert report.faulty.total() == 0
    skipped = {"no completion of the other kind to pair with": lonely, "partial refusal": partial}
    assert report.skipped == {reason: count for reason, count in skipped.items() if count}


def test_of_hh_rlhf_2303_of_2312_transcripts_are_usable():
    rows = list(json_lines("hh_harmless/test.jsonl.gz"))
    not_transcripts, empty, usable = 0, 0, 0
    for row in rows:
        before, answers = zip(
            *(row[side].rsplit("\n\nAssistant:", 1) for side in ("chosen", "rejected")), strict=True
        )
        # The last turn of both sides has to be an answer to a human.
        last_names = [re.findall(r"\n\n(Human|Assistant):", text)[-1:] for text in (*before, *row.values())]
        if last_names != [["Human"], ["Human"], ["Assistant"], ["Assistant"]]:
            not_transcripts += 1
        elif not all(answer.strip() for answer in answers):
            empty += 1
        else:
            assert before[0].strip() == before[1].strip()
            assert answers[0].strip() != answers[1].strip()
            usable += 1
    assert (len(rows), not_transcripts, empty, usable) == (2312, 5, 4, 2303)

    data = prepared("hh_rlhf", "hh_harmless/test.jsonl.gz")
    report = data.parts[0].report
    assert report.faulty.total() == not_transcripts
    assert (report.read, len(data.train)) == (2312 - not_transcripts, usable)
    assert reasons(report.dropped) == {("empty answer", None): empty}
    assert data.manifest()["train"] == {"main": {"ss": 0, "su": 0, "us": 0, "uu": 0, "unlabeled": 2303}}


def test_alpaca_eval_has_the_preferred_output_first_and_no_ties():
    rows = list(json_lines("alpaca_eval/*.jsonl.gz"))
    assert len(rows) == 4 * 805
    ties = [row for row in rows if row["preference"] in (None, 0, 1.5)]
    pairs = [
        (row["instruction"], row["output_2"], row["output_1"])
        if row["preference"] > 1.5
        else (row["instruction"], row["output_1"], row["output_2"])
        for row in rows
        if row not in ties
    ]
    whole = [(prompt, chosen, rejected) for prompt, chosen, rejected in pairs if chosen.strip() and rejected.strip()]
    distinct = {item for item in whole if item[1].strip() != item[2].strip()}

    data = prepared("alpaca_eval", "alpaca_eval/*.jsonl.gz")
    report = data.parts[0].report
    assert report.skipped.total() == len(ties) == 10
    assert (report.read, report.dropped.total()) == (len(pairs), len(pairs) - len(whole))
    assert {(p.prompt[0].content, p.chosen, p.rejected) for p in data.train} == distinct
    assert data.manifest()["train"] == {"main": {"ss": len(distinct), "su": 0, "us": 0, "uu": 0}}
    assert report.license == "CC-BY-NC-4.0"


@pytest.mark.parametrize(
    ("adapter", "pattern"),
    [("hh_rlhf", "hh_harmless/test.jsonl.gz"), ("xstest_completions", "xstest/completions_*.csv")],
)
def test_held_out_files_are_accepted_as_they_are(adapter, pattern, tmp_path):
    source = Source(adapter=adapter, path=str(DATA / pattern))
    first = prepare(DataRecipe(data=[source], holdout=0.15))
    write_prepared(first, tmp_path)
    files = {
        name: [Source(path=str(tmp_path / f"{file}.jsonl"))] for name, file in (("data", "pairs"), ("eval", "eval"))
    }
    second = prepare(DataRecipe(**files, max_dropped=0))
    assert (second.train, second.eval) == (first.train, first.eval)
    assert not {pair.prompt_key for pair in second.train} & {pair.prompt_key for pair in second.eval}
