"""Refusal markers and guesses of languages on XSTest's published completions with human labels."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from bfpo.core.languages import guess_language
from bfpo.core.refusals import is_refusal

DATA = Path(__file__).parents[3] / "shared" / "data" / "xstest"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"XSTest's completions are not at {DATA}")


@pytest.fixture(scope="module")
def rows():
    rows = []
    for file in sorted(DATA.glob("completions_*.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            rows += csv.DictReader(lines)
    assert len(rows) == 2250
    return rows


def test_the_markers_find_most_refusals_and_few_compliances(rows):
    counts = Counter((row["final_label"], is_refusal(row["completion"], "en")) for row in rows)
    assert counts == {
        ("2_full_refusal", True): 824,
        ("2_full_refusal", False): 159,
        ("3_partial_refusal", True): 98,
        ("3_partial_refusal", False): 78,
        ("1_full_compliance", True): 44,
        ("1_full_compliance", False): 1047,
    }


def test_no_english_answer_is_taken_for_another_language(rows):
    guesses = Counter(guess_language(row["completion"]) for row in rows)
    assert guesses == {"en": 2249, None: 1}
