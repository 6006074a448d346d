"""The examples of adapters are read by them, and the command lists all adapters."""

import json

import pytest

from bfpo.commands.data import show_adapters
from bfpo.config.recipes import Source
from bfpo.core.files import write_jsonl
from bfpo.data.adapters import ADAPTERS, DEMONSTRATIONS, parse_source, recognize
from bfpo.data.demonstrations import load_demonstrations
from bfpo.data.examples import DEMONSTRATION_EXAMPLES, PAIR_EXAMPLES, published_as
from bfpo.data.load import load_pairs
from bfpo.errors import DataError, RecipeError

KINDS = [("main", name) for name in PAIR_EXAMPLES] + [("sft", name) for name in DEMONSTRATION_EXAMPLES]


def load(kind, name, rows, folder):
    write_jsonl(folder / "rows.jsonl", rows)
    source = Source(adapter=name, path=str(folder / "rows.jsonl"))
    return load_pairs(source, "main")[1] if kind == "main" else load_demonstrations(source)[1]


def example_of(kind, name):
    return (PAIR_EXAMPLES if kind == "main" else DEMONSTRATION_EXAMPLES)[name]


def test_every_adapter_has_an_example():
    assert list(PAIR_EXAMPLES) == list(ADAPTERS)
    assert list(DEMONSTRATION_EXAMPLES) == list(DEMONSTRATIONS)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_an_adapter_reads_its_example(kind, name, tmp_path):
    assert load(kind, name, example_of(kind, name).rows, tmp_path)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_the_columns_of_an_example_are_the_needed_ones(kind, name, tmp_path):
    example = example_of(kind, name)
    columns = {column for row in example.rows for column in row}
    assert {*example.columns} <= columns
    for missing in example.columns:
        rows = [{column: value for column, value in row.items() if column != missing} for row in example.rows]
        with pytest.raises(DataError):
            load(kind, name, rows, tmp_path)


def test_pairs_are_recognized_by_the_columns_of_their_example():
    for name in (name for name, adapter in ADAPTERS.items() if adapter.columns):
        assert name in recognize(PAIR_EXAMPLES[name].rows[0])
    assert recognize(["prompt", "answer"]) == []


def test_a_published_set_has_the_adapter_that_orders_it_by_helpfulness():
    assert published_as("PKU-Alignment/PKU-SafeRLHF") == "pku_saferlhf"
    assert published_as("HuggingFaceH4/ultrafeedback_binarized") == "ultrafeedback"
    assert published_as("org/unknown") is None


def test_the_command_lists_all_adapters_and_prints_an_example_that_is_read(capsys, tmp_path):
    show_adapters(None)
    table = capsys.readouterr().out
    assert [name for name in (*ADAPTERS, *DEMONSTRATIONS) if f"\n  {name}" not in table] == []
    show_adapters("xstest_completions")
    lines = capsys.readouterr().out
    (tmp_path / "rows.jsonl").write_text(lines)
    _, (pair,) = load_pairs(parse_source(f"xstest_completions:{tmp_path / 'rows.jsonl'}"), "main")
    assert pair.chosen == json.loads(lines.splitlines()[0])["completion"]
    with pytest.raises(RecipeError, match="`show` is 'pku'; known: agent_align"):
        show_adapters("pku")
