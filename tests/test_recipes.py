"""Every shipped recipe parses, builds and dry-runs, on a tiny model and rows of its data sets' schemas."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from transformers import LlamaConfig, MistralConfig

from bfpo.config.loading import check_recipe, read_recipe
from bfpo.config.losses import BFPOSection
from bfpo.config.recipes import SftRecipe, TextSection, TrainRecipe
from bfpo.core.chain import INSTRUCTIONS_HASH, GuidedAnswer
from bfpo.core.conversation import Message, user_says
from bfpo.core.files import write_jsonl
from bfpo.data.template import chat_template
from bfpo.losses.build import make_loss
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.training.arguments import training_arguments
from bfpo.training.estimate import footprint
from bfpo.training.run import run_training
from bfpo.training.run_experts import run_experts
from bfpo.training.run_sft import run_sft

ROOT = Path(__file__).parents[1]
# The recipes of the testbed are tested in tests/experiments, those of accelerate below.
REDTEAM = ROOT / "recipes" / "chain" / "redteam.yaml"
RECIPES = sorted(
    file
    for file in (ROOT / "recipes").rglob("*.yaml")
    if file.parent.name not in ("testbed", "accelerate") and file != REDTEAM
)
LAUNCHERS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
PKU = {
    "prompt": "near which {n} things",
    "response_0": "round red box {n}",
    "response_1": "small green ball",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
TURNS = [
    {"role": "user", "content": "near which {n} things"},
    {"role": "assistant", "content": "round red box {n}"},
    {"role": "user", "content": "and under"},
    {"role": "assistant", "content": "small green ball"},
]
QUESTION = {"role": "user", "content": "under which {n} things"}
GUIDED = GuidedAnswer(
    "{n}",
    user_says("under {n}"),
    *(Message("assistant", f"{word} {{n}}") for word in ("red box", "lamp", "ball", "yes")),
    safe=True,
    judge="j@1",
    kept=True,
    instructions=INSTRUCTIONS_HASH,
).to_row()
# One row of each schema, as the data sets' cards and the official code's adapters have it.
SCHEMAS = {
    "pku_saferlhf": PKU,
    "pku_saferlhf_by_safety": PKU,
    "pku_safer": PKU,
    "ultrafeedback": {
        "prompt": QUESTION["content"],
        "chosen": [QUESTION, TURNS[1]],
        "rejected": [QUESTION, TURNS[3]],
    },
    "demonstrations": {"prompt": "which {n}", "prompt_id": "0", "messages": TURNS},
    "bfpo_redteam": {
        "prompt": "near which {n} things",
        "modeloutput1": "round red box {n}",
        "modeloutput2": "small green ball",
        "is_modelout1_safe": 1,
        "is_modelout2_safe": 0,
        "better_modelout": 2,
    },
    "xstest_completions": {
        "prompt": "which {pair}",
        "type": "homonyms",
        "completion": "round red box {n}",
        "final_label": "{label}",
    },
    "guided": GUIDED,
    "pairs": {
        "prompt": "near {n}",
        "chosen": "round red box {n}",
        "rejected": "lamp",
        "is_chosen_safe": False,
        "is_rejected_safe": True,
    },
    "alpaca_eval": {"instruction": "under {n}", "output_1": "red box", "output_2": "lamp {n}", "preference": 1.9},
}


# Each prompt of XSTest has a compliance and a refusal.
LABELS = ("1_full_compliance", "2_full_refusal")


def numbered(value, number):
    """Return a row with its number in it."""
    if isinstance(value, str):
        words = {"{n}": number, "{pair}": number // 2, "{label}": LABELS[number % 2]}
        for name, word in words.items():
            value = value.replace(name, str(word))
        return value
    if isinstance(value, dict):
        return {key: numbered(inner, number) for key, inner in value.items()}
    return [numbered(inner, number) for inner in value] if isinstance(value, list | tuple) else value


def read(file, tmp_path):
    """Return the checked recipe of a file, with another output folder."""
    content = read_recipe(file, [f"trainer.output_dir={tmp_path / 'run'}", "trainer.use_cpu=true"])
    return check_recipe(content, TrainRecipe if "loss" in content else SftRecipe, file.name)


def on_tiny_files(recipe, tmp_path):
    """Return the recipe with local files instead of hub data sets, and a tiny model instead of a large one."""

    def local(source):
        row = SCHEMAS[source.adapter]
        path = tmp_path / f"{source.adapter}.jsonl"
        # The evaluation of the paper's recipe must not find its own training prompts.
        first = 1000 if source.split == "test" else 0
        if first:
            path = tmp_path / f"{source.adapter}-test.jsonl"
        write_jsonl(path, (numbered(row, number) for number in range(first, first + 40)))
        return source.model_copy(update={"path": str(path)})

    changes = {"data": [local(source) for source in recipe.data], "holdout": max(recipe.holdout, 0.1)}
    if isinstance(recipe, TrainRecipe):
        changes["buffer"] = [local(source) for source in recipe.buffer]
        changes["eval"] = [local(source) for source in recipe.eval]
        if recipe.eval:
            changes["holdout"] = 0.0
    if isinstance(recipe, TrainRecipe) and recipe.model.sft is not None:
        sft = recipe.model.sft
        new = sft.model.new.model_copy(update={"vocab_size": 300})
        sft = sft.model_copy(update={"data": changes["data"], "model": sft.model.model_copy(update={"new": new})})
        changes["model"] = recipe.model.model_copy(update={"sft": sft})
    else:
        changes["model"] = recipe.model.model_copy(update={"path": "tiny", "revision": None})
    return recipe.model_copy(update=changes)


@pytest.fixture
def tiny(tmp_path, monkeypatch, make_model, tokenizer):
    """Change to a folder with a tiny model and the recipes of the repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    make_model(shape="nano").save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")


