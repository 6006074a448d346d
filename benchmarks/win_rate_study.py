"""Compute raw and length-controlled win rates from AlpacaEval's annotations of four models.

    python benchmarks/win_rate_study.py FOLDER-OF-ANNOTATIONS

Reads `MODEL.jsonl.gz`, AlpacaEval 2's annotations (weighted_alpaca_eval_gpt4_turbo, baseline gpt4_1106_preview), and
writes `benchmarks/results/win_rates.json`. The length-controlled rates come from a model with two terms instead of
AlpacaEval's three, so they differ from the leaderboard's.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.core.environment import hardware, versions
from bfpo.core.files import file_hash, write_json
from bfpo.evaluation.alpaca_eval import read_alpaca_annotations
from bfpo.stats.intervals import Interval
from bfpo.stats.length_control import length_controlled_win_rate, win_rate

RESULTS = Path(__file__).parent / "results" / "win_rates.json"
# Raw and length-controlled, in percent, from tatsu-lab/alpaca_eval@01f3cb2de42f7cc814d838a8946563ab9af1725c,
# src/alpaca_eval/leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv.
LEADERBOARD = {
    "vicuna-7b-v1.5": (4.80, 7.62),
    "gemma-7b-it": (6.94, 10.43),
    "OpenHermes-2.5-Mistral-7B": (10.34, 16.25),
    "claude-instant-1.2": (16.13, 25.61),
}


def main() -> None:
    """Write the rates of every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder, start = parser.parse_args().folder, time.monotonic()
    models = {
        name: rates(folder / f"{name}.jsonl.gz") | {"leaderboard": list(published)}
        for name, published in LEADERBOARD.items()
    }
    write_json(
        RESULTS,
        {
            "command": "python benchmarks/win_rate_study.py FOLDER-OF-ANNOTATIONS",
            "what": "value, low, high, in %; length-controlled by a model term and tanh of the length difference, "
            "without an instruction's difficulty: not AlpacaEval's numbers; 'leaderboard' has those, raw and "
            "length-controlled",
            "versions": versions(),
            "hardware": hardware(),
            "seconds": round(time.monotonic() - start, 1),
            "seed": 0,
            "models": models,
        },
    )
    for name, model in models.items():
        print(f"{name}: raw {model['raw']}, length-controlled {model['length_controlled']}")


def rates(file: Path) -> dict[str, Any]:
    """Return the rates of one file of annotations."""
    annotations = read_alpaca_annotations(file)
    lengths = np.array([len(text) for text in annotations.outputs])
    reference_lengths = np.array([len(text) for text in annotations.reference_outputs])
    return {
        "raw": percent(win_rate(annotations.preferences)),
        "length_controlled": percent(length_controlled_win_rate(annotations.preferences, lengths, reference_lengths)),
        "characters": round(float(lengths.mean())),
        "characters_of_reference": round(float(reference_lengths.mean())),
        "instructions": len(annotations.preferences),
        "hash": file_hash(file),
    }


def percent(interval: Interval) -> list[float]:
    """Return value, low and high in percent."""
    return [round(100 * number, 2) for number in interval]


if __name__ == "__main__":
    main()
