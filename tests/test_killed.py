"""Commands as processes that are killed with SIGKILL: no row is lost or made twice."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bfpo.core.chain import INSTRUCTIONS
from bfpo.core.files import write_jsonl

sys.path.insert(0, str(Path(__file__).parent / "generation"))
from faulty_server import faulty_server

KILLS = 4
# Maximum number of requests that are open, or answered and not yet written, when a process is killed.
OPEN_REQUESTS = 24


def text_of(body):
    """Answer a request as the red-teamed model or as a judge."""
    time.sleep(0.01)
    prompt = body["messages"][-1]["content"]
    if body["model"] == "toy":
        if prompt == INSTRUCTIONS["answer"]:
            return "sorry , but here is a lamp ."
        return f"{'step' if 'stuck' in prompt or body['seed'] % 3 == 0 else 'lamp'} {body['seed'] % 97}"
    answer = prompt.split("ANSWER\n")[1].split("\nEND ")[0]
    unsafe = "step" in answer or (body["model"] == "strict" and answer.endswith("3"))
    return json.dumps(
        {"unsafe": unsafe, "refusal": "sorry" in answer, "helpfulness": 1 + len(answer) % 10, "category": None}
    )


def run_killed(arguments, counts, most_requests):
    """Run a command until it ends, killed at its start and after random numbers of requests; return the kills."""
    rng = random.Random(0)
    targets = sorted(rng.randrange(1, most_requests) for _ in range(KILLS - 1))
    kills = 0
    for number, target in enumerate([0, *targets, None]):
        with subprocess.Popen(
            [sys.executable, "-m", "bfpo", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            if number == 0:
                time.sleep(rng.uniform(0, 0.5))
            while target is not None and counts["requests"] < target and process.poll() is None:
                time.sleep(0.002)
            if target is not None:
                process.kill()
            output, _ = process.communicate(timeout=60)
            kills += process.returncode == -signal.SIGKILL
    assert process.returncode == 0, output
    return kills


def run_whole_and_killed(counts, command_into, tmp_path):
    """Run a command once without and once with kills; return the written rows and the number of requests of both."""
    files, requests = [], []
    for name in ("whole", "killed"):
        counts["requests"] = 0
        command = command_into(tmp_path / name)
        if name == "whole":
            subprocess.run([sys.executable, "-m", "bfpo", *command], check=True, stdout=subprocess.DEVNULL)
        else:
            # The last target may be reached only at the end.
            assert run_killed(command, counts, requests[0]) >= KILLS - 1
        requests.append(counts["requests"])
        files.append({file.name: file.read_bytes() for file in (tmp_path / name).glob("*.jsonl*")})
    assert requests[0] <= requests[1] <= requests[0] + KILLS * OPEN_REQUESTS
    return files, requests


@pytest.mark.slow
def test_a_red_team_run_killed_at_random_moments(tmp_path):
    for kind, word, number in (("harmful", "stuck", 10), ("harmful", "mixed", 20), ("benign", "small", 20)):
        with (tmp_path / f"{kind}.txt").open("a") as file:
            file.writelines(f"{word} box {i}\n" for i in range(number))
    with faulty_server(text_of=text_of) as (url, counts):

        def command_into(out):
            recipe = {
                "out": str(out),
                "model": {"path": "toy", "server": url, "concurrency": 4},
                "prompts": [
                    {"name": "file", "path": str(tmp_path / f"{kind}.txt"), "kind": kind}
                    for kind in ("harmful", "benign")
                ],
                "judge": f"rubric:judge@{url}",
                "helpfulness": f"rubric:strict@{url}",
                "samples": 3,
            }
            file = out.with_suffix(".yaml")
            file.write_text(json.dumps(recipe))
            return ["redteam", str(file)]

        (whole, killed), _ = run_whole_and_killed(counts, command_into, tmp_path)
    costs = Counter()
    for name, files in (("whole", whole), ("killed", killed)):
        costs[name] = json.loads(files.pop("cost.jsonl"))["generations"]
    assert whole == killed
    assert {"pairs.jsonl", "completions.jsonl", "guided-3.jsonl", "guided.jsonl"} < set(whole)
    judged = {name.partition("@")[0] for name in whole if "@" in name}
    assert judged == {"verdicts-rubric-judge", "verdicts-rubric-strict", "guided-verdicts-rubric-judge"}
    assert len(whole["completions.jsonl"].splitlines()) == 150
    assert costs["whole"] == 150 + sum(len(whole[f"guided-{step}.jsonl"].splitlines()) for step in (1, 2, 3, 4))
    # The last second of a killed start may not be counted, and repeated generations count twice.
    assert costs["killed"] > costs["whole"] / 2
    metadata = [json.loads((tmp_path / name / "redteam.json").read_text()) for name in ("whole", "killed")]
    assert metadata[0].pop("cost")["replaced"] == metadata[1].pop("cost")["replaced"]
    assert metadata[0] == metadata[1]


@pytest.mark.slow
def test_labeling_killed_at_random_moments(tmp_path):
    rows = [
        {"prompt": f"small box {i}", "chosen": f"{'step' if i % 3 else 'lamp'} {i}", "rejected": f"lamp {i % 7} {i}"}
        for i in range(60)
    ]
    write_jsonl(tmp_path / "p.jsonl", rows)
    with faulty_server(text_of=text_of) as (url, counts):
        judges = [f"--judge=rubric:{judge}@{url}" for judge in ("judge", "strict")]
        (whole, killed), requests = run_whole_and_killed(
            counts, lambda out: ["label", str(tmp_path / "p.jsonl"), *judges, "--out", str(out)], tmp_path
        )
    assert whole == killed
    assert sorted(len(content.splitlines()) for name, content in whole.items() if "verdicts" in name) == [120, 120]
    assert requests[0] == 240
    metadata = [json.loads((tmp_path / name / "label.json").read_text()) for name in ("whole", "killed")]
    assert metadata[0].pop("seconds") >= 0
    assert metadata[1].pop("seconds") >= 0
    assert metadata[0] == metadata[1]
    assert 0 < metadata[0]["labeled"] < 60


# Small steps of the testbed: pretraining in seconds. Worker processes import this file too, as `__mp_main__`.
SMALL_RUN = """
from bfpo.experiments import steps
steps.BASE_STEPS.update(pretraining=10, base=5)
if __name__ == "__main__":
    from bfpo.commands.app import main
    main()