def test_there_are_recipes():
    assert len(RECIPES) >= 8
    assert [file.stem for file in LAUNCHERS] == ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_recipe_builds(file, tmp_path):
    recipe = read(file, tmp_path)
    args = training_arguments(recipe.trainer)
    assert args.output_dir == str(tmp_path / "run")
    if isinstance(recipe, TrainRecipe):
        make_loss(recipe.loss.model_dump())
        if recipe.model.sft is not None:
            training_arguments({**recipe.model.sft.trainer, "output_dir": str(tmp_path)})


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_recipe_dry_runs(file, tmp_path, tiny, capsys):
    recipe = on_tiny_files(read(file, tmp_path), tmp_path)
    if isinstance(recipe, TrainRecipe):
        run_training(recipe, dry_run=True)
    else:
        (run_experts if recipe.experts else run_sft)(recipe, dry_run=True)
    output = capsys.readouterr().out
    assert "dry run: nothing was trained" in output
    assert "memory of one process about" in output


@pytest.mark.parametrize("file", [*RECIPES, *LAUNCHERS], ids=lambda file: file.name)
def test_the_files_that_a_recipe_names_exist(file):
    for name in re.findall(r"recipes/[\w/.-]+\.(?:yaml|jinja)", file.read_text()):
        # The official code has folders of this name, too.
        assert name.startswith("recipes/zephyr-7b-beta/") or (ROOT / name).exists(), name


def test_the_recipes_of_the_chain_fit_together(tmp_path):
    redteam = check_recipe(read_recipe(REDTEAM), RedteamRecipe, REDTEAM.name)
    others = {file.stem: read(file, tmp_path) for file in sorted(REDTEAM.parent.glob("*.yaml")) if file != REDTEAM}
    assert {name: recipe.data[0].path for name, recipe in others.items()} == {
        "distill-bfpo": f"{redteam.out}/pairs.jsonl",
        "distill-sft": f"{redteam.out}/guided.jsonl",
        "experts": f"{redteam.out}/guided.jsonl",
    }
    assert {recipe.model.path for recipe in others.values()} == {redteam.model.path}
    assert redteam.guide


def test_the_counts_of_the_paper_are_overrides_of_the_released_recipe():
    file = ROOT / "recipes" / "paper" / "bfpo-mistral-7b.yaml"
    (line,) = re.findall(r"^#   (data\.0\..*)$", file.read_text(), flags=re.MULTILINE)
    recipe = check_recipe(read_recipe(file, line.split()), TrainRecipe, "30k")
    assert [(source.fraction, source.limit) for source in (*recipe.data, *recipe.buffer)] == [(None, 30000)] * 2


def test_the_paper_s_recipes_have_the_official_settings(tmp_path):
    """Retyped from wx-zhang/bfpo: bfpo.sh, redteaming.sh, recipes/zephyr-7b-beta, src/alignment/configs.py."""
    sft, bfpo, redteam = (
        read(ROOT / "recipes" / "paper" / name, tmp_path)
        for name in ("sft-mistral-7b.yaml", "bfpo-mistral-7b.yaml", "redteam-zephyr-7b-beta.yaml")
    )
    assert [recipe.train_only for recipe in (sft, bfpo, redteam)] == [["down_proj"]] * 3
    assert [recipe.trainer["learning_rate"] for recipe in (sft, bfpo, redteam)] == [5e-7] * 3
    assert [
        recipe.trainer["per_device_train_batch_size"] * recipe.trainer["gradient_accumulation_steps"]
        for recipe in (sft, bfpo, redteam)
    ] == [8, 8, 8]
    assert [recipe.text.max_length for recipe in (sft, bfpo, redteam)] == [2048, 1024, 1024]
    assert [source.fraction for source in (*sft.data, *bfpo.data, *bfpo.buffer)] == [None, 0.2, 0.2, None]
    for recipe in (bfpo, redteam):
        assert recipe.loss == BFPOSection(beta=0.01, b1=3.0, alpha=0.5)
    assert (bfpo.buffer_weight, bfpo.data[0].sample, redteam.buffer) == (1.0, "head", [])


