"""Commands of README and docs/ run as they stand there, with tiny models and data under the names that they have."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from bfpo.commands.app import main
from bfpo.config.recipes import NewModel
from bfpo.model.new import new_model

from .blocks import commands_of, shell_blocks

pytestmark = pytest.mark.slow

HANDBOOK = {
    "model_name_or_path": "org/model",
    "dataset_mixer": {"org/set": 1.0},
    "beta": 0.1,
    "learning_rate": 5e-7,
    "output_dir": "runs/theirs",
}
RUNS = {
    "README.md": ["bfpo data inspect pairs.jsonl", "bfpo train recipe.yaml loss.alpha=0.25"],
    "docs/data.md": [
        "bfpo data inspect my_pairs.jsonl --examples 0",
        "bfpo data prepare recipe.yaml --out prepared",
        "bfpo data degrade pairs.jsonl --versions 2 --out degraded",
    ],
    "docs/evaluation.md": [
        "bfpo generate runs/mine prompts.jsonl --out completions.jsonl --temperature 0.7 --max-new-tokens 256"
    ],
    "docs/migration.md": ["bfpo migrate config_full.yaml --out recipe.yaml"],
    "docs/training.md": [
        "bfpo sft recipe.yaml lora.r=16 trainer.output_dir=runs/sft",
        "bfpo train recipe.yaml model.path=runs/sft trainer.output_dir=runs/aligned",
        "bfpo export runs/aligned --to merged --out merged --dtype bfloat16",
        "bfpo chat runs/mine",
    ],
}
WRITTEN = {
    "README.md": ["runs/new/model.safetensors"],
    "docs/data.md": ["prepared/pairs.jsonl", "degraded/degrade.json"],
    "docs/evaluation.md": ["completions.jsonl"],
    "docs/migration.md": ["recipe.yaml"],
    "docs/training.md": ["merged/model.safetensors"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer, main_pairs):
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("org/model")
    new_model(NewModel(shape="nano"), tokenizer).save_pretrained("org/model")
    shutil.copytree("org/model", "runs/mine")
    for name in ("pairs.jsonl", "my_pairs.jsonl"):
        Path(name).write_text("".join(json.dumps(pair.to_row()) + "\n" for pair in main_pairs))
    Path("prompts.jsonl").write_text(json.dumps({"prompt_id": "1", "prompt": "near which box"}) + "\n")
    trainer = {"output_dir": "runs/new", "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True}
    recipe = {"model": {"path": "org/model"}, "data": [{"path": "pairs.jsonl"}], "trainer": trainer}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    Path("config_full.yaml").write_text(yaml.safe_dump(HANDBOOK))
    return tmp_path


@pytest.mark.parametrize("page", RUNS)
def test_commands_of_a_page_run(page, folder, monkeypatch):
    there = [words for block in shell_blocks() if block.page == page for words in commands_of(block.code)]
    for command in RUNS[page]:
        assert command.split() in there, f"{page} no longer has: {command}"
        if command.startswith("bfpo migrate"):
            Path("recipe.yaml").unlink()
        monkeypatch.setattr(sys, "argv", command.split())
        # An end of input ends a chat.
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, command
    assert [name for name in WRITTEN[page] if not (folder / name).exists()] == []