"""
WORLD = {
    "pretraining": 60,
    "fine_tuning": 40,
    "safety_pairs": 40,
    "helpful_pairs": 40,
    "harmful_prompts": 6,
    "benign_prompts": 6,
    "lookalike_prompts": 6,
}


def files_of(folder, *patterns):
    """Return the modification times of files, by path within a folder."""
    files = [file for pattern in patterns for file in folder.rglob(pattern)]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


def finished_units(folder):
    """Return the modification times of `run.json` and `results.json` of the finished units of an experiment.

    A method's unit is its run and its evaluation: one that was killed in between is run again.
    """
    times = files_of(folder, "run.json", "results.json")
    return {
        name: time
        for name, time in times.items()
        if not Path(name).parent.name.startswith("run-")
        or (folder / name).with_name("evaluation").joinpath("results.json").exists()
    }


def count_files(folder, pattern):
    """Return the number of files in a folder in which another process renames and removes folders."""
    with contextlib.suppress(FileNotFoundError):
        return len(list(folder.rglob(pattern)))
    return 0


def completed_texts(file):
    """Return prompt id and text of every completion of a file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(row["prompt_id"], row["text"]) for row in rows]


def run_until(command, is_reached, cwd=None):
    """Run a command, and kill it with its workers when a condition is met; return the exit code."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=cwd
    ) as process:
        while process.poll() is None and not is_reached():
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), output
    return process.returncode


@pytest.mark.slow
def test_an_experiment_killed_at_its_stages(tmp_path):
    (tmp_path / "small.py").write_text(SMALL_RUN)

    def command_into(out):
        recipe = {
            "out": str(out),
            "worlds": {"shared": WORLD},
            "seeds": [0, 1],
            "against": "dpo",
            "steps": 3,
            "jobs": 1,
            "variants": {"bfpo": {"method": "bfpo"}, "dpo": {"method": "dpo_h"}},
        }
        file = out.with_suffix(".yaml")
        file.write_text(json.dumps(recipe))
        return [sys.executable, str(tmp_path / "small.py"), "experiment", str(file)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command_into(whole), check=True, stdout=subprocess.DEVNULL)
    command, kept = command_into(killed), {}
    # After the first base model, and in a training after the first evaluation of a method.
    for pattern, number in (("base/run.json", 1), ("run-*/metrics.jsonl", 2)):
        assert run_until(command, lambda: count_files(killed, pattern) >= number) == -signal.SIGKILL  # noqa: B023
        before, kept = kept, finished_units(killed)
        # What a killed start finished is neither lost nor made again.
        assert before.items() <= kept.items()
    assert run_until(command, lambda: False) == 0
    assert kept.items() <= finished_units(killed).items()
    assert finished_units(killed).keys() == finished_units(whole).keys()
    comparisons = [json.loads((out / "comparison.json").read_text()) for out in (whole, killed)]
    assert comparisons[0]["lines"] == comparisons[1]["lines"]
    # Every evaluation has each prompt once, and the same text as without a kill.
    for file in whole.rglob("completions.jsonl"):
        texts = completed_texts(file)
        assert texts == completed_texts(killed / file.relative_to(whole))
        assert len(texts) == len({prompt_id for prompt_id, _ in texts}) == 18


@pytest.mark.slow
def test_red_team_rounds_killed_at_their_stages(tmp_path, tokenizer, make_model):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "judges.py").write_text(JUDGE)
    for kind in ("harmful", "benign"):
        (tmp_path / f"{kind}.txt").write_text("".join(f"{kind} red box {i}\n" for i in range(6)))

    def command_into(out):
        recipe = {
            "out": str(out),
            "model": {"path": str(tmp_path / "model")},
            "prompts": [
                {"name": "file", "path": str(tmp_path / f"{kind}.txt"), "kind": kind}
                for kind in ("harmful", "benign")
            ],
            "judge": "judges:Parity",
            "samples": 3,
            "max_new_tokens": 200,
            "rounds": 2,
            "train": {"loss": {"name": "bfpo"}, "max_dropped": 0.9, "trainer": {"max_steps": 4, "use_cpu": True}},
        }
        file = out.with_suffix(".yaml")
        file.write_text(json.dumps(recipe))
        return [sys.executable, "-m", "bfpo", "redteam", str(file)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command_into(whole), check=True, stdout=subprocess.DEVNULL, cwd=tmp_path)
    command = command_into(killed)
    for pattern in ("round-1/completions.jsonl*", "round-1/model/metrics.jsonl", "round-2/completions.jsonl*"):
        assert run_until(command, lambda: list(killed.glob(pattern)), cwd=tmp_path) == -signal.SIGKILL  # noqa: B023
    assert run_until(command, lambda: False, cwd=tmp_path) == 0
    for number in (1, 2):
        path = f"round-{number}/completions.jsonl"
        assert len(completed_texts(whole / path)) == 36
        assert completed_texts(whole / path) == completed_texts(killed / path)
        path = f"round-{number}/pairs.jsonl"
        assert (whole / path).read_bytes() == (killed / path).read_bytes()
    # One model was trained between the rounds, in one folder.
    models = [sorted(path.name for path in (out / "round-1").glob("model*")) for out in (whole, killed)]
    assert models[0] == models[1] == ["model"]


# A judge without a model: half of the completions are unsafe.
JUDGE = """
from bfpo.core.samples import Verdict


class Parity:
    name, revision = "parity", "1"

    def judge(self, completions):
        for completion in completions:
            yield Verdict.on(completion, self, safe=len(completion.text) % 2 == 0, refusal=False)
"""
