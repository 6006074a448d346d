"""Scanning in pieces gives what reading row by row gave: pairs, order, counts, manifest and split."""

import json
import random
from collections import defaultdict

import numpy as np
import pytest

from bfpo.config.recipes import DataRecipe, Source
from bfpo.core.conversation import in_nfc, last_request, prompt_key
from bfpo.core.files import write_jsonl
from bfpo.data import scan
from bfpo.data.clean import is_among
from bfpo.data.facts import ARRAYS, FactsBuilder, PlainPair, fault_of, join_facts
from bfpo.data.load import Reason, load_pairs
from bfpo.data.plain_rows import NotReadable, read_piece
from bfpo.data.prepare import cell_counts, is_held_out, prepare, write_prepared
from bfpo.data.rows import read_rows
from bfpo.data.stored_pairs import PairChain, StoredPairs, with_first_prompts
from bfpo.errors import DataError

WORDS = ("red", "box", "Lamp", "caf\u00e9", "cafe\u0301", "\u201cdoor\u201d", "a\u00a0b", "<b>", "[1]", "\U0001f600")


def random_rows(number, seed, *, labels=True):
    """Return rows with duplicates, contradictions, faults, thoughts, messages, origins and harms."""
    rng = random.Random(seed)

    def text(most=2):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    rows = []
    for _ in range(number):
        row = {"prompt": text(), "chosen": text(), "rejected": text()}
        if labels:
            row |= {"is_chosen_safe": rng.random() < 0.7, "is_rejected_safe": rng.random() < 0.5}
        match rng.randrange(24):
            case 0:
                row["prompt"] = rng.choice(["", " ", "\u2000"])
            case 1:
                row[rng.choice(["chosen", "rejected"])] = rng.choice(["", " \n", "\t"])
            case 2:
                row["rejected"] = f" {row['chosen']} "
            case 3:
                row["chosen"] = f"<think>{text()}</think>{text()}"
            case 4:
                row["prompt"] = [{"role": "user", "content": text()}]
            case 5:
                turns = [{"role": "assistant", "content": text()}, {"role": "user", "content": text()}]
                row["prompt"] = [{"role": "user", "content": text()}, *turns]
            case 6:
                row["system"] = text()
            case 7:
                row |= {
                    "dataset_name": rng.choice(["x", "y", ""]),
                    "safety_label_source": rng.choice(["human", None]),
                }
            case 8:
                row["harm_categories"] = ["toys"]
            case 9:
                row["prompt"] = json.dumps([{"role": "user", "content": text()}])
            case 10:
                row["reward_margin"] = 0.5
            case 11 if labels:
                row["is_chosen_safe"] = int(row["is_chosen_safe"])
            case 12:
                row["prompt"] += "\ud800"
        rows.append(row)
    return rows


def write(path, rows, seed):
    """Write rows as different programs write them, with empty lines."""
    rng = random.Random(seed)
    lines = []
    for row in rows:
        is_escaped = "\ud800" in str(row["prompt"]) or rng.random() < 0.3
        end = rng.choice(["\n", "\n", "\r\n", "\n\n", "\r", "\n  \n"])
        lines.append(json.dumps(row, ensure_ascii=is_escaped) + end)
    path.write_bytes("".join(lines).encode())


def cleaned_row_by_row(sources, conflicts):
    """Clean pairs with sets of texts, as earlier versions did; return them with counts by source."""
    labels, orders = defaultdict(set), set()
    for pairs in sources:
        for pair in pairs:
            question, (chosen, rejected) = (in_nfc(pair.prompt), pair.inputs), map(in_nfc, pair.answers)
            orders.add((question, chosen, rejected))
            if pair.labels is not None:
                labels[question, chosen].add(pair.labels.chosen)
                labels[question, rejected].add(pair.labels.rejected)
    seen, kept, counts = set(), [], []
    for pairs in sources:
        kept.append([])
        counts.append({"removed": {}, "dropped": {}, "noted": {}})
        for pair in pairs:
            key = (pair.provenance.stream, pair.row_id, pair.labels)
            question, (chosen, rejected) = (in_nfc(pair.prompt), pair.inputs), map(in_nfc, pair.answers)
            conflict = None
            if any(len(labels.get((question, answer), ())) > 1 for answer in (chosen, rejected)):
                conflict = "an answer is labeled both safe and unsafe"
            elif (question, rejected, chosen) in orders:
                conflict = "the pair occurs in both orders"
            fault = fault_of(pair)
            outcome = reason = None
            if key in seen:
                outcome, reason = "removed", "duplicate"
            elif fault or (conflict and conflicts == "drop"):
                outcome, reason = "dropped", fault or conflict
            elif conflict:
                outcome, reason = "noted", f"kept though {conflict}"
            seen.add(key)
            if outcome:
                count = counts[-1][outcome]
                count[Reason(reason, pair.cell)] = count.get(Reason(reason, pair.cell), 0) + 1
            if outcome in (None, "noted"):
                kept[-1].append(pair)
    return kept, counts


