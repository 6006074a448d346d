"""The launch files: sound scripts, and the arguments that they pass; slow tests start processes with them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from bfpo.core.files import write_jsonl

LAUNCH = Path(__file__).parents[1] / "recipes" / "launch"
SCRIPTS = sorted(LAUNCH.iterdir())

# Stands in for `python`, `srun` and `scontrol`: prints what it gets.
PRINTS = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'
SCONTROL = "#!/usr/bin/env bash\nprintf 'node-7\\nnode-8\\n'\n"
SRUN = '#!/usr/bin/env bash\nshift\nexec "$@"\n'


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_launch_script_is_sound(script):
    checker = ["shellcheck"] if shutil.which("shellcheck") else ["bash", "-n"]
    subprocess.run([*checker, str(script)], check=True)


@pytest.fixture
def arguments(tmp_path):
    """Return a function that runs a launch file with stand-ins for the programs that it starts."""
    for name, text in (("python", PRINTS), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(script, *words, **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **variables}
        return subprocess.run(["bash", str(LAUNCH / script), *words], env=environment, capture_output=True, text=True)

    return run


def options_of(output):
    words = output.stdout.split("\n")
    return dict(pairwise(words)), words


def test_one_node_needs_no_setting_but_its_processes(arguments):
    options, words = options_of(arguments("torchrun.sh", "train", "a b.yaml", "loss.beta=1", PROCESSES="2"))
    assert (options["--nnodes"], options["--nproc_per_node"]) == ("1", "2")
    assert options["--rdzv_endpoint"] == "localhost:29500"
    assert words[-5:] == ["bfpo", "train", "a b.yaml", "loss.beta=1", ""]
    options, _ = options_of(arguments("accelerate.sh", "train", "a.yaml", PROCESSES="2"))
    assert (options["--num_machines"], options["--num_processes"]) == ("1", "2")
    assert Path(options["--config_file"]).samefile(LAUNCH.parent / "accelerate" / "fsdp2.yaml")


@pytest.mark.parametrize("script", ["torchrun.sh", "accelerate.sh"])
def test_a_launch_without_processes_or_recipe_says_what_to_set(script, arguments):
    result = arguments(script, "train", "a.yaml", PROCESSES="0")
    assert (result.returncode, "set PROCESSES" in result.stderr) == (2, True)
    result = arguments(script, "train")
    assert (result.returncode, "RECIPE [key=value ...]" in result.stderr) == (2, True)


def test_slurm_launches_the_second_of_two_nodes(arguments):
    slurm = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(LAUNCH.parents[1]),
    }
    options, words = options_of(arguments("slurm.sbatch", "train", "a.yaml", "loss.beta=1", **slurm))
    assert (options["--num_machines"], options["--machine_rank"], options["--num_processes"]) == ("2", "1", "16")
    assert (options["--main_process_ip"], options["--main_process_port"]) == ("node-7", "23456")
    assert words[-4:] == ["train", "a.yaml", "loss.beta=1", ""]
    options, _ = options_of(arguments("slurm.sbatch", "train", "a.yaml", LAUNCHER="torchrun", **slurm))
    assert (options["--nnodes"], options["--nproc_per_node"]) == ("2", "8")
    assert (options["--rdzv_endpoint"], options["--rdzv_id"]) == ("node-7:23456", "123456")


@pytest.fixture
def toy(tmp_path, monkeypatch, main_pairs):
    """Work in a folder with a recipe of two steps."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "main.jsonl", (pair.to_row() for pair in main_pairs))
    content = {
        "model": {"new": {"shape": "nano", "vocab_size": 300}},
        "data": [{"path": "main.jsonl"}],
        "loss": {"beta": 0.5},
        "trainer": {"output_dir": "runs/toy", "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1},
    }
    Path("toy.yaml").write_text(yaml.safe_dump(content))
    # The launch files start `python`.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} -W ignore "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def free_address():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return f"localhost:{server.getsockname()[1]}"


def processes_of(run):
    record = json.loads(Path(run, "run.json").read_text())
    return record["hardware"]["world_size"], record["steps"]


@pytest.mark.slow
def test_two_processes_run_by_accelerate(toy, monkeypatch):
    monkeypatch.setenv("PROCESSES", "2")
    monkeypatch.setenv("HEAD", free_address())
    monkeypatch.setenv("CONFIG", str(LAUNCH.parent / "accelerate" / "ddp.yaml"))
    subprocess.run(["bash", str(LAUNCH / "accelerate.sh"), "train", "toy.yaml"], check=True, timeout=300)
    assert processes_of("runs/toy") == (2, 2)


@pytest.mark.slow
def test_two_nodes_of_a_process_meet_by_torchrun(toy, monkeypatch):
    for name, value in (("PROCESSES", "1"), ("NODES", "2"), ("HEAD", free_address()), ("JOB", "toy")):
        monkeypatch.setenv(name, value)
    nodes = [subprocess.Popen(["bash", str(LAUNCH / "torchrun.sh"), "train", "toy.yaml"]) for _ in range(2)]
    try:
        assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    assert processes_of("runs/toy") == (2, 2)
