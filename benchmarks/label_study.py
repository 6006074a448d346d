"""What the `linear` judge, fitted on XSTest alone, says of HH-RLHF and AlpacaEval pairs.

    python benchmarks/label_study.py --data FOLDER [--folder runs/label-study]

`FOLDER` holds `xstest/`, `hh_harmless/` and `alpaca_eval/` as published. Writes `benchmarks/results/label.json`.
"""

import argparse
from pathlib import Path

from bfpo.files import write_json
from bfpo.judging.commands import fit_judge
from bfpo.judging.open import open_judge
from bfpo.pair_labels import label_pairs
from bfpo.recipe import Source
from bfpo.training.manifest import hardware, versions

RESULTS = Path(__file__).parent / "results" / "label.json"
SETS = {
    "hh_harmless": ("hh_rlhf", "hh_harmless/test.jsonl.gz"),
    "alpaca_eval_vicuna": ("alpaca_eval", "alpaca_eval/vicuna-7b-v1.5.jsonl.gz"),
}


def main() -> None:
    """Fit the judge, label the sets, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/label-study"))
    options = parser.parse_args()
    fit_judge(str(options.data / "xstest" / "completions_*.csv"), options.folder / "judge.npz", doubt=0.5)
    judge = open_judge(f"linear:{options.folder / 'judge.npz'}")
    found = {}
    for name, (adapter, path) in SETS.items():
        labelled = label_pairs(Source(path=str(options.data / path), adapter=adapter), [judge], options.folder / name)
        assert labelled is not None
        found[name] = labelled.facts | {"source": path}
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/label_study.py --data FOLDER",
            "versions": versions(),
            "hardware": hardware(),
            "sets": found,
        },
    )


if __name__ == "__main__":
    main()
