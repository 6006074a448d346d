"""Measure on one GPU what the CPU's benchmarks can't: packed attention, the head, steps of 1 and 8 B, whole runs.

    python benchmarks/gpu.py --minutes 8      # on an H100 or H200; writes results/gpu.json and results/gpu.md
    python benchmarks/gpu.py --dry            # the same code at tiny sizes on a CPU, nothing written

Nothing is downloaded: models have random weights, pairs have random tokens. Needed are PyTorch with CUDA and Triton,
and the project (`pip install -e . trl`, or `PYTHONPATH=src` where its dependencies are installed); what needs TRL,
Liger, FlashAttention or bitsandbytes is left out without it, and the missing packages are printed first. For a
machine without network that has only PyTorch, take the other packages along in a folder, for its version of Python:

    pip install --target DEPS --no-deps --only-binary=:all: --python-version 3.12 transformers trl peft accelerate ...
    PYTHONPATH=src:DEPS python benchmarks/gpu.py --minutes 8 --out gpu.json

Each part runs in a process of its own, with a share of the time that is left; what doesn't fit is listed as "not run:
time". Results are written after every case, so a run that is stopped leaves what it has measured.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
SEED = 42
OPTIONAL = ("trl", "liger_kernel", "flash_attn", "bitsandbytes", "triton")


class Part(NamedTuple):
    """Part of the measurements.

    Args:
        title: Heading in the table.
        cases: Function that returns its cases, as `module:name` in `gpu_parts`.
        share: Share of the time.
    """

    title: str
    cases: str
    share: float


PARTS = {
    "attention": Part("Packed rows (FlexAttention) against padded rows", "attention:cases", 0.17),
    "head": Part("The head alone", "head:cases", 0.13),
    "step": Part("A training step", "step:cases", 0.38),
    "generation": Part("Generation", "generation:cases", 0.11),
    "resume": Part("Resuming with equal bits", "runs:resume_cases", 0.08),
    "cache": Part("Reference cache, second start", "runs:cache_cases", 0.06),
    "qlora": Part("QLoRA", "runs:quantized_cases", 0.07),
}


def main() -> None:
    """Parse the command line and run the parts, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="time for all parts")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to run")
    parser.add_argument("--cases", choices=PARTS, help=argparse.SUPPRESS)  # run one part in this process
    options = parser.parse_args()
    if options.cases:
        run_part(options.cases, options.minutes * 60, options.out, dry=options.dry)
    else:
        run_all(options.only, options.minutes * 60, options.out, dry=options.dry)


def run_all(names: list[str], seconds: float, out: Path, *, dry: bool) -> dict[str, Any]:
    """Run parts in processes of their own, write the results after each, and return them."""
    start = time.monotonic()
    results = head(seconds, dry=dry)
    print(f"not installed: {', '.join(results['missing']) or 'nothing'}", flush=True)
    if not dry and not results["hardware"]["accelerators"]:
        raise SystemExit("PyTorch finds no GPU; try --dry")
    for number, name in enumerate(names):
        left = seconds - (time.monotonic() - start)
        limit = left * PARTS[name].share / sum(PARTS[other].share for other in names[number:])
        results["parts"][name] = in_own_process(name, limit, dry=dry)
        results["seconds"] = round(time.monotonic() - start, 1)
        print(f"{name}: {results['parts'][name]['seconds']} s of {limit:.0f} s", flush=True)
        if not dry:
            write(results, out)
    print(markdown(results))
    return results


def in_own_process(name: str, limit: float, *, dry: bool) -> dict[str, Any]:
    """Run a part in a new process that is killed after a limit, and return what it has measured."""
    began = time.monotonic()
    # Before CUDA starts: deterministic matrix products need it.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | ({"CUDA_VISIBLE_DEVICES": ""} if dry else {})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--cases", name, "--out", str(file), "--minutes", str(limit / 60)]
        result: dict[str, Any] = {"limit": round(limit, 1), "cases": {}}
        try:
            done = subprocess.run(command + ["--dry"] * dry, timeout=max(limit, 1), env=environment)
            if done.returncode:
                result["failed"] = f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            result["failed"] = "stopped: time"
        if file.exists():
            result["cases"] = json.loads(file.read_text(encoding="utf-8"))
    return result | {"seconds": round(time.monotonic() - began, 1)}


def run_part(name: str, seconds: float, out: Path, *, dry: bool) -> None:
    """Run the cases of a part in this process, and write their results to a file after each."""
    start = time.monotonic()
    from gpu_parts.cases import Setting, run_cases

    from bfpo.core.files import write_json

    module, function = PARTS[name].cases.split(":")
    cases = getattr(importlib.import_module(f"gpu_parts.{module}"), function)(Setting(dry=dry, seed=SEED))
    # A case is started only if there may be time for it.
    run_cases(cases, 0.8 * seconds - (time.monotonic() - start), lambda results: write_json(out, results))


def head(seconds: float, *, dry: bool) -> dict[str, Any]:
    """Return what the results say about the machine and the code, without parts."""
    from bfpo.core.environment import git_revision, hardware, installed_version, versions

    return {
        "command": f"python benchmarks/gpu.py --minutes {seconds / 60:g}" + " --dry" * dry,
        "seed": SEED,
        "dry": dry,
        "source": git_revision(),
        "versions": versions() | {name: installed_version(name.replace("_", "-")) for name in OPTIONAL},
        "missing": [name for name in OPTIONAL if find_spec(name) is None],
        "hardware": hardware(),
        "driver": driver(),
        "parts": {},
    }


def driver() -> str | None:
    """Return the version of NVIDIA's driver; None if there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(results: dict[str, Any], out: Path) -> None:
    """Write the results, and a table beside them."""
    from bfpo.core.files import write_json, write_text

    write_json(out, results)
    write_text(out.with_suffix(".md"), markdown(results))


def markdown(results: dict[str, Any]) -> str:
    """Return the results as Markdown: a table of cases for each part."""
    from speed.report import markdown_table

    lines = [f"# On a GPU: {results['driver'] or 'none, a dry run'}", f"`{results['command']}`, {results['source']}"]
    for name, part in results["parts"].items():
        rows = []
        for case, result in part["cases"].items():
            values = {key: value for key, value in result.items() if key not in ("measured", "seconds")}
            plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
            nested = {key: value for key, value in values.items() if isinstance(value, dict)}
            if plain:
                rows.append((case, "", _text(plain), f"{result.get('seconds', 0):g}"))
            rows += [(case, variant, _text(value), "") for variant, value in nested.items()]
        note = f" ({part['failed']})" if "failed" in part else ""
        lines += [f"## {PARTS[name].title}{note}", markdown_table(("case", "variant", "result", "s"), rows)]
    return "\n\n".join(lines) + "\n"


def _text(values: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, list):
            return " / ".join(map(shown, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "; ".join(f"{name} {shown(value)}" for name, value in values.items())


if __name__ == "__main__":
    main()
