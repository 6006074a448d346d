"""`bfpo redteam` and `bfpo label` as processes that are killed at random moments: no row is lost or made twice."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bfpo.core.files import write_jsonl
from bfpo.redteam.run import STEPS

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
        if prompt == STEPS[2]:
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
    assert {"pairs.jsonl", "completions.jsonl", "guided-3.jsonl"} < set(whole)
    judged = {name.partition("@")[0] for name in whole if "@" in name}
    assert judged == {"verdicts-rubric-judge", "verdicts-rubric-strict", "guided-verdicts-rubric-judge"}
    assert len(whole["completions.jsonl"].splitlines()) == 150
    assert costs["whole"] == 150 + sum(len(whole[f"guided-{step}.jsonl"].splitlines()) for step in (1, 2, 3))
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
