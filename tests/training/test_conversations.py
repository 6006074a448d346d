"""Training on tool calls and on reasoning: through recipes, a chat template and the packed step."""

import json

import pytest
import torch

from bfpo.config.loading import check_recipe
from bfpo.config.recipes import TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.training.run import run_training

TEMPLATE = (
    "{% for tool in tools or [] %}<tool>{{ tool.function.name }}\n{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("read_file", "delete_file")]
FILES = ("notes", "photos", "letters", "songs", "maps", "plans", "bills", "lists", "games", "films")
ACTIONS = ("Open", "Show", "Print", "Check")


def call(name, path):
    call = {"type": "function", "function": {"name": name, "arguments": {"path": path}}}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}]


def tool_rows():
    """Two calls for each request: one that reads the file, and one that deletes it, which is unsafe."""
    for action in ACTIONS:
        for file in FILES:
            calls = call("read_file", file), call("delete_file", file)
            yield {
                "prompt": f"{action} my {file}.",
                "chosen": calls[0],
                "rejected": calls[1],
                "is_chosen_safe": True,
                "is_rejected_safe": False,
                "tools": TOOLS,
            }


def thinking_rows():
    for file in FILES:
        thought = {"role": "assistant", "reasoning_content": f"about {file}"}
        answers = [[{**thought, "content": text}] for text in ("Yes.", "No.")]
        yield {
            "prompt": f"Open my {file}.",
            "chosen": answers[0],
            "rejected": answers[1],
            "is_chosen_safe": True,
            "is_rejected_safe": True,
        }


def train(folder, rows, **text):
    write_jsonl(folder / "pairs.jsonl", rows)
    recipe = {
        "model": {"new": {"shape": "nano", "vocab_size": 400}},
        "data": [{"path": str(folder / "pairs.jsonl")}],
        "holdout": 0.3,
        "loss": {"name": "bfpo", "beta": 0.5},
        "text": {"chat_template": TEMPLATE, "max_length": 512, **text},
        "trainer": {
            "output_dir": str(folder / "out"),
            "max_steps": 30 if not text else 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "save_strategy": "no",
            "use_cpu": True,
        },
    }
    return run_training(check_recipe(recipe, TrainRecipe, "toy"))


def test_a_model_trained_on_calls_prefers_the_safe_call_on_held_out_prompts(tmp_path):
    torch.manual_seed(0)
    run = train(tmp_path, tool_rows())
    held_out = run["evaluation"]["main"]["cells"]["su"]
    assert held_out["pairs"] >= 8
    assert held_out["sign_agreement"] == 1.0
    assert held_out["margin"] > 1
    manifest = json.loads((tmp_path / "out/data_manifest.json").read_text())
    assert manifest["sources"][0]["dropped"] == {}


@pytest.mark.parametrize("thinking", ["score", "context", "drop"])
def test_pairs_with_reasoning_train_with_each_setting(tmp_path, thinking):
    train(tmp_path, thinking_rows(), thinking=thinking)
    manifest = json.loads((tmp_path / "out/data_manifest.json").read_text())
    (note,) = manifest["sources"][0]["noted"]
    assert note.endswith(f"(text.thinking: {thinking})")
