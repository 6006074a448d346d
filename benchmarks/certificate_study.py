"""Certify and repair cost heads of the testbed's base model over boxes of paraphrases.

    python benchmarks/certificate_study.py           # about 12 CPU minutes; writes results/certificates.json
    python benchmarks/certificate_study.py --quick   # about 4, most of them for the base; writes nothing there

World and base are those of seed 0 of `guard_study.py`. A head of 32 units and a linear one, on the last layer,
are trained on the base's answers of that study with verdicts of the oracle. The paraphrases are the five wordings of
requests that are held out from all training; the states are those after the prompt, and after the beginning of an
answer that isn't a refusal. Resumable: the same command continues after a kill.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from guard_study import own_answers

from bfpo.certificates.recipe import CertifyRecipe
from bfpo.commands.certify import certify
from bfpo.config.per_token import PerTokenRecipe
from bfpo.core.certificate import Certificate
from bfpo.core.environment import hardware, versions
from bfpo.core.files import write_json, write_jsonl
from bfpo.experiments.steps import make_base, write_world
from bfpo.judging.prefix_run import HEAD_FILE, run_per_token
from bfpo.testbed.language import TEMPLATES
from bfpo.testbed.oracle import Oracle
from bfpo.testbed.world import World, WorldOptions

RESULT = Path(__file__).parent / "results" / "certificates.json"
SEED, NUM_REQUESTS, THRESHOLD = 0, 120, 0.3
ANSWERS = ("", "first take the")
RADII = (0.25, 0.5, 1.0, 2.0, 4.0)


def write_paraphrases(path: Path, number: int) -> None:
    """Write the wordings of held-out requests, half of them harmful."""
    test = World(WorldOptions(seed=SEED)).test
    harmful, benign = ([request for request in test if request.is_harmful is flag] for flag in (True, False))
    rows = [
        {
            "prompt_id": f"{kind}-{index}-{wording}",
            "prompt": request.format_prompt(template),
            "group": f"{kind}-{index}",
            "kind": kind,
        }
        for kind, requests in (("harmful", harmful), ("benign", benign))
        for index, request in enumerate(requests[: number // 2])
        for wording, template in enumerate(TEMPLATES)
    ]
    write_jsonl(path, rows)


def run(folder: Path, head: str, name: str, **keys: Any) -> Certificate:
    """Certify a head with some boxes."""
    recipe = {
        "out": str(folder / "certificates" / name),
        "model": {"path": str(folder / "base")},
        "head": str(folder / head / HEAD_FILE),
        "paraphrases": str(folder / "paraphrases.jsonl"),
        "threshold": THRESHOLD,
        **keys,
    }
    return certify(CertifyRecipe.model_validate(recipe))


def table(study: Mapping[str, Any]) -> str:
    """Return the table of docs/certificates.md: the head with a hidden layer."""
    lines = [
        "| states | boxes | certified | counter-examples | undecided | held-out paraphrases inside | width (sd) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in study["rows"]:
        if row["head"] != "hidden":
            continue
        parts = row["summaries"]
        boxes = sum(part["boxes"] for part in parts)
        counts = [sum(part[name] for part in parts) for name in ("certified", "counter_examples", "undecided")]
        held_out, inside = (sum(part[name] for part in parts) for name in ("held_out", "held_out_inside"))
        width = sum(part["width"] * part["boxes"] for part in parts) / boxes
        states = "answer begun" if row["answer"] else "prompt"
        cells = [f"{counts[0]} of {boxes}", *map(str, counts[1:]), f"{inside} of {held_out}", f"{width:.2f}"]
        lines.append(f"| {states} | {row['boxes']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/guards/seed-0"))
    parser.add_argument("--quick", action="store_true", help="few requests and one radius")
    options = parser.parse_args()
    folder, radii = options.folder, RADII[2:3] if options.quick else RADII
    write_world(WorldOptions(seed=SEED), folder / "world")
    make_base(folder, seed=SEED)
    files = own_answers(folder, "base", "oracle", Oracle("shared"))
    for head, units in (("hidden", 32), ("linear", 0)):
        if not (folder / head / HEAD_FILE).is_file():
            keys = {"layers": [-1], "units": units, "out": str(folder / head)}
            model = {"path": str(folder / "base")}
            run_per_token(PerTokenRecipe.model_validate({"model": model, "per_token": True} | files | keys))
    write_paraphrases(folder / "paraphrases.jsonl", 16 if options.quick else NUM_REQUESTS)
    precisions = {"hull": False, "precisions": ["float32", "bfloat16", "int8"]}
    rows = []
    for head, answer in product(("hidden", "linear"), ANSWERS):
        runs: dict[str, dict[str, Any]] = {
            "hull": {},
            "precisions": {"boxes": precisions},
            **{f"radius {radius:g}": {"boxes": {"hull": False, "radius": radius}} for radius in radii},
            "hull, repaired": {"repair": files},
        }
        for name, keys in runs.items():
            certificate = run(folder, head, f"{head}, {answer or 'prompt'}, {name}", answer=answer, **keys)
            rows.append(
                {
                    "head": head,
                    "answer": answer,
                    "boxes": name,
                    "summaries": [asdict(part) for part in certificate.summaries()],
                    "repair": [asdict(step) for step in certificate.repair],
                    "repaired": certificate.repaired is not None,
                    "methods": {
                        f"{box.outcome}, {box.method}": sum(
                            (other.outcome, other.method) == (box.outcome, box.method) for other in certificate.boxes
                        )
                        for box in certificate.boxes
                    },
                }
            )
    if options.quick:
        return
    command = "python benchmarks/certificate_study.py"
    facts = {"command": command, "seed": SEED, "threshold": THRESHOLD, "versions": versions(), "hardware": hardware()}
    write_json(RESULT, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
