import copy
import gzip
import json
import os
import subprocess
import sys

import pytest
import yaml

from bfpo.commands.app import main
from bfpo.core.files import write_jsonl
from bfpo.errors import DataError

LABELS = {"is_chosen_safe": True, "is_rejected_safe": False}
GOOD = [{"prompt": f"which {number}", "chosen": "a box", "rejected": "a ball", **LABELS} for number in range(4)]
TRAIN = {
    "model": {"new": {"shape": "tiny", "vocab_size": 300}},
    "data": [{"path": "good.jsonl"}],
    "trainer": {"output_dir": "runs/toy", "use_cpu": True},
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in a folder with a good pair file."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "good.jsonl", GOOD)
    return tmp_path


def run_process(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bfpo", *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def without(row, *columns):
    return {name: value for name, value in row.items() if name not in columns}


FIRST = GOOD[0]
TURNS = [{"role": "user", "content": "which"}]
BAD_DATA = {
    "a missing label": (
        lines(FIRST, without(FIRST, "is_rejected_safe")),
        "bad.jsonl row 2: column 'is_rejected_safe' is missing, but 'is_chosen_safe' is not; give both, or",
    ),
    "a half-labeled file": (
        lines(FIRST, without(FIRST, *LABELS), FIRST),
        "bad (bad.jsonl): 1 of 3 pairs have no safety labels (the first is pair 2); label all of them or none",
    ),
    "an unknown word": (
        lines(FIRST | {"is_chosen_safe": "perhaps"}),
        "bad.jsonl row 1: column 'is_chosen_safe': safety label is 'perhaps' (str); expected true or false, 0 or 1",
    ),
    "a null label": (
        lines(FIRST, FIRST | {"is_rejected_safe": None}),
        "bad.jsonl row 2: column 'is_rejected_safe': safety label is null; expected true or false, 0 or 1",
    ),
    "a null text": (lines(FIRST | {"prompt": None}), "bad.jsonl row 1: column 'prompt' is None; expected a string"),
    "an empty file": ("", "bad.jsonl has no rows"),
    "half a last line": (
        lines(FIRST) + '{"prompt": "which',
        "bad.jsonl row 2: not JSON (Unterminated string starting at at column 12); the last line is incomplete",
    ),
    "a row that is a list": (lines(FIRST, [1]), "bad.jsonl row 2: list; expected an object with columns"),
    "a chat without an assistant turn": (
        lines(FIRST | {"chosen": TURNS, "rejected": TURNS}),
        "bad.jsonl row 1: column 'chosen' ends with a user turn; expected an assistant turn",
    ),
    "an empty chat": (lines(FIRST | {"prompt": []}), "bad.jsonl row 1: column 'prompt' is []; expected a string or"),
    "too many faults": (
        lines(*GOOD, FIRST | {"chosen": " "}),
        "bad: 1 of 5 pairs would be dropped (empty answer: 1), more than max_dropped = 0.1; fix the data, or raise",
    ),
}


def assert_refused(code, output, errors, message):
    assert code == 2
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in output + errors
    assert len(errors.splitlines()) <= 3


@pytest.mark.parametrize(("content", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_end_with_one_message(content, message, run, folder):
    (folder / "bad.jsonl").write_text(content)
    (folder / "recipe.yaml").write_text("data: [{path: bad.jsonl}]\n")
    code, output, errors = run("data", "prepare", "recipe.yaml")
    assert_refused(code, output, errors, message)
    assert len(errors.splitlines()) == 1
    assert not (folder / "prepared").exists()


def test_a_cut_file_ends_with_one_message(run, folder):
    (folder / "bad.jsonl.gz").write_bytes(gzip.compress(lines(*GOOD * 20).encode())[:-12])
    assert_refused(
        *run("data", "inspect", "bad.jsonl.gz"), "bad.jsonl.gz: the compressed file is truncated or damaged ("
    )


BAD_RECIPES = {
    "an unknown key": ({"bufer": []}, "recipe.yaml:\n  bufer: unknown key; did you mean 'buffer'? known: benchmarks"),
    "an unknown key of a source": (
        {"data": [{"path": "good.jsonl", "limti": 3}]},
        "data.0.limti: unknown key; did you",
    ),
    "a wrong type": ({"holdout": "much"}, "holdout: Input should be a valid number"),
    "a section of the wrong type": ({"data": "good.jsonl"}, "data: Input should be a valid list (got 'good.jsonl')"),
    "an older key": (
        {"trainer": {"warmup_ratio": 0.1}},
        "trainer.warmup_ratio is a key of an older stack; use trainer.",
    ),
    "an unknown argument": ({"trainer": {"output_dir": "x", "lerning_rate": 1}}, "did you mean 'learning_rate'?"),
    "a wrong argument": (
        {"trainer": {"output_dir": "x", "learning_rate": "fast"}},
        "trainer.learning_rate is 'fast'",
    ),
    "an unknown loss": ({"loss": {"name": "bfpoo"}}, "did you mean 'bfpo'?"),
    "a loss out of range": ({"loss": {"name": "bfpo", "b1": 1}}, "b1"),
    "an unknown adapter": (
        {"data": [{"path": "good.jsonl", "adapter": "pair"}]},
        "adapter is 'pair'; did you mean 'pairs'?",
    ),
    "no such file": ({"data": [{"path": "nothing.jsonl"}]}, "path 'nothing.jsonl': no such file, and not a hub id"),
    "no such model": ({"model": {"path": "./nothing"}}, "model './nothing': no such folder"),
    "no labels": ({"data": [{"path": "unlabeled.jsonl"}]}, "unlabeled: pairs without safety labels (row "),
}


@pytest.mark.parametrize(("changes", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_bad_recipe_ends_with_one_message(changes, message, run, folder):
    write_jsonl(folder / "unlabeled.jsonl", [without(row, *LABELS) for row in GOOD])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TRAIN | changes))
    assert_refused(*run("train", "recipe.yaml", "--dry-run"), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: [", "recipe.yaml is not valid YAML"),
        ("- data\n", "recipe recipe.yaml is a list; expected sections such as data: and model:"),
        ("", "recipe recipe.yaml is empty; expected sections"),
        ("data: []\ndata: []\n", "recipe.yaml: line 2: duplicate key 'data'; keep one"),
    ],
)
def test_a_recipe_that_is_none_ends_with_one_message(content, message, run, folder):
    (folder / "recipe.yaml").write_text(content)
    assert_refused(*run("data", "prepare", "recipe.yaml"), message)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("eos_token", "has no end-of-sequence token; set tokenizer.eos_token and save it again"),
        (
            "chat_template",
            "has no chat template; set text.chat_template in the recipe to a Jinja template or to a file",
        ),
    ],
)
def test_a_tokenizer_that_lacks_something_ends_with_one_message(
    attribute, message, run, folder, tokenizer, make_model
):
    lacking = copy.deepcopy(tokenizer)
    setattr(lacking, attribute, None)
    lacking.save_pretrained(folder / "model")
    make_model().config.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TRAIN | {"model": {"path": "model"}}))
    for command in (["data", "inspect", "good.jsonl", "--tokenizer", "model"], ["train", "recipe.yaml", "--dry-run"]):
        assert_refused(*run(*command), f"model {message}")


