"""The recipe for real text, from its one command to a checkpoint, cut to a few steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"public data of ../shared/data are not at {DATA}"),
]


def test_one_command_leads_from_real_text_to_a_checkpoint(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "bfpo", "train", "recipes/xstest-cpu.yaml"]
    command += [f"trainer.output_dir={tmp_path / 'run'}", "trainer.max_steps=4", "model.sft.trainer.max_steps=4"]
    first = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "fine-tuning the model to start from" in first.stdout
    second = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "the fine-tuned model is in the cache" in second.stdout
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    cells = run["evaluation"]["main"]["cells"]
    assert [cell for cell, numbers in cells.items() if numbers["pairs"]] == ["ss", "us"]
    assert cells["su"] == {"pairs": 0, "margin": None, "target_gap": None, "sign_agreement": None}
    assert "su    empty" in second.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    torch.manual_seed(0)
    assert model.generate(**chat, max_new_tokens=8).shape[1] > chat["input_ids"].shape[1]
