"""The fast tests on the oldest and the newest packages that pyproject.toml allows, for each Python.

    python benchmarks/matrix.py [--python 3.11 3.12] [--set minimum newest] [--tests tests/losses ...]

`uv` resolves and installs each set into an environment of its own: for `minimum` the lowest version of every direct
dependency, those of the extra `all` too, with current tools for the tests. A Python that isn't installed is left out,
and said to be. PyTorch is its CPU build, from PyTorch's own index; with `--torch-backend none` it comes from where
uv's own variables (UV_FIND_LINKS, UV_CONSTRAINT, ...) say. Finished cells are in benchmarks/results/matrix.json and
.md; a later run replaces the cells that it runs again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from bfpo.commands.environment import source_revision
from bfpo.core.files import write_json, write_text

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "matrix.json"
PYTHONS = ("3.11", "3.12", "3.13")
RESOLUTIONS = {"minimum": "lowest-direct", "newest": "highest"}
# Packages whose oldest versions have no wheels for a newer Python, and would be compiled for hours.
COMPILED = (
    "matplotlib",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic-core",
    "safetensors",
    "scikit-learn",
    "scipy",
    "tokenizers",
)


def uv(*arguments: str) -> str:
    """Run uv and return what it prints; a failure ends with its message."""
    # The uv of this environment, or that of the path.
    program = Path(sys.executable).with_name("uv")
    command = [str(program) if program.exists() else "uv", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"uv {' '.join(arguments[:2])}: {done.stderr[:2000].strip()}")
    return done.stdout.strip()


def resolve(python: str, kind: str, folder: Path, backend: list[str]) -> Path:
    """Write the exact versions of a set, with the tools for the tests; return the file."""
    binary = [f"--only-binary={package}" for package in COMPILED]
    compile_set = [
        "pip",
        "compile",
        "--quiet",
        "--no-annotate",
        "--python",
        python,
        *backend,
        *binary,
        "pyproject.toml",
    ]
    bare, full = folder / "set.txt", folder / "set-and-tests.txt"
    uv(*compile_set, "--resolution", RESOLUTIONS[kind], "--extra", "all", "--output-file", str(bare))
    uv(*compile_set, "--extra", "all", "--extra", "dev", "--constraint", str(bare), "--output-file", str(full))
    return full


def install(python: str, requirements: Path, folder: Path, backend: list[str]) -> Path:
    """Install a set and this checkout into a new environment; return its Python."""
    uv("venv", "--quiet", "--python", python, str(folder / "env"))
    program = folder / "env" / "bin" / "python"
    into = ["pip", "install", "--quiet", "--python", str(program)]
    uv(*into, *backend, "--requirement", str(requirements))
    uv(*into, "--no-deps", "--editable", ".")
    return program


def run_tests(program: Path, tests: list[str], report: Path) -> dict[str, object]:
    """Run tests in one process and return the counts, the seconds and the names of failures."""
    command = [str(program), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    seconds = time.monotonic() - began
    if not report.exists():
        return {"passed": 0, "skipped": 0, "seconds": round(seconds, 1), "failures": ["pytest itself failed"]}
    cases = list(ET.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "seconds": round(seconds, 1),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


def run_cell(version: str, kind: str, tests: list[str], backend: list[str]) -> dict[str, object]:
    """Resolve, install and test one set under one Python."""
    cell: dict[str, object] = {"python": version, "set": kind, "tests": tests or ["fast suite"]}
    try:
        python = uv("python", "find", "--no-python-downloads", version)
    except RuntimeError:
        return cell | {"left_out": f"Python {version} is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        try:
            requirements = resolve(python, kind, Path(folder), backend)
            print(f"Python {version}, {kind}: resolved in {time.monotonic() - began:.0f} s, installing", flush=True)
            program = install(python, requirements, Path(folder), backend)
        except RuntimeError as error:
            return cell | {"passed": 0, "skipped": 0, "seconds": 0, "failures": [str(error)], "packages": {}}
        cell["install_seconds"] = round(time.monotonic() - began, 1)
        print(f"Python {version}, {kind}: installed, testing", flush=True)
        lines = re.findall(r"(?m)^([\w.\-]+)==(\S+)", requirements.read_text())
        cell["packages"] = dict(lines)
        cell["python"] = subprocess.run(
            [str(program), "-c", "import platform; print(platform.python_version())"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        return cell | run_tests(program, tests, Path(folder) / "report.xml")


def table(cells: dict[str, dict[str, object]], command: str, commit: str | None) -> str:
    """Return the cells as a page."""
    shown = ("torch", "transformers", "trl", "peft", "accelerate", "numpy", "pydantic", "typer")
    lines = ["# Tests on the oldest and the newest packages", "", f"`{command}` at commit {commit}.", ""]
    lines += [f"| Python | set | passed | failed | skipped | seconds | {' | '.join(shown)} |"]
    lines += [f"|---|---|---:|---:|---:|---:|{'---|' * len(shown)}"]
    for cell in cells.values():
        if "left_out" in cell:
            lines.append(f"| {cell['python']} | {cell['set']} | left out: {cell['left_out']} |")
            continue
        counts = [cell["passed"], len(cell["failures"]), cell["skipped"], cell["seconds"]]
        versions = [cell["packages"].get(name, "") for name in shown]
        lines.append(f"| {' | '.join(map(str, [cell['python'], cell['set'], *counts, *versions]))} |")
    failures = [
        f"- Python {c['python']}, {c['set']}: `{' '.join(name.split())}`"
        for c in cells.values()
        for name in c.get("failures", [])
    ]
    return "\n".join([*lines, *(["", "Failures:", "", *failures] if failures else []), ""])


def main() -> None:
    """Run the chosen cells; exit with 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions of Python")
    parser.add_argument("--set", nargs="+", default=list(RESOLUTIONS), choices=RESOLUTIONS, dest="kinds")
    parser.add_argument("--tests", nargs="+", default=[], help="paths for pytest; default: the fast suite")
    parser.add_argument("--torch-backend", default="cpu", help="uv's --torch-backend, or none")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    backend = [] if asked.torch_backend == "none" else ["--torch-backend", asked.torch_backend]
    cells = json.loads(asked.out.read_text())["cells"] if asked.out.exists() else {}
    for version in asked.python:
        for kind in asked.kinds:
            cells[f"{version} {kind}"] = run_cell(version, kind, asked.tests, backend)
            command, commit = " ".join(["python", *sys.argv]), source_revision()
            write_json(asked.out, {"command": command, "commit": commit, "cells": cells})
            write_text(asked.out.with_suffix(".md"), table(cells, command, commit))
    print(asked.out.with_suffix(".md").read_text())
    sys.exit(any(cell.get("failures") for cell in cells.values()))


if __name__ == "__main__":
    main()