def test_the_same_commands_accept_what_is_good(run, folder, tokenizer, make_model):
    tokenizer.save_pretrained(folder / "model")
    make_model().config.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TRAIN | {"model": {"path": "model"}}))
    for command in (
        ["data", "inspect", "good.jsonl", "--tokenizer", "model"],
        ["data", "prepare", "recipe.yaml"],
        ["train", "recipe.yaml", "--dry-run"],
    ):
        code, output, errors = run(*command)
        assert (code, errors) == (0, "")
        assert "Stream main: 4 pairs" in output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["export", "nowhere", "--to", "merged", "--out", "merged"],
            "'nowhere': no such folder; expected a run's output folder",
        ),
        (
            ["export", ".", "--to", "merged", "--out", "merged"],
            "'.' contains no model; expected a folder with config",
        ),
        (
            ["export", ".", "--to", "gguf", "--dtype", "float16", "--out", "merged"],
            "--dtype is for merged and adapter",
        ),
        (["migrate", "nothing.yaml"], "recipe nothing.yaml: "),
        (["migrate", "ours.yaml"], "ours.yaml: neither of official BFPO, alignment-handbook, TRL nor LLaMA-Factory"),
        (["train", "theirs.yaml"], "use model.path (bfpo migrate turns a whole file into a recipe)"),
        (["train", "quantized.yaml", "--dry-run"], "model.load_in_4bit needs lora, or a path to an adapter"),
    ],
)
def test_adapters_and_recipes_of_others_end_with_one_message(command, message, run, folder, tokenizer, make_model):
    tokenizer.save_pretrained(folder / "model")
    make_model().config.save_pretrained(folder / "model")
    (folder / "ours.yaml").write_text(yaml.safe_dump(TRAIN))
    (folder / "theirs.yaml").write_text("model_name_or_path: a/b\n")
    quantized = TRAIN | {"model": {"path": "model", "load_in_4bit": True}}
    (folder / "quantized.yaml").write_text(yaml.safe_dump(quantized))
    assert_refused(*run(*command), message)
    assert not (folder / "merged").exists()
    assert not (folder / "recipe.yaml").exists()


