"""Who may import whom (docs/design.md), read from the source, and how fast the command line answers."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bfpo
from bfpo.core.files import write_jsonl

from .report.fake_runs import judge_prompts, make_prompts, write_evaluation

SOURCE = Path(__file__).parents[1] / "src" / "bfpo"

# A package may import those left of it in this list, and its own modules.
LAYERS = [
    ("errors",),
    ("core",),
    ("config", "losses", "stats"),
    ("data", "testbed"),
    ("model",),
    ("training", "generation"),
    ("judging",),
    ("evaluation", "redteam", "migration", "constraints", "online", "certificates", "deployment"),
    ("report",),
    ("experiments",),
    ("commands",),
    ("__init__", "__main__"),
]
# Of the data, a model knows only what a tokenized example is.
MODEL_KNOWS = "bfpo.data.table"
WITHOUT_TORCH = (
    "errors.py",
    "core/*.py",
    "config/*.py",
    "losses/labeling.py",
    "losses/theory.py",
    "losses/combine.py",
    "losses/combiners.py",
    "losses/constrained.py",
    "losses/dual.py",
    "stats/*.py",
    "data/stages.py",
    "commands/app.py",
    "commands/groups.py",
    "commands/deploy.py",
    "commands/environment.py",
    "commands/panels.py",
    "report/*.py",
    "commands/training.py",
)


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def layer_of(name: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_downwards(file):
    here = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    for module in imports(file):
        if not module.startswith("bfpo."):
            continue
        there = module.split(".")[1]
        assert there == here or layer_of(there) < layer_of(here), f"{here} may not import {module}"
        if here == "model" and there == "data":
            assert module == MODEL_KNOWS
        # The testbed is for experiments only; judges find its oracle by name.
        assert there != "testbed" or here in ("testbed", "experiments"), f"{here} may not import {module}"


@pytest.mark.parametrize("pattern", WITHOUT_TORCH)
def test_light_modules_import_no_torch(pattern):
    files = list(SOURCE.glob(pattern))
    assert files
    for file in files:
        heavy = set(imports(file, top_level_only=True))
        assert not heavy & {"torch", "transformers", "datasets", "accelerate"}, file


@pytest.mark.parametrize("command", [["-c", "import bfpo"], ["-m", "bfpo", "--help"]])
def test_first_answer_is_fast_and_loads_no_torch(command):
    script = "import sys; sys.argv = ['bfpo', '--help']\ntry:\n    import bfpo\n"
    script += "    from bfpo.commands.app import main; main()\n" if "-m" in command else ""
    script += "except SystemExit:\n    pass\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    seconds = []
    for _ in range(3):
        # Time of the processor: what else the machine does must not decide.
        began = os.times()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        ended = os.times()
        seconds.append(ended.children_user + ended.children_system - began.children_user - began.children_system)
    assert min(seconds) < 0.6


def test_commands_that_only_read_load_no_torch(tmp_path):
    """`bfpo env`, `report`, `card` and `data inspect` answer at once, also where PyTorch is broken."""
    prompts = make_prompts(4)
    judged = judge_prompts(prompts, safe=0.8, helpful=0.7, refusing=0.2, seed=0)
    write_evaluation(tmp_path / "run" / "evaluation", "run", prompts, judged)
    labels = {"is_chosen_safe": True, "is_rejected_safe": False}
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "which", "chosen": "a box", "rejected": "a ball", **labels}])
    commands = [["env"], ["report", "run"], ["card", "run"], ["data", "inspect", "pairs.jsonl"]]
    script = "import sys\nfrom bfpo.commands.app import app\n"
    script += f"for arguments in {commands}:\n    app(arguments, standalone_mode=False)\n"
    script += "    print(*({'torch', 'transformers', 'datasets', 'scipy'} & {*sys.modules}), file=sys.stderr)\n"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == "\n" * len(commands)


def rooms_and_arrows() -> tuple[set[str], set[tuple[str, str]]]:
    """Return the packages and loose modules of `src/bfpo`, and which of them imports which."""
    rooms = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if path.suffix in ("", ".py")}
    rooms -= {"__pycache__"}
    arrows = {
        (path.relative_to(SOURCE).parts[0].removesuffix(".py"), f"{module}.__init__".split(".")[1])
        for path in SOURCE.rglob("*.py")
        for module in imports(path)
        if module == "bfpo" or module.startswith("bfpo.")
    }
    return rooms, {(here, there) for here, there in arrows if here != there}


def test_the_house_stays_small():
    rooms, arrows = rooms_and_arrows()
    assert len(rooms) <= 23
    assert len(arrows) <= 130
    assert len(LAYERS) <= 12
    assert {name for layer in LAYERS for name in layer} == rooms
    assert sum(path.suffix == ".py" for path in SOURCE.iterdir()) <= 6
    assert not rooms & {"utils", "common", "misc", "helpers"}


def test_the_product_does_not_import_the_testbed():
    _, arrows = rooms_and_arrows()
    assert {here for here, there in arrows if there == "testbed"} == {"experiments"}


def test_contributing_lists_the_layers():
    page = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text()
    listed = re.search(r"```text\n(errors\n.*?)```", page, flags=re.DOTALL)[1]
    assert [tuple(line.split()) for line in listed.splitlines()] == LAYERS


def test_public_names_load_on_first_use():
    for name in bfpo.__all__:
        assert getattr(bfpo, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bfpo.nothing  # noqa: B018