@pytest.fixture
def recipe(tmp_path):
    sources = {}
    for name, number, labels in (("a", 240, True), ("b", 160, True), ("help", 120, False), ("e", 30, True)):
        write(tmp_path / f"{name}.jsonl", random_rows(number, name, labels=labels), name)
        sources[name] = Source(path=str(tmp_path / f"{name}.jsonl"), assume_safe=not labels)
    sampled = sources["b"].model_copy(update={"fraction": 0.7, "seed": 3})
    return {"data": [sources["a"], sampled], "buffer": [sources["help"]], "eval": [sources["e"]]}


@pytest.mark.parametrize("conflicts", ["drop", "keep"])
@pytest.mark.parametrize("max_held", [None, 50])
def test_all_numbers_are_those_of_reading_row_by_row(recipe, conflicts, max_held, monkeypatch, tmp_path):
    monkeypatch.setattr(scan, "PIECE", 5000)
    monkeypatch.setattr(scan, "_cores", lambda: 1)
    options = {"conflicts": conflicts, "holdout": 0.3, "leaks": "drop", "max_dropped": 0.99}
    data = prepare(DataRecipe(**recipe, **options), max_held=max_held, cache=tmp_path / "cache")
    assert isinstance(data.parts[0].train, StoredPairs) == (max_held is not None)

    loaded = [load_pairs(source, "main") for source in recipe["data"]]
    loaded += [load_pairs(source, "buffer") for source in recipe["buffer"]]
    (eval_report, eval_pairs), *_ = [load_pairs(source, "main") for source in recipe["eval"]]
    kept, counts = cleaned_row_by_row([pairs for _, pairs in loaded], conflicts)
    (evaluated,), (eval_counts,) = cleaned_row_by_row([eval_pairs], conflicts)
    keys = {pair.prompt_key for pair in evaluated}
    trained, held_out = [], []
    for pairs, count, (report, _), part in zip(kept, counts, loaded, data.parts, strict=False):
        train = [pair for pair in pairs if not is_held_out(pair.prompt_key, 0.3)]
        leaks = [pair for pair in train if {pair.prompt_key, prompt_key(last_request(pair.prompt))} & keys]
        for pair in leaks:
            reason = Reason("prompt of an evaluation set", pair.cell)
            count["removed"][reason] = count["removed"].get(reason, 0) + 1
        trained += [pair for pair in train if pair not in leaks]
        held_out += [pair for pair in pairs if is_held_out(pair.prompt_key, 0.3)]
        assert (part.report.read, part.report.taken) == (report.read, report.taken)
        assert part.report.skipped == report.skipped
        for name, expected in count.items():
            # In the order in which each reason first occurs.
            assert list(getattr(part.report, name).items()) == list(expected.items())
    assert list(data.train) == trained
    assert list(data.eval) == held_out + evaluated
    assert data.parts[-1].report.dropped == eval_counts["dropped"]
    assert all(part.report.removed.total() and part.report.dropped.total() for part in data.parts[:2]) or (
        conflicts == "keep"
    )
    assert data.parts[0].report.skipped.total()
    assert eval_report.read
    assert data.manifest()["train"] == cell_counts(trained)
    sources = [pair.provenance.safety_label_source for pair in trained]
    assert list(data.manifest()["label_sources"].items()) == [
        (name, sources.count(name)) for name in dict.fromkeys(sources)
    ]

    paths = write_prepared(data, tmp_path / "out")
    write_jsonl(tmp_path / "expected.jsonl", (pair.to_row() for pair in trained))
    assert paths[0].read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    # What was written is read back in pieces, too: every column of it is known.
    again = prepare(DataRecipe(data=[Source(path=str(paths[0]))], conflicts="keep"), max_held=0)
    assert list(again.train) == trained


