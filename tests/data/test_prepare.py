import gzip
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bfpo.config.recipes import DataRecipe, Source
from bfpo.core.conversation import prompt_key
from bfpo.core.files import file_hash, write_jsonl
from bfpo.data.demonstrations import load_demonstrations, prepare_demonstrations
from bfpo.data.load import Reason, SourceReport, load_pairs
from bfpo.data.prepare import is_held_out, prepare, require_labels, write_prepared
from bfpo.errors import DataError, RecipeError

SS = {"is_chosen_safe": True, "is_rejected_safe": True}
SU = {"is_chosen_safe": True, "is_rejected_safe": False}
US = {"is_chosen_safe": False, "is_rejected_safe": True}
UU = {"is_chosen_safe": False, "is_rejected_safe": False}


def row(number, labels=SS, **changes):
    texts = {"prompt": f"prompt {number}", "chosen": f"good {number}", "rejected": f"bad {number}"}
    return texts | labels | changes


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes rows under a name in the working directory, and gives their source."""
    monkeypatch.chdir(tmp_path)

    def written(name, rows, **options):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, rows)
        return Source(path=name, **options)

    return written


def prepared(*sources, **options):
    """Prepare sources with no limit on what may be dropped, unless the options say otherwise."""
    return prepare(DataRecipe(data=list(sources), **({"max_dropped": 0.99} | options)))


def texts(pairs):
    return [pair.chosen for pair in pairs]


def reasons(counts):
    return {(reason.text, reason.cell): count for reason, count in counts.items()}


def conversation(*contents):
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]


def test_a_sample_depends_only_on_its_seed_and_keeps_the_order(write):
    rows = [row(number) for number in range(40)]
    first, again, other = (
        texts(load_pairs(write("a.jsonl", rows, fraction=0.25, seed=seed), "main")[1]) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == len(set(first)) == 10
    assert sorted(first, key=lambda text: int(text.split()[1])) == first
    assert first != texts(load_pairs(write("a.jsonl", rows, fraction=0.25, seed=1, sample="head"), "main")[1])


@pytest.mark.parametrize("fraction", [0.1, 0.29, 1 / 3, 0.5, 0.999, 1])
def test_head_takes_what_the_official_recipe_takes(fraction, write):
    # official alignment/data.py: dataset.select(range(int(frac * len(dataset))))
    numbers = range(100)
    source = write("a.jsonl", [row(number) for number in numbers], fraction=fraction, sample="head")
    report, pairs = load_pairs(source, "main")
    assert texts(pairs) == [f"good {number}" for number in numbers[: int(fraction * 100)]]
    assert (report.read, report.taken) == (100, len(pairs))


@pytest.mark.parametrize(
    ("fraction", "limit", "argument", "taken"),
    [
        (None, None, None, 20),
        (0.5, None, None, 10),
        (0.5, 4, None, 4),
        (0.1, 4, None, 2),
        (None, 30, None, 20),
        (None, 9, 3, 3),
    ],
)
def test_limit_applies_after_fraction(fraction, limit, argument, taken, write):
    source = write("a.jsonl", [row(number) for number in range(20)], fraction=fraction, limit=limit)
    report, pairs = load_pairs(source, "main", limit=argument)
    assert len(pairs) == report.taken == taken


def test_a_fraction_that_leaves_nothing_is_refused(write):
    with pytest.raises(DataError, match=r"^a: fraction 0.1 of 5 pairs leaves none$"):
        load_pairs(write("a.jsonl", [row(number) for number in range(5)], fraction=0.1), "main")


def test_an_unknown_adapter_is_refused_with_the_nearest(write):
    with pytest.raises(RecipeError, match="adapter is 'hh_rlfh'; did you mean 'hh_rlhf'"):
        load_pairs(write("a.jsonl", [row(0)], adapter="hh_rlfh"), "main")


def test_a_source_without_pairs_says_what_was_skipped(write):
    ties = [{"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.5}] * 3
    with pytest.raises(DataError, match=r"alpaca_eval: no pairs in ties.jsonl \(rows skipped: {'tie': 3}\)"):
        load_pairs(write("ties.jsonl", ties, adapter="alpaca_eval"), "main")


def test_a_half_labeled_file_is_refused(write):
    with pytest.raises(
        DataError, match=r"^a \(a.jsonl\): 2 of 5 pairs have no safety labels \(the first is pair 3\)"
    ):
        load_pairs(
            write("a.jsonl", [row(number, SS if number < 2 or number == 4 else {}) for number in range(5)]), "main"
        )


def test_repeated_pairs_are_removed_once_each_and_are_no_fault(write):
    rows = [row(0, SU), row(1, US), row(0, SU), row(0, SU)]
    data = prepared(write("a.jsonl", rows), write("b.jsonl", rows[:1]), max_dropped=0)
    assert texts(data.train) == ["good 0", "good 1"]
    assert [reasons(part.report.removed) for part in data.parts] == [
        {("duplicate", "su"): 2},
        {("duplicate", "su"): 1},
    ]


def test_the_same_pair_can_be_in_both_streams(write):
    source = write("a.jsonl", [row(0)])
    data = prepared(source, buffer=[source])
    assert [pair.provenance.stream for pair in data.train] == ["main", "buffer"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": ""}, "empty answer"),
        ({"rejected": " \n"}, "empty answer"),
        ({"chosen": "", "rejected": ""}, "empty answer"),
        ({"chosen": "same", "rejected": " same\n"}, "identical answers"),
    ],
)
@pytest.mark.parametrize("conflicts", ["drop", "keep", "error"])
def test_empty_and_identical_answers_are_dropped_for_any_conflicts(changes, reason, conflicts, write):
    data = prepared(write("a.jsonl", [row(0), row(1, SS, **changes)]), conflicts=conflicts)
    assert texts(data.train) == ["good 0"]
    assert reasons(data.parts[0].report.dropped) == {(reason, "ss"): 1}


CONFLICTS = {
    "an answer is labeled both safe and unsafe": [row(0, SU), row(0, US, rejected="another"), row(1, SS)],
    "the pair occurs in both orders": [row(0, SU), row(0, US, chosen="bad 0", rejected="good 0"), row(1, SS)],
}


@pytest.mark.parametrize(("reason", "rows"), CONFLICTS.items(), ids=["labels", "orders"])
def test_contradictory_pairs_are_dropped_kept_or_an_error(reason, rows, write):
    source = write("a.jsonl", rows)
    with_drop, with_keep = prepared(source, conflicts="drop"), prepared(source, conflicts="keep")
    assert texts(with_drop.train) == ["good 1"]
    assert reasons(with_drop.parts[0].report.dropped) == {(reason, "su"): 1, (reason, "us"): 1}
    assert len(with_keep.train) == 3
    assert reasons(with_keep.parts[0].report.noted) == {(f"kept though {reason}", c): 1 for c in ("su", "us")}
    with pytest.raises(DataError, match=rf"^a: row [0-9a-f]{{16}}: {reason}; fix the data, or set conflicts"):
        prepared(source, conflicts="error")


def test_one_pair_with_two_labellings_is_a_conflict_not_a_duplicate(write):
    report = prepared(write("a.jsonl", [row(0, SU), row(0, US), row(1)])).parts[0].report
    reason = "an answer is labeled both safe and unsafe"
    assert reasons(report.dropped) == {(reason, "su"): 1, (reason, "us"): 1}
    assert not report.removed


def test_texts_are_compared_in_one_composition(write):
    pair, same, swapped = (
        {"prompt": f"Un {cafe}?", "chosen": f"{cafe} ferm{e}", "rejected": "non"}
        for cafe, e in (("caf\u00e9", "\u00e9"), ("cafe\u0301", "e\u0301"), ("cafe\u0301", "e\u0301"))
    )
    swapped |= {"chosen": swapped["rejected"], "rejected": swapped["chosen"]}
    identical = {"prompt": "Non?", "chosen": "\u00e9", "rejected": "e\u0301"}
    labels = {"is_chosen_safe": True, "is_rejected_safe": True}
    data = prepared(write("a.jsonl", [line | labels for line in (pair, same, identical)] + [row(1)]))
    assert reasons(data.parts[0].report.removed) == {("duplicate", "ss"): 1}
    assert reasons(data.parts[0].report.dropped) == {("identical answers", "ss"): 1}
    data = prepared(write("a.jsonl", [pair | labels, swapped | labels, row(1)]))
    assert reasons(data.parts[0].report.dropped) == {("the pair occurs in both orders", "ss"): 2}


def test_conflicts_are_found_between_sources_too(write):
    pair, swapped = CONFLICTS["the pair occurs in both orders"][:2]
    data = prepared(write("a.jsonl", [pair, row(1)]), write("b.jsonl", [swapped, row(2)]))
    assert texts(data.train) == ["good 1", "good 2"]


def test_an_answer_to_another_prompt_may_have_another_label(write):
    data = prepared(write("a.jsonl", [row(0, SU, chosen="no"), row(1, UU, chosen="no")]), conflicts="error")
    assert len(data.train) == 2


@pytest.mark.parametrize(("max_dropped", "stops"), [(0.2, False), (0.19, True), (0, True)])
def test_the_cap_on_dropped_pairs_stops_the_run(max_dropped, stops, write):
    source = write("a.jsonl", [*(row(number) for number in range(8)), row(8, chosen=""), row(9, chosen="bad 9")])
    if not stops:
        assert len(prepared(source, max_dropped=max_dropped).train) == 8
        return
    counts = r"\(empty answer: 1, identical answers: 1\)"
    expected = rf"^a: 2 of 10 pairs would be dropped {counts}, more than max_dropped = {max_dropped}"
    with pytest.raises(DataError, match=expected):
        prepared(source, max_dropped=max_dropped)


def test_rows_whose_histories_differ_count_against_the_cap(write):
    good = [{"chosen": conversation(f"{n}?", "a"), "rejected": conversation(f"{n}?", "b")} for n in range(3)]
    bad = {"chosen": conversation("a?", "a"), "rejected": conversation("b?", "b")}
    source = write("a.jsonl", [*good, bad])
    assert len(prepared(source, max_dropped=0.25).train) == 3
    with pytest.raises(DataError, match=r"a: 1 of 4 pairs would be dropped \(histories differ: 1\)"):
        prepared(source, max_dropped=0.2)


def test_a_lone_surrogate_is_a_fault_and_is_never_written(write, tmp_path):
    lines = [json.dumps(row(0)), json.dumps(row(1)).replace("good 1", "good \\ud83d")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    data = prepared(Source(path="a.jsonl"))
    write_prepared(data, tmp_path)
    assert texts(data.train) == ["good 0"]
    assert data.parts[0].report.skipped == {"lone surrogate in a text": 1}
    for key, value in (("tools", '[{"name": "\\ud83d"}]'), ("chat_template_kwargs", '{"a": "\\ud83d"}')):
        spoiled = json.dumps(row(1) | {key: "VALUE"}).replace('"VALUE"', value)
        (tmp_path / "tools.jsonl").write_text("\n".join([lines[0], spoiled]) + "\n")
        assert prepared(Source(path="tools.jsonl")).parts[0].report.skipped == {"lone surrogate in a text": 1}
    with pytest.raises(DataError, match="1 of 2 pairs would be dropped"):
        prepared(Source(path="a.jsonl"), max_dropped=0.4)
    (tmp_path / "d.jsonl").write_text(
        '{"prompt": "a", "completion": "\\ud83d"}\n{"prompt": "a", "completion": "b"}\n'
    )
    (part,) = prepare_demonstrations([Source(path="d.jsonl", adapter="demonstrations")], holdout=0)
    assert [demonstration.completion for demonstration in part.train] == ["b"]
    assert part.report.faulty.total() == 1


def test_a_prompt_falls_on_the_same_side_in_both_streams(write):
    main = [row(number) for number in range(60)]
    buffer = [row(number, chosen=f"other {number}", prompt=f"  PROMPT   {number}\n") for number in range(30, 90)]
    data = prepared(write("a.jsonl", main), buffer=[write("b.jsonl", buffer)], holdout=0.3)
    train, held_out = ({pair.prompt_key for pair in pairs} for pairs in (data.train, data.eval))
    assert not train & held_out
    assert len(train) + len(held_out) == 90
    assert {pair.provenance.stream for pair in data.eval} == {"main", "buffer"}
    assert 0.15 < len(held_out) / 90 < 0.45


def test_nothing_is_held_out_unless_asked(write):
    data = prepared(write("a.jsonl", [row(number) for number in range(50)]))
    assert (len(data.train), data.eval) == (50, [])


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_holdout_is_a_subset_of_a_larger_one(text, first, second):
    key = prompt_key(text)
    smaller, larger = sorted((first, second))
    assert is_held_out(key, smaller) <= is_held_out(key, larger)
    assert (is_held_out(key, 0), is_held_out(key, 1)) == (False, True)


def test_the_share_held_out_is_the_share_asked_for():
    keys = [prompt_key(f"prompt {number}") for number in range(4000)]
    # 4 standard deviations of a binomial share: 0.02
    assert sum(is_held_out(key, 0.1) for key in keys) / 4000 == pytest.approx(0.1, abs=0.02)


def test_training_prompts_of_an_evaluation_set_are_an_error_or_removed(write):
    source = write("a.jsonl", [row(0, SU), row(1, US), row(2)])
    evals = [write("test.jsonl", [row(1, chosen="other", prompt=" Prompt\n1")])]
    with pytest.raises(
        DataError, match=r"^a: 1 training pairs have a prompt of the evaluation set test \(rows [0-9a-f]{16}\)"
    ):
        prepared(source, eval=evals)
    data = prepared(source, eval=evals, leaks="drop", max_dropped=0)
    assert texts(data.train) == ["good 0", "good 2"]
    assert texts(data.eval) == ["other"]
    assert reasons(data.parts[0].report.removed) == {("prompt of an evaluation set", "us"): 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [("test.txt", "prompt 1\nelse\n"), ("test.json", '[{"question": "prompt 1"}]'), ("test.csv", "goal\nPROMPT 1\n")],
)
def test_training_prompts_of_a_benchmark_are_found(name, content, write, tmp_path):
    (tmp_path / name).write_text(content)
    source = write("a.jsonl", [row(0), row(1), row(2, prompt=conversation("hello", "hi", "prompt 1"))])
    with pytest.raises(DataError, match=f"^a: 2 training pairs have a prompt of the evaluation set {name}"):
        prepared(source, benchmarks=[name])
    assert texts(prepared(source, benchmarks=[name], leaks="drop").train) == ["good 0"]


def test_a_leak_is_found_however_its_accents_are_encoded(write, tmp_path):
    composed, decomposed = "O\u00f9 est le caf\u00e9 ?", "Ou\u0300 est le cafe\u0301 ?"
    assert prompt_key(composed) == prompt_key(decomposed.upper())
    source = write("a.jsonl", [row(0), row(1), row(2, prompt=composed)])
    (tmp_path / "test.txt").write_text(f"{decomposed}\n", encoding="utf-8")
    assert texts(prepared(source, benchmarks=["test.txt"], leaks="drop").train) == ["good 0", "good 1"]


def test_keys_of_ascii_prompts_are_those_of_earlier_versions():
    # A changed key would hold other prompts out of a run that is continued.
    assert prompt_key("Tell me\n HOW to~bake `Bread` ^_^ 7 | {x}") == "4e8fa8ef1fc453af"


def test_a_long_conversation_leaks_when_it_ends_with_an_evaluation_prompt(write):
    source = write("a.jsonl", [row(0), row(1, prompt=conversation("hello", "hi", "prompt 7"))])
    data = prepared(source, eval=[write("test.jsonl", [row(7)])], leaks="drop")
    assert texts(data.train) == ["good 0"]


def test_two_conversations_that_end_alike_are_no_leak(write):
    source = write("a.jsonl", [row(0, prompt=conversation("a box", "yes", "why?"))])
    evals = [write("test.jsonl", [row(1, prompt=conversation("a ball", "no", "why?"))])]
    assert len(prepared(source, eval=evals).train) == 1


def test_prepared_data_are_accepted_unchanged(write, tmp_path):
    main = [row(n, (SS, SU, US, UU)[n % 4], prompt=conversation(f"hello {n}", "hi", "why?")) for n in range(40)]
    buffer = [row(n) for n in range(100, 130)]
    first = prepared(write("m.jsonl", main), buffer=[write("b.jsonl", buffer)], holdout=0.25)
    files = write_prepared(first, tmp_path / "out")
    assert [file.name for file in files] == ["pairs.jsonl", "eval.jsonl", "data_manifest.json"]
    second = prepared(Source(path="out/pairs.jsonl"), eval=[Source(path="out/eval.jsonl")], max_dropped=0)
    assert second.train == first.train
    assert second.eval == first.eval
    assert second.manifest()["train"] == first.manifest()["train"] == json.loads(files[2].read_text())["train"]
    assert {pair.provenance.stream for pair in second.train} == {"main", "buffer"}
    assert {pair.provenance.dataset_name for pair in second.train} == {"m", "b"}


def test_without_evaluation_pairs_no_file_for_them_is_written(write, tmp_path):
    files = write_prepared(prepared(write("a.jsonl", [row(0)])), tmp_path / "out")
    assert (
        sorted((tmp_path / "out").iterdir())
        == sorted(files)
        == [tmp_path / "out/data_manifest.json", tmp_path / "out/pairs.jsonl"]
    )


def test_pairs_of_the_main_stream_are_refused_as_a_buffer(write):
    source = write("prepared.jsonl", [row(0, stream="main")])
    with pytest.raises(
        DataError, match=r"^prepared: a source of the buffer has pairs of stream 'main'; list the file in"
    ):
        prepared(write("a.jsonl", [row(1)]), buffer=[source])


def test_counts_of_the_manifest_add_up(write, tmp_path):
    rows = [row(number, (SS, SU, US, UU)[number % 4]) for number in range(40)]
    rows += [
        row(0),
        row(1, SU),
        row(50, chosen=""),
        row(51, chosen="bad 51"),
        *CONFLICTS["the pair occurs in both orders"][1:2],
    ]
    buffer = [row(number, chosen="other") for number in range(10, 60)]
    evals = [write("e.jsonl", [row(4), row(5, chosen=""), row(70)])]
    data = prepared(
        write("a.jsonl", rows), buffer=[write("b.jsonl", buffer, fraction=0.5)], eval=evals, holdout=0.2, leaks="drop"
    )
    manifest = data.manifest()
    for part, source in zip(data.parts, manifest["sources"], strict=True):
        dropped, removed = (
            sum(sum(by_cell.values()) for by_cell in source[outcome].values()) for outcome in ("dropped", "removed")
        )
        assert source["pairs_taken"] == len(part.train) + len(part.eval) + dropped + removed
    assert [source["pairs_read"] for source in manifest["sources"]] == [45, 50, 3]
    assert [source["pairs_taken"] for source in manifest["sources"]] == [45, 25, 3]
    for what, pairs in (("train", data.train), ("eval", data.eval)):
        counted = Counter((pair.provenance.stream, pair.cell) for pair in pairs)
        assert {
            (stream, cell): n for stream, cells in manifest[what].items() for cell, n in cells.items() if n
        } == counted
    assert manifest["sources"][0]["files"] == {"a.jsonl": file_hash(tmp_path / "a.jsonl")}
    json.dumps(manifest)


def test_empty_cells_are_counted_as_zero(write):
    assert prepared(write("a.jsonl", [row(0, SU)])).manifest()["train"] == {
        "main": {"ss": 0, "su": 1, "us": 0, "uu": 0}
    }


def test_two_files_of_the_same_name_are_counted_separately(write):
    data = prepared(write("x/a.jsonl", [row(0)]), write("y/a.jsonl", [row(1)]))
    assert [part.report.name for part in data.parts] == ["a", "a-2"]
    assert [pair.provenance.dataset_name for pair in data.train] == ["a", "a-2"]
    report, _ = load_pairs(Source(path=["x/a.jsonl", "y/a.jsonl"]), "main")
    assert list(report.files) == ["x/a.jsonl", "y/a.jsonl"]


def test_an_unlabeled_set_may_be_prepared_but_not_trained_on(write):
    data = prepared(write("a.jsonl", [row(0, {}), row(1, {})]))
    assert data.manifest()["train"] == {"main": {"ss": 0, "su": 0, "us": 0, "uu": 0, "unlabeled": 2}}
    with pytest.raises(DataError, match=r"^a: pairs without safety labels \(row [0-9a-f]{16}\); add the columns"):
        require_labels(data.train)


def test_labels_can_be_assumed_and_that_is_written_down(write):
    data = prepared(write("a.jsonl", [row(0, {})], assume_safe=True))
    require_labels(data.train)
    assert (data.train[0].cell, data.train[0].to_row()["safety_label_source"]) == ("ss", "assumed")


def test_assume_safe_changes_no_label_that_is_there(write):
    data = prepared(write("a.jsonl", [row(0, UU)], assume_safe=True))
    assert (data.train[0].cell, data.train[0].provenance.safety_label_source) == ("uu", "dataset")


def test_nothing_left_to_train_on_is_an_error(write):
    source = write("a.jsonl", [row(0), row(1)])
    with pytest.raises(DataError, match="no pairs are left to train on; see holdout"):
        prepared(source, eval=[source], leaks="drop")


def test_a_license_that_is_given_replaces_the_adapters(write):
    alpaca = {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1}
    sources = [write("a.jsonl", [alpaca], adapter="alpaca_eval", license=license) for license in (None, "mine")]
    assert [load_pairs(source, "main")[0].license for source in sources] == ["CC-BY-NC-4.0", "mine"]


def test_the_share_lost_to_faults_is_of_the_pairs_taken():
    report = SourceReport("a", Source(path="a"), taken=100, read=1000)
    report.dropped[Reason("empty answer", "ss")] = 10
    report.check_cap(0.1)
    report.removed[Reason("duplicate", "ss")] = 80
    report.check_cap(0.1)
    report.dropped[Reason("identical answers", None)] = 1
    with pytest.raises(DataError, match="11 of 100"):
        report.check_cap(0.1)


PAIRS = [row(0, SS), row(1, SU), row(2, US), row(3, UU)]


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ("chosen", ["good 0", "good 1", "good 2", "good 3"]),
        ("rejected", ["bad 0", "bad 1", "bad 2", "bad 3"]),
        ("both", ["good 0", "bad 0", "good 1", "bad 1", "good 2", "bad 2", "good 3", "bad 3"]),
        ("safer", ["good 0", "good 1", "bad 2"]),
        (None, ["good 0", "good 1", "bad 2"]),
    ],
)
def test_demonstrations_have_the_answers_that_use_selects(use, expected, write):
    report, demonstrations = load_demonstrations(write("a.jsonl", PAIRS, use=use))
    assert [demonstration.completion for demonstration in demonstrations] == expected
    assert {demonstration.dataset_name for demonstration in demonstrations} == {"a"}
    assert reasons(report.removed) == ({("both answers unsafe", "uu"): 1} if use in ("safer", None) else {})


def test_the_chosen_answers_of_unlabeled_pairs_are_imitated_by_default(write):
    _, demonstrations = load_demonstrations(write("a.jsonl", [row(0, {})]))
    assert [demonstration.completion for demonstration in demonstrations] == ["good 0"]


def test_safer_answers_need_labels(write):
    with pytest.raises(DataError, match=r"^a: 'use: safer' needs safety labels, and this set has none"):
        load_demonstrations(write("a.jsonl", [row(0, {})], use="safer"))


def test_demonstrations_are_cleaned_and_split_by_the_same_prompts_as_pairs(write):
    rows = [*(row(number) for number in range(30)), row(0), row(40, chosen=" ")]
    (part,) = prepare_demonstrations([write("a.jsonl", rows, use="chosen")], holdout=0.3)
    data = prepared(write("a.jsonl", rows), holdout=0.3)
    assert (
        {demonstration.prompt_key for demonstration in part.eval} == {pair.prompt_key for pair in data.eval} != set()
    )
    assert len(part.train) + len(part.eval) == 30
    assert reasons(part.report.removed) == {("duplicate", None): 1}
    assert reasons(part.report.dropped) == {("empty answer", None): 1}


def test_prompts_with_completions_are_demonstrations_too(write, tmp_path):
    rows = [{"messages": conversation("a?", "b")}, {"prompt": "c?", "completion": "d"}]
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(content) + "\n" for content in rows)
    (part,) = prepare_demonstrations([Source(path="d.jsonl.gz", adapter="demonstrations", license="mine")], holdout=0)
    assert [
        (demonstration.prompt[0].content, demonstration.completion, demonstration.dataset_name)
        for demonstration in part.train
    ] == [
        ("a?", "b", "d"),
        ("c?", "d", "d"),
    ]
    assert (part.report.license, part.report.read, part.report.taken) == ("mine", 2, 2)


def test_the_safer_answer_is_read_as_the_data_set_names_it(write):
    rows = [
        {"prompt": f"which {n}", "response_0": "a", "response_1": "b", "safer_response_id": n % 2} for n in range(4)
    ]
    report, demonstrations = load_demonstrations(write("pku.jsonl", rows, adapter="pku_safer"))
    assert [demonstration.completion for demonstration in demonstrations] == ["a", "b", "a", "b"]
    assert report.license == "CC-BY-NC-4.0"
    with pytest.raises(DataError, match=r"row 1: column 'safer_response_id' is 2; expected 0 or 1"):
        load_demonstrations(write("pku.jsonl", [rows[0] | {"safer_response_id": 2}], adapter="pku_safer"))
    with pytest.raises(DataError, match="row 1: no column 'safer_response_id'"):
        load_demonstrations(write("pku.jsonl", [{"prompt": "a", "response_0": "b"}], adapter="pku_safer"))


def test_a_wrong_demonstration_is_named(write):
    with pytest.raises(DataError, match=r"^d.jsonl row 2: no column 'prompt'; the columns are completion$"):
        load_demonstrations(
            write("d.jsonl", [{"prompt": "a", "completion": "b"}, {"completion": "b"}], adapter="demonstrations")
        )


def test_no_completions_left_is_an_error(write):
    with pytest.raises(DataError, match="no completions are left to train on"):
        prepare_demonstrations([write("a.jsonl", [row(0, chosen="")])], holdout=0)
