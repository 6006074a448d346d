"""A run on data that aren't held gives the numbers of a run on data in memory, bit by bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.core.pairs import PairSignals
from bfpo.data import scan, token_files
from bfpo.data.load import Reason
from bfpo.data.prepare import prepare
from bfpo.data.stored_pairs import StoredPairs
from bfpo.errors import DataError
from bfpo.losses.build import make_loss
from bfpo.training import run
from bfpo.training.relabel import relabel
from bfpo.training.run import run_training
from bfpo.training.tables import remove_untrained, tokenize_pairs

NEW = {"new": {"shape": "nano", "vocab_size": 300}}
TRAINER = {
    "output_dir": "runs/toy",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "use_cpu": True,
}


@pytest.fixture(autouse=True)
def data(main_pairs, buffer_pairs, tmp_path, monkeypatch):
    """Files of both streams with harms, scores, a pair that has to be dropped, and one that is truncated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_files, "CHUNK", 4)
    monkeypatch.setattr(scan, "PIECE", 1000)
    monkeypatch.setattr(scan, "_cores", lambda: 1)
    scores = [PairSignals(n / 20, 1 - n / 30, 0.5 if n % 2 else None, 0.4, 0.6, reward_margin=n) for n in range(12)]
    harms = [("toys",), (), ("noise", "toys")] * 4
    main = [
        replace(pair, signals=signals, harm_categories=names)
        for pair, signals, names in zip(main_pairs, scores, harms, strict=True)
    ]
    main[3] = replace(main[3], chosen="a <|im_end|> b")
    main[5] = replace(main[5], rejected="a red box " * 90)
    plain = [
        replace(pair, prompt=pair.prompt, provenance=replace(pair.provenance, stream=None)) for pair in main_pairs
    ]
    write_jsonl(tmp_path / "main.jsonl", ({**pair.to_row(), "stream": None} for pair in main))
    write_jsonl(tmp_path / "plain.jsonl", ({**pair.to_row(), "prompt": f"p {n}"} for n, pair in enumerate(plain)))
    write_jsonl(tmp_path / "buffer.jsonl", (pair.to_row() for pair in buffer_pairs))


def recipe(**changes):
    content = {
        "model": NEW,
        "data": [{"path": "main.jsonl"}, {"path": "plain.jsonl"}],
        "buffer": [{"path": "buffer.jsonl"}],
        "holdout": 0.3,
        "max_dropped": 0.5,
        "loss": {"name": "bfpo", "beta": 0.5},
        "text": {"max_length": 100},
        "trainer": TRAINER,
    }
    return check_recipe(content | changes, TrainRecipe, "toy")


def tables(of, tokenizer, *, max_held, cache):
    loss = make_loss(of.loss.model_dump())
    prepared = prepare(of, max_held=max_held)
    labels = relabel(of, prepared, None)
    remove_untrained(prepared, loss)
    return prepared, tokenize_pairs(of, prepared, tokenizer, loss, cache=cache), prepared.manifest() | labels


def assert_equal(table, expected):
    for field in fields(expected):
        ours, theirs = getattr(table, field.name), getattr(expected, field.name)
        if field.name == "signals":
            assert ours.keys() == theirs.keys()
            for name in theirs:
                np.testing.assert_array_equal(ours[name], theirs[name])
        elif isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert (list(ours) if field.name == "row_ids" else ours) == (
                list(theirs) if field.name == "row_ids" else theirs
            )
    for name in ("fingerprint", "largest_id", "longest", "longest_span"):
        assert getattr(table, name) == getattr(expected, name)
    np.testing.assert_array_equal(table.scored, expected.scored)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"labels": {"from": "safety"}, "data": [{"path": "plain.jsonl", "fraction": 0.8}], "max_eval": 2},
        {"loss": {"name": "dpo", "beta": 0.5}, "data": [{"path": "main.jsonl"}], "buffer": [], "safety": "scores"},
    ],
    ids=["two streams", "safe answer first", "scores"],
)
def test_tables_are_those_of_held_pairs(changes, tokenizer, tmp_path, monkeypatch):
    of = recipe(**changes)
    held, expected, manifest = tables(of, tokenizer, max_held=None, cache=None)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        prepared, found, ours = tables(of, tokenizer, max_held=2, cache=cache)
        assert isinstance(prepared.parts[0].train, StoredPairs)
        assert_equal(found.train, expected.train)
        assert found.eval.keys() == expected.eval.keys() != set()
        for name, table in expected.eval.items():
            assert_equal(found.eval[name], table)
        assert (found.samples, ours) == (expected.samples, manifest)
        assert list(prepared.train) == held.train
        assert list(prepared.eval) == held.eval
        # The second run with a cache tokenizes nothing.
        if cache is not None:
            monkeypatch.setattr(token_files.Encoder, "_encode_chunk", None)
    assert isinstance(found.train.ids, np.memmap)
    assert found.train.row_ids[1:3][0] == list(found.train.row_ids)[1]


def test_two_processes_may_join_the_parts_at_once(tokenizer, tmp_path, monkeypatch):
    _, expected, _ = tables(recipe(), tokenizer, max_held=2, cache=tmp_path / "one")
    join, ids_file = token_files._Entry._join, token_files._Entry._ids_file
    has_joined = []

    def late(entry, number):
        # Another process joins while this one begins to read the parts.
        if not has_joined:
            has_joined.append(True)
            join(entry)
        return ids_file(entry, number)

    def late_join(entry):
        monkeypatch.setattr(token_files._Entry, "_ids_file", late)
        join(entry)

    monkeypatch.setattr(token_files._Entry, "_join", late_join)
    _, found, _ = tables(recipe(), tokenizer, max_held=2, cache=tmp_path / "two")
    assert has_joined
    assert_equal(found.train, expected.train)


