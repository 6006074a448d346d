"""Whole runs as processes: killed, stopped by SIGTERM, out of disk space, with several processes."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bfpo.core.files import file_hash, write_json, write_jsonl

pytestmark = pytest.mark.slow

OUT = Path("runs/toy")


@pytest.fixture
def recipe(tmp_path, monkeypatch, main_pairs, buffer_pairs):
    """Work in a folder with the toy data and a recipe of 40 steps that saves after each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_jsonl(tmp_path / "main.jsonl", (p.to_row() for p in main_pairs))
    write_jsonl(tmp_path / "buffer.jsonl", (p.to_row() for p in buffer_pairs))
    content = {
        "model": {"new": {"vocab_size": 300}},
        "data": [{"path": "main.jsonl"}],
        "buffer": [{"path": "buffer.jsonl"}],
        "loss": {"beta": 0.5},
        "holdout": 0.3,
        "trainer": {
            "output_dir": str(OUT),
            "max_steps": 40,
            "save_steps": 1,
            "save_total_limit": 3,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "learning_rate": 1e-3,
        },
    }
    Path("toy.yaml").write_text(yaml.safe_dump(content))
    return "toy.yaml"


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "bfpo", "train", "toy.yaml", *overrides]


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def steps_logged() -> int:
    file = OUT / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_run_killed_ten_times_ends_with_the_bits_of_an_unbroken_one(recipe):
    subprocess.run(command("trainer.output_dir=runs/unbroken"), check=True, capture_output=True)
    rng = random.Random(0)
    kills = 0
    while kills < 10 and not (OUT / "run.json").exists():
        before = steps_logged()
        process = subprocess.Popen(
            command("trainer.resume_from_checkpoint=true"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and steps_logged() in (before, 0):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        kills += 1
    assert kills >= 5
    subprocess.run(command("trainer.resume_from_checkpoint=true"), check=True, capture_output=True)
    assert file_hash(OUT / "model.safetensors") == file_hash(Path("runs/unbroken/model.safetensors"))
    assert losses(OUT) == losses(Path("runs/unbroken"))


def test_a_run_saves_on_sigterm_and_can_be_resumed(recipe):
    process = subprocess.Popen(command("trainer.save_steps=1000"), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while steps_logged() < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"stopped by SIGTERM: saved at step" in stderr
    assert b"Traceback" not in stderr
    subprocess.run(command("trainer.save_steps=1000", "trainer.resume_from_checkpoint=true"), check=True)
    subprocess.run(command("trainer.save_steps=1000", "trainer.output_dir=runs/unbroken"), check=True)
    assert file_hash(OUT / "model.safetensors") == file_hash(Path("runs/unbroken/model.safetensors"))


def test_a_full_disk_gives_one_message_and_keeps_the_last_complete_checkpoint(recipe):
    # A limit on file sizes simulates a full disk: the weights (2 MB) fit, the optimizer's state (4 MB) doesn't.
    subprocess.run(command("trainer.max_steps=3"), check=True, capture_output=True)
    result = subprocess.run(
        command("trainer.resume_from_checkpoint=true"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000)),
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "resume with trainer.resume_from_checkpoint=true" in result.stderr
    done = subprocess.run(command("trainer.resume_from_checkpoint=true"), check=True, capture_output=True, text=True)
    assert "resuming from runs/toy/checkpoint-3" in done.stdout


def launched(processes: int, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"),
        *(str(processes), *arguments),
    ]


# With small packs the processes have different numbers of them, and of backward passes.
@pytest.mark.parametrize(("processes", "max_tokens"), [(2, 100), (4, 60)])
def test_several_processes_give_the_numbers_of_one(recipe, processes, max_tokens):
    # Plain SGD without clipping: the order of float32 sums differs, and nothing amplifies the difference.
    plain = ["trainer.max_steps=3", "trainer.optim=sgd", "trainer.learning_rate=1e-4", "trainer.max_grad_norm=0"]
    plain += ["trainer.lr_scheduler_type=constant", "trainer.save_strategy='no'"]
    plain += [f"layout.max_tokens_per_pack={max_tokens}"]
    plain += [f"trainer.per_device_train_batch_size={8 // processes}"]
    single = ["trainer.output_dir=runs/one", f"trainer.gradient_accumulation_steps={processes}"]
    several = ["trainer.output_dir=runs/several"]
    # Each run scores its own reference, the second one with a pass that the processes share.
    subprocess.run(command(*plain, *single, "cache_dir=alone"), check=True, capture_output=True)
    subprocess.run(launched(processes, *command(*plain, *several)[3:]), check=True, capture_output=True)
    runs = [json.loads(Path(f"runs/{name}/run.json").read_text()) for name in ("one", "several")]
    assert [run["hardware"]["world_size"] for run in runs] == [1, processes]
    # Weights that differ in their last bit change margins by about 1e-6 of the log-probability.
    assert losses(Path("runs/several")) == pytest.approx(losses(Path("runs/one")), rel=1e-5)
    assert runs[1]["evaluation"]["main"]["loss"] == pytest.approx(runs[0]["evaluation"]["main"]["loss"], rel=1e-5)
    from safetensors.torch import load_file

    first, second = (load_file(f"runs/{name}/model.safetensors") for name in ("one", "several"))
    for name, tensor in first.items():
        assert (second[name] - tensor).norm() <= 1e-6 * tensor.norm()
    assert {entry.name for entry in Path("alone").iterdir()} == {
        entry.name for entry in Path("runs/cache/reference").iterdir()
    }


def test_the_largest_losses_are_those_of_all_processes(recipe):
    plain = ["trainer.max_steps=3", "trainer.optim=sgd", "trainer.learning_rate=1e-4", "trainer.max_grad_norm=0"]
    plain += ["trainer.lr_scheduler_type=constant", "trainer.save_strategy='no'", "loss.tail=0.3"]
    # Eight pairs of each stream: 2.4 of them count.
    single = ["trainer.output_dir=runs/one", "trainer.per_device_train_batch_size=8"]
    several = ["trainer.output_dir=runs/several", "trainer.per_device_train_batch_size=4"]
    subprocess.run(command(*plain, *single), check=True, capture_output=True)
    subprocess.run(launched(2, *command(*plain, *several)[3:]), check=True, capture_output=True)
    assert losses(Path("runs/several")) == pytest.approx(losses(Path("runs/one")), rel=1e-5)


def check_shards():
    """Check that two processes, `two`, made the numbers of one, `one`, each with half of the weights."""
    files = ("one/results-0.json", "two/results-0.json", "two/results-1.json")
    single, *ranks = (json.loads(Path(file).read_text()) for file in files)
    # Both processes make the same number of passes.
    assert [rank["weights"] for rank in ranks] == [single["weights"] / 2] * 2
    assert ranks[0]["passes"] == ranks[1]["passes"]
    assert ranks[0]["fillers"] + ranks[1]["fillers"] > 0 == single["fillers"]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(single["losses"], rel=1e-5)
        assert rank["eval_loss"] == pytest.approx(single["eval_loss"], rel=1e-5)
    from safetensors.torch import load_file

    sharded = load_file("two/model.safetensors")
    for name, tensor in load_file("one/model.safetensors").items():
        assert (sharded[name] - tensor).norm() <= 1e-6 * tensor.norm()


def test_sharded_weights_give_the_numbers_of_one_process(recipe):
    script = str(Path(__file__).with_name("sharded_run.py"))
    subprocess.run([sys.executable, script, "one"], check=True, capture_output=True)
    subprocess.run(launched(2, script, "two", "fsdp"), check=True, capture_output=True, timeout=120)
    check_shards()


def test_weights_sharded_by_deepspeed_give_the_numbers_of_one_process(recipe):
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    # Weights as small as these would stay whole.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    from_the_run = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")
    config = {"zero_optimization": zero, **dict.fromkeys((*from_the_run, "gradient_clipping"), "auto")}
    write_json(Path("zero3.json"), config)
    script = str(Path(__file__).with_name("sharded_run.py"))
    subprocess.run([sys.executable, script, "one"], check=True, capture_output=True)
    settings = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero3.json"}
    subprocess.run(
        launched(2, script, "two", "zero3"),
        check=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "DS_ACCELERATOR": "cpu", **settings},
    )
    check_shards()


def test_a_run_resumes_only_with_the_same_number_of_processes(recipe):
    options = ["trainer.max_steps=4", "trainer.save_steps=2", "trainer.per_device_train_batch_size=2"]
    resuming = "trainer.resume_from_checkpoint=true"
    subprocess.run(launched(2, *command(*options)[3:]), check=True, capture_output=True)
    weights = file_hash(OUT / "model.safetensors")
    refused = subprocess.run(command(*options, resuming), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "checkpoint-4 can't be continued: world_size was 2, now it is 1" in refused.stderr
    (OUT / "checkpoint-4/complete.json").unlink()
    done = subprocess.run(launched(2, *command(*options, resuming)[3:]), check=True, capture_output=True, text=True)
    assert done.stdout.count("resuming from runs/toy/checkpoint-2") == 1
    assert file_hash(OUT / "model.safetensors") == weights


def test_a_killed_process_ends_all_with_one_message(recipe):
    Path("killed.py").write_text(
        "import os, signal\n"
        "from dataclasses import dataclass\n"
        "from bfpo.losses.pairwise import BFPO\n"
        "@dataclass(frozen=True)\n"
        "class Killed(BFPO):\n"
        "    def __call__(self, pairs):\n"
        "        if pairs.chosen_logps.requires_grad and os.environ['RANK'] == '1':\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().__call__(pairs)\n"
    )
    result = subprocess.run(
        launched(2, *command("loss.name=killed:Killed", "trainer.save_strategy='no'")[3:]),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": f".{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr
    assert result.stderr.count("error: ") <= 1
    assert "[rank0]: Traceback" not in result.stderr


def test_one_process_with_a_bad_loss_stops_both(recipe, main_pairs):
    rows = [pair.to_row() for pair in main_pairs]
    Path("broken.py").write_text(
        "import torch\n"
        "from dataclasses import dataclass\n"
        "from bfpo.losses.pairwise import BFPO\n"
        "@dataclass(frozen=True)\n"
        "class Broken(BFPO):\n"
        "    def __call__(self, pairs):\n"
        "        return torch.where(pairs.chosen_safe > pairs.rejected_safe, torch.nan, super().__call__(pairs))\n"
    )
    write_jsonl(Path("main.jsonl"), rows)
    result = subprocess.run(
        launched(2, *command("loss.name=broken:Broken", "trainer.per_device_train_batch_size=1")[3:]),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": f".{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert result.returncode != 0
    assert result.stderr.count("the loss is not finite for rows") == 1
    assert not re.search(r"\[rank\d\]: Traceback", result.stderr)


def test_a_killed_reference_pass_resumes_and_a_damaged_entry_is_refused(recipe, main_pairs):
    first = main_pairs[0].to_row()
    rows = ({**first, "row_id": None, "prompt": f"box {number}"} for number in range(800))
    write_jsonl(Path("main.jsonl"), rows)
    overrides = ["trainer.max_steps=2", "holdout=0.0", "reference=cache", "trainer.save_strategy='no'"]
    subprocess.run(command(*overrides, "cache_dir=unbroken"), check=True, capture_output=True)
    process = subprocess.Popen(command(*overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(Path("runs").rglob("parts/000001.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    (entry,) = Path("runs/cache/reference").iterdir()
    assert not (entry / "entry.json").exists()
    subprocess.run(command(*overrides), check=True, capture_output=True)
    (unbroken,) = Path("unbroken").iterdir()
    assert file_hash(entry / "values.npy") == file_hash(unbroken / "values.npy")
    assert entry.name == unbroken.name
    (entry / "values.npy").write_bytes((entry / "values.npy").read_bytes()[:-100])
    refused = subprocess.run(command(*overrides), capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"error: reference cache {entry}: values.npy is cut or damaged: its hash is not the one in entry.json; "
        "delete that folder, and it is computed again"
    ]