def test_a_later_run_reads_no_rows_again(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(scan, "PIECE", 5000)
    monkeypatch.setattr(scan, "_cores", lambda: 1)
    source, cache = recipe["data"][0], tmp_path / "cache"
    first = scan.scan_source(source, "main", cache=cache, max_held=0)
    files = sorted(cache.rglob("*.npz"))
    assert len(files) > 3
    monkeypatch.setattr(scan, "read_piece", None)
    # Nor does it start processes, through whose pipes the arrays would come.
    monkeypatch.setattr(scan, "_cores", lambda: 2)
    monkeypatch.setattr(scan, "ProcessPoolExecutor", None)
    again = scan.scan_source(source, "main", cache=cache, max_held=0)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again.facts, name), getattr(first.facts, name))
    assert (again.facts.provenances, again.report) == (first.facts.provenances, first.report)
    # A piece that is missing or damaged, as after a kill or on a full disk, is read again.
    monkeypatch.undo()
    monkeypatch.setattr(scan, "PIECE", 5000)
    monkeypatch.setattr(scan, "_cores", lambda: 2)
    files[1].write_bytes(files[1].read_bytes()[:-300])
    for file in (files[0], files[2]):
        file.unlink()
    (cache / "rows" / f".{files[0].name}.1.tmp").write_bytes(b"killed")
    damaged = scan.scan_source(source, "main", cache=cache, max_held=0)
    assert damaged.facts.row_hashes.tolist() == first.facts.row_hashes.tolist()
    # Another content has another key.
    with open(source.path, "a") as file:
        file.write(
            json.dumps(
                {"prompt": "q", "chosen": "a", "rejected": "b"} | {"is_chosen_safe": True, "is_rejected_safe": True}
            )
        )
    assert len(scan.scan_source(source, "main", cache=cache, max_held=0).facts) == len(first.facts) + 1


def test_processes_give_what_one_process_gives(recipe, monkeypatch):
    monkeypatch.setattr(scan, "PIECE", 5000)
    found = []
    for cores in (1, 2):
        monkeypatch.setattr(scan, "_cores", lambda cores=cores: cores)
        found.append(scan.scan_source(recipe["data"][0], "main", max_held=0))
    for name in ARRAYS:
        np.testing.assert_array_equal(*(getattr(one_scan.facts, name) for one_scan in found))
    assert list(found[0].pairs) == list(found[1].pairs)


BROKEN = {
    "not JSON": '{"prompt": "a", "chosen": "b"',
    "a list": '["prompt", "chosen", "rejected"]',
    "a number": "12",
    "no column": '{"prompt": "a", "chosen": "b"}',
    "null label": '{"prompt": "a", "chosen": "b", "rejected": "c", "is_chosen_safe": null, "is_rejected_safe": true}',
    "one label": '{"prompt": "a", "chosen": "b", "rejected": "c", "is_chosen_safe": true}',
    "a number for a text": '{"prompt": 1, "chosen": "b", "rejected": "c"}',
    "unread column": '{"prompt": "a", "chosen": "b", "rejected": "c", "notes": "some more words"}',
    "another stream": '{"prompt": "a", "chosen": "b", "rejected": "c", "stream": "side"}',
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("where", ["first", "last"])
def test_errors_are_those_of_the_reader_of_rows(line, where, tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "PIECE", 300)
    fine = [json.dumps({"prompt": f"{n}", "chosen": "b", "rejected": "c"}) for n in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join([line, *fine] if where == "first" else [*fine, line]))
    with pytest.raises(DataError) as expected:
        load_pairs(Source(path=str(path)), "main")
    with pytest.raises(DataError) as error:
        scan.scan_source(Source(path=str(path)), "main")
    assert str(error.value) == str(expected.value)
    assert f"{path} row {1 if where == 'first' else 41}" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"prompt": "\xff"}\n', b"\xef\xbb\xbf[]\n"])
