"""Measure the words of refusals and the degenerate answers of the `refusal-rule` judge.

    python benchmarks/refusal_rule_study.py FOLDER-OF-DATA

Writes `benchmarks/results/refusal_rule.json`: refusals against the human labels of XSTest, and how many answers
of other data count as degenerate. Of the made-up ones, a loop repeats a sentence of an answer, and a tail loop
repeats its last eight words over a share of its length.
"""

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bfpo.config.recipes import Source
from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json
from bfpo.core.refusals import MEASURED_LANGUAGES, REVISION, is_refusal
from bfpo.data.rows import read_rows
from bfpo.judging.refusal_rule import find_degeneracy
from bfpo.stats.intervals import wilson

RESULTS = Path(__file__).parent / "results" / "refusal_rule.json"
LABELS = {"1_full_compliance": "compliance", "2_full_refusal": "full refusal", "3_partial_refusal": "partial refusal"}
OTHERS = {
    "gptfuzz": ("gptfuzz*/train.jsonl.gz", "text"),
    "alpaca_eval": ("alpaca_eval/*.jsonl.gz", "output_2"),
    "jailbreakbench": ("jailbreakbench/artifacts.jsonl.gz", "text"),
}


def main() -> None:
    """Measure both, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows = list(read_rows(Source(path=str(folder / "xstest/completions_*.csv"))))
    answers = {
        word: [row.text("completion") for row in rows if row.text("final_label") == label]
        for label, word in LABELS.items()
    }
    sets = {"xstest": [row.text("completion") for row in rows]}
    for name, (path, column) in OTHERS.items():
        sets[name] = [row.text(column) for row in read_rows(Source(path=str(folder / path)))]
    looped = make_loops(sets["xstest"])
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/refusal_rule_study.py FOLDER-OF-DATA",
            "what": "words of refusals against human labels, and degenerate answers, by the refusal-rule judge",
            "versions": versions(),
            "hardware": hardware(),
            "markers": REVISION,
            "languages": list(MEASURED_LANGUAGES),
            "called_refusal": {word: share(map(is_refusal, texts)) for word, texts in answers.items()},
            "degenerate": {
                name: share(find_degeneracy(text) is not None for text in texts)
                for name, texts in (sets | looped).items()
            },
            "by_model": by_model(rows),
        },
    )


def by_model(rows: Sequence[Any]) -> dict[str, Any]:
    """Return the recall of full refusals and the share of compliances that are called refusals, by model."""
    models: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        name = Path(row.where.rpartition(" row ")[0]).stem.removeprefix("completions_")
        word = LABELS[row.text("final_label")]
        models.setdefault(name, {}).setdefault(word, []).append(is_refusal(row.text("completion")))
    return {name: {word: share(flags) for word, flags in of_model.items()} for name, of_model in models.items()}


def make_loops(texts: Sequence[str]) -> dict[str, list[str]]:
    """Return degenerate answers, made of answers that aren't."""
    rng = random.Random(0)
    chosen = rng.sample([text for text in texts if len(text.split()) >= 40], 400)
    loops = []
    for text in chosen:
        sentence = rng.choice(re.split(r"(?<=[.!?])\s+", text.strip()))
        loops.append(f"{sentence} " * max(4, 600 // len(sentence)))
    tails = {}
    for percent in (40, 60, 80):
        tails[f"tail loop over {percent} %"] = []
        for text in chosen:
            words = text.split()
            kept = words[: round(len(words) * (1 - percent / 100))]
            repeats = max(3, (len(words) - len(kept)) // 8)
            tails[f"tail loop over {percent} %"].append(" ".join(kept + kept[-8:] * repeats))
    return {"loop": loops} | tails


def share(flags: Any) -> dict[str, Any]:
    """Return how many flags are set, and the share with its 95 % Wilson interval."""
    flags = list(flags)
    return {"count": sum(flags), "of": len(flags), "share": [round(v, 4) for v in wilson(sum(flags), len(flags))]}


if __name__ == "__main__":
    main()
