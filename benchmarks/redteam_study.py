"""Run the red-team circle of `examples/redteam_circle.py` on several seeds.

    python benchmarks/redteam_study.py [--seeds 4] [--folder runs/redteam-study] [--serve PORT]

Writes `benchmarks/results/redteam.json`, or `redteam_served.json` with `--serve`, which generates the base's answers
through `transformers serve`. After an interruption the same command resumes.
"""

import argparse
import json
import sys
from pathlib import Path

from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Run the seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("runs/redteam-study"))
    parser.add_argument("--serve", type=int, metavar="PORT")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples"))
    from redteam_circle import circle

    seeds = []
    for seed in range(options.seeds):
        seeds.append(circle(options.folder / f"seed-{seed}", seed, port=options.serve))
        print(json.dumps(seeds[-1]), flush=True)
    serve = f" --serve {options.serve}" if options.serve else ""
    write_json(
        RESULTS / ("redteam_served.json" if options.serve else "redteam.json"),
        {
            "command": f"python benchmarks/redteam_study.py --seeds {options.seeds}{serve}",
            "what": "each interval is over held-out prompts of one world and one run",
            "versions": versions(),
            "hardware": hardware(),
            "seeds": seeds,
        },
    )


if __name__ == "__main__":
    main()