BAD_PROMPTS = {
    "a lone surrogate": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b \\udc00"}\n', "p.jsonl row 2: lone surrogate"),
    "a lone surrogate in a list": ("p.json", b'[{"prompt": "b \\uDC00"}]', "p.json row 1: lone surrogate"),
    "an id that is none": (
        "p.jsonl",
        b'{"prompt": "a", "prompt_id": {}}\n',
        "p.jsonl row 1: column 'prompt_id' is {}; expected a string",
    ),
    "another encoding": ("p.txt", "caf\u00e9\n".encode("latin-1"), "p.txt: not UTF-8 text"),
    "an unknown type of weights": ("p.txt", b"fine\n", "dtype is 'float'; did you mean 'float32'?"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_end_with_one_message(name, content, message, run, folder):
    (folder / name).write_bytes(content)
    assert_refused(*run("generate", "model", name, "--dtype", "float"), message)
    assert not (folder / "completions.jsonl").exists()


def test_whole_characters_written_as_escapes_are_read(run, folder):
    (folder / "good.jsonl").write_text(lines(*(row | {"prompt": f"{row['prompt']} \U0001f35e"} for row in GOOD)))
    assert "\\ud83c" in (folder / "good.jsonl").read_text()
    assert run("data", "inspect", "good.jsonl")[0] == 0


COMPARE = {
    "out": "runs",
    "worlds": {"shared": {}},
    "seeds": [0, 1],
    "against": "bfpo",
    "variants": {"bfpo": {"method": "bfpo", "changes": {"learning_rate.x": 1}}},
}


def test_a_bad_comparison_ends_with_one_message(run, folder):
    (folder / "compare.yaml").write_text(yaml.safe_dump(COMPARE))
    assert_refused(*run("experiment", "compare.yaml"), "change 'learning_rate.x': 'learning_rate' is 0.0")
    tuned = COMPARE | {"variants": {"bfpo": {"method": "bfpo", "tuned": "bfpo"}}, "tuning": "tuning.json"}
    (folder / "compare.yaml").write_text(yaml.safe_dump(tuned))
    chosen = [{"world": "shared", "variant": "bfpo", "values": 3}]
    (folder / "tuning.json").write_text(json.dumps({"chosen": chosen}))
    assert_refused(
        *run("experiment", "compare.yaml"), "tuning.json isn't the comparison.json of an experiment with 'vary'"
    )


def test_usage_errors_exit_with_two_as_well(run):
    code, _, errors = run("data", "inspect", "good.jsonl", "--limit", "0")
    assert code == 2
    assert "--limit" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_lets_the_error_through_wherever_it_stands(place, monkeypatch):
    arguments = ["data", "inspect", "nothing.jsonl"]
    arguments.insert(place, "--debug")
    monkeypatch.setattr("sys.argv", ["bfpo", *arguments])
    with pytest.raises(DataError, match=r"path 'nothing.jsonl': no such file"):
        main()


@pytest.mark.parametrize("name", ["a missing label", "half a last line", "a chat without an assistant turn"])
def test_the_real_command_line_prints_one_line_and_exits_with_two(name, folder):
    content, message = BAD_DATA[name]
    (folder / "bad.jsonl").write_text(content)
    done = run_process("data", "inspect", "bad.jsonl")
    assert_refused(done.returncode, done.stdout, done.stderr, message)
    assert len(done.stderr.splitlines()) == 1


def test_the_real_command_line_refuses_a_recipe(folder):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(TRAIN | {"bufer": []}))
    done = run_process("train", "recipe.yaml", "--dry-run")
    assert_refused(done.returncode, done.stdout, done.stderr, "bufer: unknown key; did you mean 'buffer'?")


def test_the_real_command_line_shows_the_traceback_when_asked(folder):
    done = run_process("data", "inspect", "nothing.jsonl", "--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "bfpo.errors.DataError: path 'nothing.jsonl': no such file" in done.stderr