def test_the_recipes_of_sacpo_have_the_official_settings(tmp_path, tokenizer):
    """Retyped from line/sacpo: script/train/pku_helpful(dpo)_safety_train.sh, src/constant.py."""
    first, second = (
        read(ROOT / "recipes" / "sacpo" / name, tmp_path) for name in ("helpfulness.yaml", "safety.yaml")
    )
    assert [recipe.loss.beta for recipe in (first, second)] == [0.1, 0.01]
    assert [recipe.data[0].adapter for recipe in (first, second)] == ["pku_saferlhf", "pku_saferlhf_by_safety"]
    resolved = read_recipe(ROOT / "recipes" / "sacpo" / "helpfulness.yaml")
    assert second.model.path == resolved["trainer"]["output_dir"]
    for recipe in (first, second):
        assert (recipe.trainer["learning_rate"], recipe.trainer["num_train_epochs"]) == (2e-5, 3)
        assert recipe.trainer["per_device_train_batch_size"] * recipe.trainer["gradient_accumulation_steps"] == 32
    template = chat_template(TextSection(chat_template=str(ROOT / "recipes" / "sacpo" / "pku.jinja")))
    turns = [{"role": "user", "content": "near"}, {"role": "assistant", "content": "box"}]
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    prompt = f"{bos}BEGINNING OF CONVERSATION: USER: near ASSISTANT:"
    for count, text in ((1, prompt), (2, f"{prompt}box{eos}")):
        assert tokenizer.apply_chat_template(turns[:count], chat_template=template, tokenize=False) == text


def test_the_template_is_the_official_text(tokenizer):
    """Retyped: src/alignment/data.py @7f7d002 puts an empty system turn first; each turn ends with a line break."""
    file = str(ROOT / "recipes" / "paper" / "zephyr.jinja")
    turns = [{"role": "user", "content": "near"}, {"role": "assistant", "content": "box"}]
    template = chat_template(TextSection(chat_template=file))
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    system = f"{bos}<|system|>\n{eos}\n"
    prompt = f"{system}<|user|>\nnear{eos}\n<|assistant|>\n"
    conversation = f"{prompt}box{eos}\n"
    rendered = [
        tokenizer.apply_chat_template(turns[:1], chat_template=template, tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False),
    ]
    assert rendered == [prompt, conversation]


LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=128264
)
TINYLLAMA = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4, vocab_size=32000
)
MISTRAL_7B = MistralConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=32000
)


@pytest.mark.parametrize(
    ("name", "config", "overrides", "gib"),
    [
        ("1b-24gb.yaml", TINYLLAMA, [], 7.9),
        ("1b-24gb.yaml", TINYLLAMA, ["train_only=null"], 16.4),
        ("lora-8b.yaml", LLAMA_8B, [], 15.6),
        ("qlora-8b.yaml", LLAMA_8B, [], 7.8),
        ("paper/bfpo-mistral-7b.yaml", MISTRAL_7B, [], 55.0),
    ],
)
def test_the_memory_a_recipe_names_is_the_estimate(name, config, overrides, gib, tmp_path, tokenizer):
    """With the public sizes of the models, and without activations, which depend on the data."""
    file = ROOT / "recipes" / name
    config.save_pretrained(tmp_path / "sized")
    recipe = check_recipe(read_recipe(file, overrides), TrainRecipe, name)
    section = recipe.model.model_copy(update={"path": str(tmp_path / "sized"), "revision": None})
    needed = footprint(
        section,
        tokenizer,
        train_only=recipe.train_only,
        lora=recipe.lora,
        reference=recipe.reference,
    ).estimate(1)
    gib_needed = (needed.weights + needed.gradients + needed.optimizer + needed.reference) / 2**30
    assert gib_needed == pytest.approx(gib, abs=0.05)
    assert f"{gib} GiB" in file.read_text()


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda file: file.name)
def test_accelerate_takes_the_launch_file(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == 8
    args = launch_command_parser().parse_args(["--config_file", str(file), "-m", "bfpo"])
    args, _, _ = _validate_launch_command(args)
    backends = (args.multi_gpu, args.use_fsdp, args.use_deepspeed)
    assert backends == (file.stem == "ddp", file.stem == "fsdp2", file.stem.startswith("zero"))
    if file.stem.startswith("zero"):
        assert str(args.zero_stage) == file.stem[-1]
    if file.stem == "fsdp2":
        # Another kind of state dict, and transformers would save no final model.
        assert (str(args.fsdp_version), args.fsdp_state_dict_type) == ("2", "FULL_STATE_DICT")
