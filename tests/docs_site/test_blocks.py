"""Blocks of code in README and docs/: commands exist with their options, recipes are recipes, Python runs."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, LlamaConfig

from bfpo.certificates.recipe import CertifyRecipe
from bfpo.commands.app import app
from bfpo.config.loading import check_recipe, parse_yaml, read_recipe
from bfpo.config.per_token import PerTokenRecipe
from bfpo.config.recipes import NewModel, ScoreRecipe, Section, SftRecipe, TrainRecipe
from bfpo.core.pairs import COLUMNS
from bfpo.errors import RecipeError
from bfpo.evaluation.gate import Bound
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.suite import Suite
from bfpo.experiments.recipe import ExperimentRecipe
from bfpo.judging.guarded_engine import GuardFile
from bfpo.model.new import new_model
from bfpo.online.recipe import OnlineRecipe
from bfpo.redteam.recipe import RedteamRecipe

from .blocks import BLOCKS, PAGES, ROOT, commands_of, of_language, shell_blocks

# Keys that a recipe needs, so that a block may have others only.
MODEL, DATA, OUT = {"path": "m"}, [{"path": "pairs.jsonl"}], {"output_dir": "o"}
TRAIN = {"model": MODEL, "data": DATA, "trainer": OUT}
KINDS: dict[type[Section], dict] = {
    TrainRecipe: TRAIN,
    SftRecipe: TRAIN,
    ScoreRecipe: TRAIN,
    OnlineRecipe: {
        "model": MODEL, "prompts": [{"name": "file", "path": "p"}], "trainer": OUT, "reward": "reward:m",
        "cost": "cost:m", "combine": {"name": "bilinear"},
    },
    RedteamRecipe: {"out": "o", "model": MODEL, "prompts": [{"name": "advbench", "path": "p"}], "judge": "linear:j"},
    EvalRecipe: {"out": "o", "model": MODEL, "suites": ["safety"], "judges": ["linear:j"]},
    CertifyRecipe: {
        "out": "o", "model": MODEL, "head": "h", "paraphrases": "p", "boxes": {"hull": True},
    },
    PerTokenRecipe: {"model": MODEL, "per_token": True, "completions": "c", "verdicts": "v", "out": "o"},
    ExperimentRecipe: {
        "out": "o", "worlds": {"w": {}}, "seeds": [0, 1], "against": "bfpo", "variants": {"bfpo": {"method": "bfpo"}},
    },
    GuardFile: {},
    Suite: {},
}  # fmt: skip
RECIPES = {
    "train": TrainRecipe, "sft": SftRecipe, "online": OnlineRecipe, "redteam": RedteamRecipe, "eval": EvalRecipe,
    "certify": CertifyRecipe, "experiment": ExperimentRecipe,
}  # fmt: skip
# Programs of others in blocks of commands.
OTHERS = {
    "accelerate",
    "cp",
    "docker",
    "export",
    "git",
    "huggingface-cli",
    "hf",
    "llama-server",
    "lm-eval",
    "ollama",
    "pass",
    "pip",
    "sbatch",
    "vllm",
}


def parse(words):
    """Parse a `bfpo` command without running it, and return its name and parameters."""
    command, name = typer.main.get_command(app), "bfpo"
    context, rest = None, list(words)
    while hasattr(command, "commands"):
        assert rest, f"{name}: no command"
        assert rest[0] in command.commands, f"{name} has no command {rest[0]}"
        name, command = rest[0], command.commands[rest[0]]
        rest = rest[1:]
    context = command.make_context(name, rest)
    return command.name, context.params


def bfpo_words(words):
    """Return the words behind `bfpo` or `-m bfpo` in a command; None if it is of another program."""
    if words[0] == "bfpo":
        return words[1:]
    for index in range(len(words) - 1):
        if words[index : index + 2] == ["-m", "bfpo"]:
            return words[index + 2 :]
    return None


@pytest.mark.parametrize("block", shell_blocks(), ids=str)
def test_commands_exist_with_their_options(block):
    for words in commands_of(block.code):
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)] or ["pass"]
        if (ours := bfpo_words(words)) is not None:
            name, params = parse(ours)
            if name in RECIPES and params.get("overrides"):
                check_overrides(name, params["recipe"], params["overrides"])
        elif words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert words[1] in targets
        elif words[0] == "python":
            (script,) = [word for word in words if word.endswith(".py")] or [None]
            assert script is None or (ROOT / script).exists(), script
        elif words[0].startswith("recipes/launch/"):
            assert (ROOT / words[0]).exists(), words[0]
        else:
            assert words[0] in OTHERS, f"{words[0]}: a program that this test doesn't know"


def check_overrides(name, recipe, overrides):
    """Check the overrides of a command on the recipe that it names, or on a small one."""
    kind = RECIPES[name]
    if (ROOT / recipe).exists():
        check_recipe(read_recipe(ROOT / recipe, overrides), kind, str(recipe))
        return
    # The recipe of a page may be of any kind that the keys fit, such as one with lora.
    content = json.loads(json.dumps(KINDS[kind]))
    if any(override.startswith("lora.") for override in overrides):
        content["lora"] = {"r": 8}
    Path("recipe.yaml").write_text(json.dumps(content))
    check_recipe(read_recipe("recipe.yaml", overrides), kind, "recipe.yaml")


@pytest.fixture(autouse=True)
def in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_commands_in_the_text_exist():
    root = typer.main.get_command(app)
    unknown = []
    for file in PAGES:
        for text in re.findall(r"(?<!`)`(bfpo [^`\n]+)`(?!`)", file.read_text()):
            words = shlex.split(text)[1:]
            command = root
            while words and hasattr(command, "commands") and words[0] in command.commands:
                command, words = command.commands[words[0]], words[1:]
            known = {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}
            flags = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help", "--debug"}
            is_word = bool(words) and re.fullmatch(r"[a-z]+", words[0]) is not None
            if not flags <= known or (hasattr(command, "commands") and is_word):
                unknown.append(f"{file.name}: {text}")
    # What upgrading tells of earlier versions, and of commands to come.
    assert [line for line in unknown if not line.startswith("upgrading.md")] == []


@pytest.mark.parametrize("block", of_language("yaml"), ids=str)
def test_yaml_is_a_recipe_or_a_part_of_one(block):
    content = parse_yaml(block.code, str(block))
    if isinstance(content, list):
        entries = [
            Bound,
            lambda **entry: check_recipe(KINDS[EvalRecipe] | {"suites": [entry]}, EvalRecipe, str(block)),
        ]
        assert any(all(fits(entry, make) for entry in content) for make in entries), block
        return
    # A block with one key may be the value of another key, such as the `loss:` of a recipe.
    problems = []
    for kind, needed in KINDS.items():
        try:
            check_recipe(needed | content, kind, f"{block} as {kind.__name__}")
        except RecipeError as error:
            problems.append(str(error))
        else:
            return
    pytest.fail("\n\n".join(problems))


def fits(entry, make):
    try:
        make(**entry)
    except (ValidationError, RecipeError):
        return False
    return True


@pytest.mark.parametrize("block", of_language("json"), ids=str)
def test_json_is_a_row_of_pairs(block):
    assert set(json.loads(block.code)) <= set(COLUMNS)


# Blocks that a test can't run as they stand, with the reason.
NOT_RUN = {
    "localhost": "asks a server",
    "def loss": "tests/test_docs.py compares it with the library",
    "SmolLM2": "tests/test_docs.py trains it with another model",
}


@pytest.fixture
def files(tokenizer, main_pairs):
    """Models and data under the names that blocks have."""
    model = new_model(NewModel(shape="nano"), tokenizer)
    for folder in ("org/model", "runs/scorer/cost"):
        tokenizer.save_pretrained(folder)
    model.save_pretrained("org/model")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained("runs/scorer/cost")
    Path("pairs.jsonl").write_text("".join(json.dumps(pair.to_row()) + "\n" for pair in main_pairs))


# Making a world, and training, take seconds.
PYTHON = [
    pytest.param(
        block, marks=[pytest.mark.slow] if re.search(r"World\(|\.train\(\)", block.code) else [], id=str(block)
    )
    for block in of_language("python")
]


@pytest.mark.parametrize("block", PYTHON)
def test_python_runs(block, files):
    compiled = compile(block.code, str(block), "exec")
    if not any(text in block.code for text in NOT_RUN):
        exec(compiled, {"__name__": "block"})


def test_the_reasons_for_not_running_a_block_apply():
    assert [text for text in NOT_RUN if not any(text in block.code for block in of_language("python"))] == []


def test_blocks_are_found():
    assert {block.language for block in BLOCKS} == {"", "bash", "json", "python", "text", "yaml"}
    assert len(shell_blocks()) > 25
    assert len(of_language("yaml")) > 20