def test_what_is_dropped_is_counted_in_the_reports(tokenizer, tmp_path):
    prepared, _, _ = tables(recipe(), tokenizer, max_held=2, cache=tmp_path)
    report = prepared.parts[0].report
    assert report.dropped[Reason("end-of-sequence token inside an answer", "uu")] == 1
    assert sum(count for reason, count in report.noted.items() if "truncated" in reason.text) == 1
    (entry, *_) = sorted(tmp_path.iterdir())
    content = bytearray((entry / "ids.bin").read_bytes())
    content[0] ^= 1
    (entry / "ids.bin").write_bytes(content)
    with pytest.raises(DataError, match="are damaged; delete that folder"):
        tables(recipe(), tokenizer, max_held=2, cache=tmp_path)


def test_an_interrupted_pass_goes_on_and_processes_share_the_work(tokenizer, tmp_path, monkeypatch):
    of = recipe()
    expected = tables(of, tokenizer, max_held=None, cache=None)[1].train
    encoded = []
    encode = token_files.Encoder.encode

    def encode_some(self, records, report, *rest):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(records))
        return encode(self, records, report, *rest)

    monkeypatch.setattr(token_files.Encoder, "encode", encode_some)
    with pytest.raises(KeyboardInterrupt):
        tables(of, tokenizer, max_held=2, cache=tmp_path)
    # A part that was cut off counts as missing.
    (part, *_) = sorted(tmp_path.rglob("*.npz"))
    part.write_bytes(part.read_bytes()[:-50])
    encoded.clear()
    monkeypatch.setattr(token_files.Encoder, "encode", lambda *given: encoded.append(1) or encode(*given))
    found = tables(of, tokenizer, max_held=2, cache=tmp_path)[1].train
    assert_equal(found, expected)
    assert not list(tmp_path.rglob("parts"))
    shares = []
    for rank in range(2):
        encoded.clear()
        prepared = prepare(of, max_held=2)
        sources = [(part.train, part.report) for part in prepared.parts]
        encoder = token_files.Encoder(tokenizer, of.text, tmp_path / "shared")
        folder = encoder.entry_folder([token_files.SCHEMA, token_files.CHUNK, [pairs.key for pairs, _ in sources]])
        entry = token_files._Entry(folder, encoder, sources, (rank, 2))
        own = [number for number in range(len(entry._chunks)) if number % 2 == rank]
        entry._fill(own, lambda count: None)
        shares.append(len(encoded))
    assert shares == [-(-len(entry._chunks) // 2), len(entry._chunks) // 2]
    encoded.clear()
    tokens = token_files.tokenize_stored(encoder, sources)
    assert not encoded
    np.testing.assert_array_equal(tokens.ids, expected.ids)


@pytest.mark.slow
def test_a_whole_run_has_the_same_numbers(tmp_path, monkeypatch):
    results = []
    for max_held in (100, 2):
        monkeypatch.setattr(run, "MAX_HELD", max_held)
        results.append(run_training(recipe(max_eval=3)))
        (tmp_path / "runs" / "toy").rename(tmp_path / f"run-{max_held}")
    held, stored = results
    for key in ("evaluation", "train_loss", "data", "start_check", "sources"):
        assert stored.get(key) == held.get(key)
    weights = [(tmp_path / f"run-{number}" / "model.safetensors").read_bytes() for number in (100, 2)]
    assert weights[0] == weights[1]
    manifests = [(tmp_path / f"run-{number}" / "data_manifest.json").read_text() for number in (100, 2)]
    assert manifests[0] == manifests[1]


KILLED = """
import sys
from bfpo.data import scan, token_files
scan.PIECE, scan._cores = 1000, lambda: 1
import bfpo.commands.data as data
data.MAX_HELD = 2
from pathlib import Path
data.prepare_recipe(Path("recipe.yaml"), [], Path("out"), limit=None)
"""


@pytest.mark.slow
def test_a_preparation_that_is_killed_at_any_moment_ends_with_the_same_files(tmp_path):
    rows = [
        {"prompt": f"p {n % 900}", "chosen": f"c {n % 7}", "rejected": f"r {n % 5}", "is_chosen_safe": n % 3 > 0}
        | {"is_rejected_safe": n % 2 > 0}
        for n in range(3000)
    ]
    write_jsonl(tmp_path / "many.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text("data: [{path: many.jsonl}]\nholdout: 0.2\nconflicts: keep\n")
    subprocess.run([sys.executable, "-c", KILLED], check=True, stdout=subprocess.DEVNULL)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert set(whole) == {"pairs.jsonl", "eval.jsonl", "data_manifest.json"}
    shutil.rmtree(tmp_path / "out")
    pieces = -(-(tmp_path / "many.jsonl").stat().st_size // 1000)
    kills = 0
    for target in (1, pieces // 4, pieces // 2, None):
        with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.DEVNULL) as process:
            while target is not None and process.poll() is None:
                if len(list((tmp_path / "out").rglob("*.npz"))) >= target:
                    os.kill(process.pid, signal.SIGKILL)
                    break
            process.wait()
        kills += process.returncode == -signal.SIGKILL
    # A process may be faster than the look at its files.
    assert kills >= 2
    assert process.returncode == 0
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
    assert found == whole
    assert json.loads(found["data_manifest.json"])["sources"][0]["pairs_read"] == 3000
    assert not list((tmp_path / "out").glob("*unfinished*"))
