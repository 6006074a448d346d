"""Mutated inputs: each ends with success or with one message, never with a traceback or as a bug."""

import os
import random
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz

# Targets whose unmutated input is refused too: the file of a judge that needs a server, say.
REFUSED = {fuzz.judge_specs, fuzz.overrides, fuzz.losses, fuzz.tokenizer_files}
INPUTS, CPU_SECONDS = 2500, 120


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    with closing(fuzz.Toy(tmp_path_factory.mktemp("fuzz"))) as toy:
        yield toy


@pytest.mark.slow
def test_mutated_inputs_end_with_a_message(toy):
    # A fixed seed, so that a change is judged by the same inputs; FUZZ_SEED looks for new ones.
    seed = int(os.environ.get("FUZZ_SEED", "0"))
    lines = []
    counts, failures = fuzz.fuzz(toy, seed, INPUTS, most_seconds=CPU_SECONDS, show=lines.append)
    assert not failures, "python tests/reliability/fuzz.py " + "\n".join(lines)
    totals = sum(counts.values(), Counter())
    assert totals.total() >= 2000
    assert counts.keys() == {target.__name__ for target in fuzz.TARGETS}
    # Both outcomes are common: inputs aren't refused for one and the same reason.
    assert totals["accepted"] > 0.1 * totals.total()
    assert totals["refused"] > 0.3 * totals.total()


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in fuzz.TARGETS if target not in REFUSED])
def test_inputs_without_a_mutation_are_accepted(target, toy, monkeypatch):
    monkeypatch.setattr(fuzz, "mutate_yaml", lambda content, rng: fuzz.yaml.safe_dump(content).encode())
    monkeypatch.setattr(fuzz, "mutate_value", lambda content, rng: content)
    monkeypatch.setattr(fuzz, "mutate_bytes", lambda content, rng: content)
    monkeypatch.setattr(fuzz, "mutate_file", lambda name, rng: None)
    monkeypatch.setattr(fuzz, "mutate_table", lambda rows, file_format, rng: fuzz.table_bytes(rows, file_format))
    outcomes = []
    for number in range(8):
        toy.empty_box()
        outcomes.append(fuzz.run(target(toy, random.Random(number))))
    assert "accepted" in {outcome.kind for outcome in outcomes}, outcomes[-1].text[-500:]
