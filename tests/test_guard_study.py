"""The study of guards: what is compared at equal helpfulness, and its tables."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import guard_study

    return guard_study


def row(study, model, family, strength, safety, helpfulness, *, circular=False):
    metrics = {name: [0.5, 0.4, 0.6] for name in study.METRICS} | {
        study.SAFETY: [safety, safety - 0.1, safety + 0.1],
        study.HELPFULNESS: [helpfulness, helpfulness - 0.1, helpfulness + 0.1],
    }
    guard = study.Setting(family, strength, None, circular).name
    costs = {"tokens": 13.0, "scorer_calls": 2.0, "seconds": 0.002}
    return {
        **{"model": model, "guard": guard, "family": family, "strength": strength, "circular": circular},
        **{"metrics": metrics, "costs": costs},
    }


def rows(study, shift=0.0):
    return [
        row(study, "base", "no guard", None, 0.3 + shift, 0.70),
        row(study, "base", "factor κ =", 1, 0.5, 0.69),
        row(study, "base", "factor κ =", 4, 0.7, 0.6801, circular=True),
        row(study, "base", "factor κ =", 8, 0.9, 0.6799),
        row(study, "bfpo", "no guard", None, 0.95, 0.80),
        row(study, "bfpo", "factor κ =", 4, 0.99, 0.81),
    ]


def test_the_safest_setting_of_equal_helpfulness_is_found(study):
    found = {
        (equal["as_helpful_as"], equal["model"], equal["family"]): equal["guard"]
        for equal in study.at_equal_helpfulness(rows(study))
    }
    assert found == {
        ("base", "base", "no guard"): "no guard",
        # Stronger is safer, but one of κ = 8 is less helpful.
        ("base", "base", "factor κ ="): "factor κ = 4",
        ("base", "bfpo", "no guard"): None,
        ("base", "bfpo", "factor κ ="): None,
        ("bfpo", "base", "no guard"): None,
        ("bfpo", "base", "factor κ ="): None,
        ("bfpo", "bfpo", "no guard"): "no guard",
        ("bfpo", "bfpo", "factor κ ="): "factor κ = 4",
    }


def test_rows_are_means_over_seeds(study):
    single = study.over_seeds([{"rows": rows(study)}])
    assert single == rows(study)
    both = study.over_seeds([{"rows": rows(study)}, {"rows": rows(study, shift=0.2)}])
    value, low, high = both[0]["metrics"][study.SAFETY]
    # Student's quantile with one degree of freedom is 12.706.
    assert (value, low, high) == pytest.approx((0.4, 0.4 - 12.706 * 0.1, 0.4 + 12.706 * 0.1), abs=1e-3)
    assert both[1]["metrics"][study.SAFETY] == pytest.approx([0.5, 0.5, 0.5])


def test_the_tables_have_every_row(study):
    exact = {"0": 0.7, "1": 0.5, "4": 0.1}
    oracle = "factor, labels of the oracle, κ ="
    of_models = [{**r, "family": r["family"].replace("factor κ =", oracle)} for r in rows(study)]
    content = {"rows": of_models[:3], "at_equal_helpfulness": study.at_equal_helpfulness(rows(study))}
    text = study.tables(content | {"exact": {"base": exact}})
    assert (
        "| base | factor κ = 4 (circular) | 0.70 [0.60, 0.80] | 0.68 | 0.50 | 0.50 | 0.50 | 13.0 | 2.0 | 2.0 |"
        in text
    )
    assert "| base | base | factor κ = 4 | 0.70 [0.60, 0.80] | 0.68 |" in text
    assert "| base | bfpo | no guard | none | |" in text
    assert "| base | exact | 0.70 | 0.50 | 0.10 |\n| base | trained | 0.70 | 0.50 | 0.30 |" in text


def test_the_tables_of_the_page_are_those_of_the_results(study):
    results = json.loads(study.RESULT.read_text())
    assert results["seeds"] == 8
    assert study.tables(results, brief=True) in (study.RESULT.parents[2] / "docs/guards.md").read_text()
    assert study.RESULT.with_suffix(".md").read_text() == study.tables(results) + "\n"


def test_the_table_of_certificates_is_that_of_the_results(study):
    import certificate_study

    results = json.loads(certificate_study.RESULT.read_text())
    page = certificate_study.RESULT.parents[2] / "docs/certificates.md"
    assert certificate_study.table(results) in page.read_text()


def test_the_table_of_thresholds_is_that_of_the_results(study):
    import threshold_study

    page = (threshold_study.RESULTS.parents[1] / "docs/constraints.md").read_text()
    for name in ("threshold-0.035", "threshold-0.035-lr0.0005"):
        results = json.loads((threshold_study.RESULTS / f"{name}.json").read_text())
        assert threshold_study.table(results) in page
    slower = results["summary"]
    assert [row["met"] for row in slower] == [6, 8]
    [missed] = [seed for seed in results["seeds"] if seed["policies"][0].get("miss", {}).get("cause") == "training"]
    assert (missed["policies"][0]["achieved"][0], missed["policies"][0]["miss"]["rerun"]["achieved"][0]) == (
        0.136,
        0.092,
    )
    longer = json.loads((threshold_study.RESULTS / "threshold-0.035-lr0.0005-steps800.json").read_text())
    assert threshold_study.table(longer) in page
    assert [(row["met"], row["met_with_interval"]) for row in longer["summary"]] == [(8, 2)]
    less = json.loads((threshold_study.RESULTS / "threshold-0.045.json").read_text())
    assert [row["met"] for row in less["summary"]] == [3]


def test_the_table_of_constrained_methods_is_that_of_the_results(study):
    results = study.RESULT.parent / "testbed/constrained/comparison.md"
    page = (study.RESULT.parents[2] / "docs/constraints.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in results.read_text().splitlines()[4:14]]
    assert len(rows) == 10
    for name, mean, safety, helpfulness, *_ in rows:
        title = "base model" if name == "base" else f"`{name}`"
        assert f"| {title} | {safety} | {helpfulness} | {mean} |" in page