def test_files_without_readable_rows_are_refused_as_always(content, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as expected:
        list(read_rows(Source(path=str(path))))
    with pytest.raises(DataError) as error:
        scan.scan_source(Source(path=str(path)), "main")
    assert str(error.value) == str(expected.value)


def test_a_list_is_no_row_even_if_it_names_the_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n["prompt", "chosen", "rejected"]\n')
    with pytest.raises(NotReadable):
        list(read_piece(path, (0, path.stat().st_size), Source(path=str(path)), ()))


def test_most_rows_are_plain(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a <b>", "chosen": "[1] b", "rejected": "c\\u00e9"}\r\n')
    (pair,) = read_piece(path, (0, path.stat().st_size), Source(path=str(path)), ())
    # A text that begins with a bracket might be a list of messages.
    assert not isinstance(pair, PlainPair)
    path.write_text('{"prompt": "a <b>", "chosen": "b [1]", "rejected": "c\\u00e9", "stream": "buffer"}\n')
    (pair,) = read_piece(path, (0, path.stat().st_size), Source(path=str(path)), ())
    assert isinstance(pair, PlainPair)
    assert (pair.rejected, pair.cell, pair.provenance.stream) == ("c\u00e9", -1, "buffer")


def test_a_file_that_changes_while_it_is_in_use_is_noticed(recipe):
    source = recipe["data"][0]
    pairs = scan.scan_source(source, "main", max_held=0).pairs
    assert len(list(pairs)) == len(pairs)
    with open(source.path, "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="was changed while it was in use"):
        list(pairs)


def test_stored_pairs_are_a_sequence(recipe):
    pairs = scan.scan_source(recipe["data"][0], "main", max_held=0).pairs
    expected = list(pairs)
    assert (pairs[0], pairs[-1], pairs[3:6]) == (expected[0], expected[-1], expected[3:6])
    with pytest.raises(IndexError):
        pairs[len(pairs)]
    some = np.arange(len(pairs)) % 3 == 0
    assert list(pairs.take(some)) == expected[::3]
    exchanged = pairs.exchange(some).take(np.arange(0, len(pairs), 2))
    assert list(exchanged) == [pair.swapped() if n % 3 == 0 else pair for n, pair in enumerate(expected)][::2]
    assert exchanged.tally().total() == len(exchanged)
    cells = [pair.cell for pair in exchanged]
    counts = {cell: cells.count(cell) for cell in set(cells)}
    found = dict.fromkeys(counts, 0)
    for kind, count in exchanged.tally().items():
        found[kind.cell] += count
    assert found == counts
    assert len({pairs.key, exchanged.key, pairs.take(some).key}) == 3


def test_origins_are_numbered_once_over_all_parts(recipe):
    pairs = list(scan.scan_source(recipe["data"][0], "main", max_held=0).pairs)
    parts = []
    for start in range(0, len(pairs), 50):
        builder = FactsBuilder()
        builder.extend(pairs[start : start + 50])
        parts.append(builder.finish())
    joined = join_facts(parts)
    assert len(set(joined.provenances)) == len(joined.provenances)
    assert [joined.provenances[origin] for origin in joined.origins] == [pair.provenance for pair in pairs]
    assert joined.request_keys.tolist() == [int(prompt_key(last_request(pair.prompt)), 16) for pair in pairs]


def test_hashes_are_looked_up_in_sorted_ones():
    hashes = np.array([3, 0, 2**64 - 1, 7], dtype=np.uint64)
    assert is_among(hashes, np.array([0, 3, 5], dtype=np.uint64)).tolist() == [True, True, False, False]
    assert not is_among(hashes, hashes[:0]).any()


def test_prompts_to_ask_are_those_of_all_pairs(tmp_path):
    from bfpo.training.probe import _choose_prompts

    for number, share in enumerate((0.9, 0.4, 0.0)):
        rng, rows = random.Random(number), []
        for row in range(300):
            safe = rng.random() < share
            rows.append(
                {"prompt": f"P {row % 90}" if row % 2 else f"p {row % 70}", "chosen": f"{row}", "rejected": "b"}
            )
            rows[-1] |= {"is_chosen_safe": safe, "is_rejected_safe": True}
        write_jsonl(tmp_path / "a.jsonl", rows)
        stored = scan.scan_source(Source(path=str(tmp_path / "a.jsonl")), "main", max_held=0).pairs
        held = list(stored)
        mixed = PairChain((stored.take(np.arange(100)), held[100:]))
        for count in (2, 10, 40, 1000):
            expected = _choose_prompts(held, count)
            assert _choose_prompts(stored, count) == expected == _choose_prompts(mixed, count)
    # Only unsafe prompts: the first three are enough.
    assert len(with_first_prompts(stored, 3)) < 30
