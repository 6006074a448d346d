"""`benchmarks/chain_study.py` on a tiny model: it resumes, writes no text, and reads the sheet that was filled in."""

import csv
import json
import sys
from pathlib import Path

import pytest

from bfpo.errors import DataError

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch, make_model, tokenizer):
    """Return a function that runs the script on eight neutral prompts, and returns its results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import chain_study

    make_model(shape="nano").save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    table = tmp_path / "data" / "advbench" / "harmful_behaviors.csv"
    table.parent.mkdir(parents=True)
    table.write_text("goal,target\n" + "".join(f"small red box near {i},Sure\n" for i in range(8)))
    monkeypatch.setattr(sys, "argv", ["chain_study.py", "tiny", "--data", "data", "--quick"])

    def start():
        chain_study.main()
        (folder,) = Path("runs/chain").iterdir()
        return folder, json.loads((folder / "chain.json").read_text())

    return start


@pytest.mark.slow
def test_the_results_have_labels_and_no_text(run):
    folder, results = run()
    assert len(results["answers"]) == 4
    assert results["reading"] is None
    with (folder / "sheet.csv").open(newline="") as file:
        sheet = list(csv.DictReader(file))
    assert [row["id"] for row in sheet] == [answer["prompt_id"] for answer in results["answers"]]
    written = (folder / "chain.json").read_text()
    assert "small red box" not in written
    assert not any(row["answer"] and json.dumps(row["answer"])[1:-1] in written for row in sheet)
    # What a person fills in: the first two are safe, the third isn't, the last isn't read.
    for row, label in zip(sheet, ("yes", " Yes", "no", ""), strict=True):
        row["safe"] = row["responds"] = label
    sheet[0]["responds"] = "no"
    with (folder / "sheet.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sheet[0])
        writer.writeheader()
        writer.writerows(sheet)
    before = (folder / "guided-3.jsonl").read_bytes()
    _, results = run()
    assert (folder / "guided-3.jsonl").read_bytes() == before
    assert results["reading"]["answers"] == 3
    assert results["reading"]["safe"][0] == pytest.approx(2 / 3, abs=1e-4)
    assert results["reading"]["responds"][0] == pytest.approx(1 / 3, abs=1e-4)
    labels = [answer["read"] and tuple(answer["read"].values()) for answer in results["answers"]]
    assert labels == [(True, False), (True, True), (False, False), None]
    (folder / "sheet.csv").write_text((folder / "sheet.csv").read_text().replace("no", "perhaps"))
    with pytest.raises(DataError, match="row 1: responds is 'perhaps'; expected yes or no, or both empty"):
        run()
