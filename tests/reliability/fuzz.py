"""Fuzz the program in this process: mutated recipes, data, and files that it reads back.

`python tests/reliability/fuzz.py --count 10000 --seed 0 --out benchmarks/results/fuzz.json` runs by hand. Input N of
a seed is always the same; `--only N` runs it alone, and shows the traceback.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}

import typer
import yaml
from mutations import (
    FORMATS,
    any_value,
    json_bytes,
    mutate_bytes,
    mutate_rows,
    mutate_table,
    mutate_value,
    mutate_yaml,
    table_bytes,
)

from bfpo.commands.app import app
from bfpo.commands.errors import run_app
from bfpo.config.loading import check_recipe, load_recipe
from bfpo.config.recipes import SftRecipe, Source, TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.core.samples import Completion
from bfpo.data.adapters import ADAPTERS
from bfpo.data.demonstrations import load_demonstrations
from bfpo.data.prompts import PromptSource, read_prompt_source
from bfpo.data.stages import read_prompt_file
from bfpo.evaluation.alpaca_eval import read_alpaca_annotations
from bfpo.evaluation.gate import read_gate
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.subject import training_judges
from bfpo.experiments.recipe import ExperimentRecipe
from bfpo.experiments.units import make_units
from bfpo.generation.scripted import ScriptedEngine
from bfpo.judging.spec import JUDGES
from bfpo.redteam import run as redteam
from bfpo.redteam.recipe import RedteamRecipe
from bfpo.testbed.world import World, WorldOptions
from bfpo.training.checkpoints import MARK, read_mark, write_mark

# Seconds after which an input counts as a hang.
LIMIT = 30
BUG = "this is a bug in bfpo"

WORLD = WorldOptions(
    pretraining=20, fine_tuning=20, safety_pairs=24, helpful_pairs=16,
    harmful_prompts=4, benign_prompts=4, lookalike_prompts=4,
)  # fmt: skip
LABELS = {"is_chosen_safe": True, "is_rejected_safe": False}
TRAIN = {
    "model": {"path": "nothing", "dtype": "float32", "attn_implementation": "sdpa"},
    "data": [
        {"path": "pairs.jsonl", "adapter": "pairs", "fraction": 0.9, "limit": 20, "sample": "random", "seed": 1,
         "columns": {"prompt": "prompt"}},
    ],
    "buffer": [{"path": ["buffer.jsonl"], "assume_safe": True, "license": "x"}],
    "eval": [{"path": "pairs.jsonl", "limit": 2, "sample": "head"}],
    "holdout": 0.1,
    "max_dropped": 0.5,
    "leaks": "drop",
    "benchmarks": ["prompts.txt"],
    "text": {"max_length": 64, "truncation": "keep_end"},
    "loss": {"name": "bfpo", "beta": 0.01, "alpha": 0.5},
    "reference": "auto",
    "buffer_weight": 1.0,
    "trainer": {"output_dir": "out", "learning_rate": 1e-4, "max_steps": 2, "use_cpu": True, "report_to": ["none"],
                "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "optim": "adamw_torch", "seed": 42},
}  # fmt: skip
SFT = {
    "model": {"new": {"shape": "nano", "vocab_size": 300}},
    "data": [{"adapter": "demonstrations", "path": "demos.jsonl"}],
    "text": {"max_length": 64},
    "lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj"]},
    "trainer": {"output_dir": "out", "max_steps": 2},
}
REDTEAM = {
    "out": "rt",
    "model": {"path": "toy", "server": "http://127.0.0.1:9/v1", "concurrency": 4, "timeout": 1.0, "tries": 1},
    "prompts": [{"name": "file", "path": "prompts.txt", "kind": "harmful", "limit": 3}, {"name": "xstest"}],
    "judge": "oracle",
    "helpfulness": "rubric:m@http://127.0.0.1:9/v1",
    "judge_server": {"concurrency": 2},
    "samples": 3,
    "temperature": 1.0,
    "quota": {"su": 3},
    "rounds": 1,
    "train": {"loss": {"name": "bfpo"}, "trainer": {"max_steps": 1}},
}
COMPARE = {
    "out": "cmp",
    "results": "res",
    "variants": {
        "bfpo": {"method": "bfpo", "changes": {"loss.alpha": 0.0}, "dials": {"safety_noise": 0.1},
                 "vary": {"learning_rate": [1e-3, 2e-3]}},
        "dpo": {"method": "dpo_h"},
    },
    "worlds": {"shared": {"pretraining": 20, "harmful_share": 0.5}},
    "seeds": [0, 1],
    "against": "dpo",
    "steps": 2,
    "jobs": 1,
}  # fmt: skip
SUITE = {
    "title": "A toy",
    "note": "x",
    "judges": ["safe", "refusal"],
    "indices": {"harmlessness_index": {"bad": "safety"}},
    "tasks": [
        {
            "name": "bad",
            "source": "file",
            "path": "prompts.jsonl",
            "only": "harmful",
            "limit": 3,
            "system": "be good",
        },
        {
            "name": "fine",
            "source": "file",
            "path": "prompts.jsonl",
            "only": "lookalike",
            "where": {"kind": "lookalike"},
        },
    ],
    "sampling": {"temperature": 0.0},
}
GATE = {
    "bounds": [
        {"suite": "testbed", "task": "harmful", "metric": "safety", "min": 0.1},
        {"suite": "testbed", "task": "lookalike", "metric": "over_refusal", "max": 0.9, "category": None},
    ]
}
STACKS = (
    {"model_name_or_path": "a/b", "torch_dtype": None, "dataset_mixer": {"c/d": 0.5},
     "dataset_splits": ["train_prefs"],
     "use_buffer": True, "buffer_dataset_mixer": {"e/f": 1.0}, "beta": 0.01, "b1": 3.0, "max_prompt_length": 12,
     "evaluation_strategy": "steps", "use_selective": True, "selected_layers": ["down_proj"], "hub_token": "x",
     "warmup_ratio": 0.1, "output_dir": "o", "other_data_config": "None"},
    {"stage": "dpo", "finetuning_type": "lora", "model_name_or_path": "a/b", "lora_rank": 8, "lora_target": "all",
     "dataset": "x,y", "cutoff_len": 128, "pref_beta": 0.1, "pref_loss": "sigmoid", "template": "llama3",
     "quantization_bit": 4, "learning_rate": "5.0e-6", "adapter_name_or_path": None, "max_samples": 10},
    {"model_name_or_path": "a/b", "dataset_mixture": {"datasets": [{"id": "a/b", "columns": ["chosen"], "weight": 0.3,
     "split": "train"}], "seed": 0}, "loss_type": ["sigmoid"], "precompute_ref_log_probs": True, "use_peft": True,
     "lora_r": 8, "lora_target_modules": ["q_proj"], "attn_implementation": "kernels", "label_smoothing": 0.1},
    {"model_name_or_path": "a/b", "dataset_name": "c/d", "dataset_train_split": "train", "loss_type": "ipo",
     "max_length": 100, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"model_name_or_path": "a/b", "datasets": [{"path": "c/d", "name": "x", "split": "train"}], "packing": True,
     "max_seq_length": 20, "chat_template_path": "t.jinja", "completion_only_loss": True},
)  # fmt: skip
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "which box ?"}]
ANSWER = {"role": "assistant", "content": "the red box"}
TOOL_USED = [{"name": "pay", "description": "Pay.", "parameters": {"type": "object", "properties": {}}}]
ROWS = {
    "pairs": [
        {"prompt": f"which box {i} ?", "chosen": "the red box", "rejected": "a ball", **LABELS,
         "expected_safety": 0.5,
         "chosen_safety_score": 0.9, "rejected_safety_score": 0.1, "chosen_win_rate": 0.8, "rejected_win_rate": 0.4,
         "reward_margin": 1.5, "harm_categories": ["x"], "stream": "main", "dataset_name": "d", "row_id": "r"}
        for i in range(4)
    ],
    "ultrafeedback": [
        {"prompt": f"which {i}", "chosen": [*MESSAGES, ANSWER], "rejected": [*MESSAGES, {**ANSWER, "content": "b"}],
         "score_chosen": 8.5, "score_rejected": 2.0}
        for i in range(3)
    ],
    "pku_saferlhf": [
        {"prompt": f"q {i}", "response_0": "a", "response_1": "b", "is_response_0_safe": True,
         "is_response_1_safe": False, "better_response_id": i % 2, "safer_response_id": 0,
         "response_0_harm_category": {"x": True}, "response_1_harm_category": {"x": False}}
        for i in range(4)
    ],
    "hh_rlhf": [
        {"chosen": f"\n\nHuman: hi {i}\n\nAssistant: hello", "rejected": f"\n\nHuman: hi {i}\n\nAssistant: no"}
        for i in range(4)
    ],
    "bfpo_redteam": [
        {"prompt": f"q {i}", "modeloutput1": "a", "modeloutput2": "b", "is_modelout1_safe": 1, "is_modelout2_safe": 0,
         "better_modelout": 1 + i % 2}
        for i in range(4)
    ],
    "xstest_completions": [
        {"prompt": "q", "type": "contrast_homonyms" if i % 2 else "homonyms", "completion": f"c {i}",
         "final_label": ("1_full_compliance", "2_full_refusal", "3_partial_refusal")[i % 3]}
        for i in range(8)
    ],
    "alpaca_eval": [
        {"instruction": f"do {i}", "output_1": "a", "output_2": "b", "preference": 1 + (i % 3) / 2, "dataset": "x",
         "generator_1": "g", "generator_2": "h", "annotator": "y"}
        for i in range(6)
    ],
    "atbench": [
        {"id": i, "tool_used": TOOL_USED, "label": i % 2, "contents": [[
            {"role": "user", "content": f"pay invoice {i // 2}"},
            {"role": "agent", "thought": "hm", "action": json.dumps({"name": "pay", "arguments": {"to": i}})},
            {"role": "environment", "content": "ok"},
            {"role": "agent", "thought": None, "action": 'Complete{"response": "Paid."}'},
        ]]}
        for i in range(6)
    ],
}  # fmt: skip
for _order in ("by_safety", "safe_first"):
    ROWS[f"pku_saferlhf_{_order}"] = ROWS["pku_saferlhf"]
DEMONSTRATIONS = {
    "demonstrations": [
        {"prompt": f"which {i}", "completion": "that"} if i % 2 else {"messages": [*MESSAGES, ANSWER]}
        for i in range(4)
    ],
    "pku_safer": ROWS["pku_saferlhf"],
    "pairs": ROWS["pairs"],
    "atbench": ROWS["atbench"],
    "agent_align": [
        {"id": f"benign-{i}", "category": "benign", "tools": [{"type": "function", "function": TOOL_USED[0]}],
         "messages": [
            {"role": "user", "content": f"pay invoice {i}"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "pay", "arguments": '{"to": "ACC-1"}'}}]},
            {"role": "tool", "name": "pay", "content": "ok", "tool_call_id": "a"},
            {"role": "assistant", "content": "Paid."},
        ]}
        for i in range(4)
    ],
}  # fmt: skip
LOSSES = (
    {"name": "bfpo", "beta": 0.1, "alpha": 0.5, "b1": 3.0}, {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1},
    {"name": "ipo", "beta": 0.1}, {"name": "modpo"}, {"name": "json:loads"}, {"name": "a.b:C", "x": 1},
)  # fmt: skip
SPECS = (
    "oracle", "oracle:shared", "linear:judge.npz", "people:labeled.jsonl", "oracle+linear:judge.npz",
    "majority:oracle+oracle:separate+linear:judge.npz", "rubric:m@http://127.0.0.1:9/v1", "json:loads", "a.b:C:x",
)  # fmt: skip


class Outcome(NamedTuple):
    """How an input ended: `accepted`, `refused`, `gate`, or one of `FAILURES`, and what was printed."""

    kind: str
    text: str


FAILURES = ("traceback", "bug", "hang", "no message")


class Hang(BaseException):
    """An input took longer than `LIMIT`."""


def stop(*_):
    raise Hang


class Toy:
    """Unmutated files that every input starts from, made once, and the folder that inputs are written into."""

    def __init__(self, folder):
        self.folder, self._before = folder, Path.cwd()
        World(WORLD).write(folder / "world")
        world = folder / "world"
        self.pairs = read_lines(world / "safety.jsonl")[:12]
        self.prompts = read_lines(world / "prompts.jsonl")
        answers = [row["chosen"] for row in self.pairs]
        self.completions = [
            Completion(row["prompt_id"], 0, (), answers[i % len(answers)], "stop", 9, 8, "m", "saved", "abc").to_row()
            | {"prompt": row["prompt"]}
            for i, row in enumerate(self.prompts)
        ]
        self.labeled = [
            {"prompt": row["prompt"], "text": row["text"], "refusal": i % 2 == 0, "safe": i % 3 > 0, "model": "m"}
            for i, row in enumerate(self.completions)
        ]
        self.box = folder / "box"
        self.clean = folder / "clean"
        self.clean.mkdir()
        os.chdir(self.clean)
        write_jsonl(Path("pairs.jsonl"), self.pairs)
        write_jsonl(Path("buffer.jsonl"), read_lines(world / "helpfulness.jsonl")[:6])
        write_jsonl(Path("demos.jsonl"), read_lines(world / "fine_tuning.jsonl")[:6])
        write_jsonl(Path("prompts.jsonl"), self.prompts)
        write_jsonl(Path("completions.jsonl"), self.completions)
        write_jsonl(Path("labeled.jsonl"), self.labeled)
        Path("prompts.txt").write_text("which one ?\nwhat else ?\n")
        self.make_judge()
        self.eval = {
            "out": "run/evaluation",
            "run": "toy",
            "completions": "completions.jsonl",
            "suites": ["testbed"],
            "data": {"testbed": {"path": "prompts.jsonl"}},
            "judges": ["oracle", "linear:judge.npz"],
            "sampling": {"samples": 1, "temperature": 0.7},
            "max_unanswered": 0.5,
        }
        Path("eval.yaml").write_text(yaml.safe_dump(self.eval))
        must("eval", "eval.yaml")
        must("label", "pairs.jsonl", "--judge", "oracle", "--judge", "oracle:shared", "--out", "labels")
        must("judge", "run", "completions.jsonl", "--judge", "oracle", "--out", "verdicts.jsonl")
        Path("run/run.json").write_text(json.dumps(RUN_RECORD))
        Path("run/recipe.resolved.yaml").write_text(yaml.safe_dump(TRAIN))
        Path("run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
        Path("run/data_manifest.json").write_text(json.dumps({"schema": 1, "label_sources": {"oracle@1": 3}}))
        self.make_tokenizer()
        self.make_training()
        self.make_redteam()

    def make_judge(self):
        rows = [
            {"prompt": f"question {i}", "text": "sorry no" if i % 2 else "here is a box", "refusal": i % 2 == 1,
             "safe": i % 2 == 1}
            for i in range(24)
        ]  # fmt: skip
        write_jsonl(Path("fit.jsonl"), rows)
        must("judge", "fit", "fit.jsonl", "--out", "judge.npz")

    def make_tokenizer(self):
        from bfpo.config.recipes import NewModel
        from bfpo.model.new import new_model, new_tokenizer

        tokenizer = new_tokenizer([row["chosen"] for row in self.pairs], vocab_size=300)
        new_model(NewModel(shape="nano", vocab_size=300), tokenizer).save_pretrained("model")
        tokenizer.save_pretrained("model")

    def make_training(self):
        """Fine-tune a model, with a checkpoint after each step."""
        trainer = {"output_dir": "trained", "max_steps": 2, "save_steps": 1, "use_cpu": True,
                   "per_device_train_batch_size": 2}  # fmt: skip
        data = [{"adapter": "demonstrations", "path": "demos.jsonl"}]
        recipe = {"model": {"path": "model"}, "data": data, "text": {"max_length": 256}, "trainer": trainer}
        Path("sft.yaml").write_text(yaml.safe_dump(recipe))
        must("sft", "sft.yaml")

    def make_redteam(self):
        """Red-team a scripted model, which answers in turn with chosen and rejected answers of the world."""
        answers = [row[key] for row in self.pairs for key in ("chosen", "rejected")]
        self._open_engine = redteam.open_engine
        redteam.open_engine = lambda model, sampling: ScriptedEngine(
            lambda prompt, sample: answers[(len(prompt.prompt_id) + 5 * sample) % len(answers)], name="scripted"
        )
        prompts = [{"name": "file", "path": "prompts.jsonl"}]
        recipe = {"out": "rt", "model": {"path": "scripted"}, "prompts": prompts, "judge": "oracle", "samples": 4}
        Path("redteam.yaml").write_text(yaml.safe_dump(recipe))
        must("redteam", "redteam.yaml")

    def close(self):
        """Leave the toy's folder, and let red-teaming open engines again."""
        redteam.open_engine = self._open_engine
        os.chdir(self._before)

    def empty_box(self):
        """Make the folder of the next input: links to the unmutated files."""
        shutil.rmtree(self.box, ignore_errors=True)
        self.box.mkdir()
        os.chdir(self.box)
        for file in self.clean.iterdir():
            if file.is_file():
                os.link(file, file.name)

    def copy(self, name):
        """Copy a folder of unmutated files into the box."""
        shutil.copytree(self.clean / name, name)


RUN_RECORD = {
    "schema": 1, "command": "train", "created": "2026-11-23T09:18:48+00:00", "git_revision": "619b453",
    "versions": {"python": "3.11.7", "bfpo": "0.1.0"}, "steps": 20, "wall_seconds": 72.4, "cpu_seconds": 131.0,
    "hardware": {"machine": "x86_64", "processor": "x", "cores": 2, "threads": 1, "accelerators": []},
    "recipe": {"model": {"path": "runs/base"}, "data": [{"path": "pairs.jsonl", "name": "x"}],
               "loss": {"name": "bfpo", "beta": 0.05}, "trainer": {"output_dir": "o", "seed": 42,
               "learning_rate": 1e-4}},
    "data": {"train": {"main": {"ss": 6, "su": 2, "us": 4, "uu": 0}, "buffer": {"ss": 25}}},
    "trained": {"parameters": 1475200, "of": 1475200},
}  # fmt: skip
LOG = [
    {"step": step, "loss": 3.0 / step, "stream/main/loss": 2.0, "bfpo/margin/su": 0.1 * step,
     "bfpo/target_gap/su": -1.0,
     "bfpo/margin/uu": None}
    for step in range(1, 8)
]  # fmt: skip


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def must(*arguments):
    """Run a command that has to succeed."""
    outcome = run(list(arguments))
    assert outcome.kind == "accepted", outcome.text


# A command for readers that no command calls without a model or a server.
probe = typer.Typer(pretty_exceptions_enable=False)
_readers = []


@probe.command()
def read():
    _readers[-1]()


def run(case):
    """Run a command line, or a function of the library under the rules of the command line."""
    output = io.StringIO()
    kind, code = "accepted", 0
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                if callable(case):
                    _readers.append(case)
                    run_app(probe, [])
                else:
                    run_app(app, case)
            except SystemExit as ended:
                code = ended.code or 0
    except Hang:
        kind = "hang"
        output.write(traceback.format_exc())
    # Whatever passes the command line's own net is what this looks for.
    except BaseException:
        kind = "traceback"
        output.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        _readers.clear()
    text = output.getvalue()
    if kind == "accepted":
        if BUG in text:
            kind = "bug"
        elif code == 3:
            kind = "gate"
        elif code:
            is_named = "error: " in text.lower() or "usage:" in text.lower()
            kind = "refused" if is_named else "no message"
    return Outcome(kind, text)


def write(name, data):
    """Write a file of the box; a link to an unmutated one is replaced, never written through."""
    path = Path(name)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return name


def mutate_file(name, rng):
    """Mutate a file of the box: as rows, as a value, or as bytes."""
    path = Path(name)
    data = path.read_bytes()
    kind = path.name.removesuffix(".unfinished").rpartition(".")[2]
    action = rng.random()
    mutated = None
    # A file that is mutated a second time may not parse any more.
    with contextlib.suppress(ValueError, RecursionError, yaml.YAMLError):
        if kind == "jsonl" and action < 0.6:
            mutated = table_bytes(mutate_rows([json.loads(line) for line in data.splitlines()], rng), "jsonl", rng)
        elif kind == "json" and action < 0.7:
            mutated = json_bytes(mutate_value(json.loads(data), rng), rng)
        elif kind == "yaml" and action < 0.7:
            mutated = mutate_yaml(yaml.safe_load(data), rng)
    data = mutate_bytes(data, rng) if mutated is None else mutated
    write(name, data)


def train_recipe(toy, rng):
    write("r.yaml", mutate_yaml(TRAIN, rng))
    return rng.choice((["data", "prepare", "r.yaml"], ["data", "inspect", "r.yaml"]))


def data_recipe(toy, rng):
    content = {
        key: value for key, value in TRAIN.items() if key in ("data", "buffer", "eval", "holdout", "benchmarks")
    }
    write("r.yaml", mutate_yaml(content, rng))
    return ["data", "prepare", "r.yaml", "--limit", str(rng.randrange(1, 9))]


def sft_recipe(toy, rng):
    write("r.yaml", mutate_yaml(SFT, rng))

    def read_sft():
        recipe = load_recipe("r.yaml", SftRecipe)
        for source in recipe.data:
            load_demonstrations(source)

    return read_sft


def eval_recipe(toy, rng):
    write("r.yaml", mutate_yaml(toy.eval, rng))
    return ["eval", "r.yaml", *(["--dry-run"] if rng.random() < 0.7 else [])]


def redteam_recipe(toy, rng):
    write("r.yaml", mutate_yaml(REDTEAM, rng))

    def read_redteam():
        recipe = load_recipe("r.yaml", RedteamRecipe)
        for source in recipe.prompts:
            if source.name == "file":
                read_prompt_source(source)

    return read_redteam


def experiment_recipe(toy, rng):
    write("r.yaml", mutate_yaml(COMPARE, rng))
    return lambda: make_units(load_recipe("r.yaml", ExperimentRecipe))


def tuning_file(toy, rng):
    variant = COMPARE["variants"]["dpo"] | {"tuned": "dpo"}
    write("r.yaml", yaml.safe_dump(COMPARE | {"variants": {"dpo": variant}, "tuning": "t.json"}).encode())
    content = {"chosen": [{"world": "shared", "variant": "dpo", "values": {"loss.beta": 0.1}}]}
    data = json_bytes(mutate_value(content, rng), rng)
    write("t.json", data if rng.random() < 0.6 else mutate_bytes(data, rng))
    return lambda: make_units(load_recipe("r.yaml", ExperimentRecipe))


def trainer_section(toy, rng):
    from bfpo.training.arguments import training_arguments

    content = TRAIN | {"trainer": mutate_value(TRAIN["trainer"], rng)}
    write("r.yaml", yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))
    return lambda: training_arguments(load_recipe("r.yaml", TrainRecipe).trainer)


def losses(toy, rng):
    from bfpo.losses.build import make_loss

    content = rng.choice(LOSSES)
    write("r.yaml", mutate_yaml({"model": {"path": "x"}, "data": [{"path": "x"}], "loss": content}, rng))
    return lambda: make_loss(load_recipe("r.yaml", TrainRecipe).loss.model_dump())


def overrides(toy, rng):
    write("r.yaml", yaml.safe_dump(TRAIN).encode())
    keys = ("data.0.limit", "data.0.path", "data", "data.9.x", "model.path", "loss.beta", "trainer.seed", "holdout",
            "trainer", "buffer.0", "text.max_length.x", "data.٣", "data.²", "data.-1", "", "..", "a..b", "__class__",
            "data.0.columns.prompt", "eval.0.where.x")  # fmt: skip
    texts = ("1", "null", "[", "{a: 1", "nan", "&a [*a]", "!!python/object:x y", "x", "", "=", "1e-4", "'", "[1]",
             "{<<: 1}", "? [1]", "é\x1b", "2001-13-45", "- - -", "9" * 5000, "[" * 3000)  # fmt: skip
    parts = []
    for _ in range(rng.choice((1, 1, 2))):
        value = rng.choice(texts) if rng.random() < 0.6 else str(any_value(rng, surrogates=False))
        parts.append(f"{rng.choice(keys)}{rng.choice(('=', '=', '=', '==', ''))}{value}")
    return ["data", "prepare", "r.yaml", *(part for part in parts if part and not part.startswith("-"))]


def data_rows(toy, rng):
    adapter = rng.choice(sorted(ADAPTERS))
    file_format = rng.choice(FORMATS)
    name = write(f"d.{file_format}", mutate_table(ROWS[adapter], file_format, rng))
    return ["data", "inspect", f"{adapter}:{name}", *(["--examples", "0"] if rng.random() < 0.5 else [])]


def demonstration_rows(toy, rng):
    adapter = rng.choice(sorted(DEMONSTRATIONS))
    file_format = rng.choice(FORMATS)
    name = write(f"d.{file_format}", mutate_table(DEMONSTRATIONS[adapter], file_format, rng))
    return lambda: load_demonstrations(Source(path=name, adapter=adapter))


def prompt_rows(toy, rng):
    file_format = rng.choice((*FORMATS, "txt"))
    if file_format == "txt":
        name = write("p.txt", mutate_bytes(b"which one ?\n\xc3\xa9t\xc3\xa9 ?\n", rng))
    else:
        name = write(f"p.{file_format}", mutate_table(toy.prompts[:4], file_format, rng))
    if rng.random() < 0.4:
        return lambda: read_prompt_source(PromptSource(name="file", path=name, kind=rng.choice((None, "harmful"))))
    if rng.random() < 0.3:
        write("r.yaml", yaml.safe_dump({"data": TRAIN["data"], "benchmarks": [name]}).encode())
        return ["data", "prepare", "r.yaml"]
    return lambda: read_prompt_file(name)


def completion_rows(toy, rng):
    name = write(f"c.{(form := rng.choice(FORMATS))}", mutate_table(toy.completions[:5], form, rng))
    return ["judge", "run", name, "--judge", rng.choice(("oracle", "linear:judge.npz")), "--out", "o.jsonl"]


def existing_verdicts(toy, rng):
    shutil.copy("verdicts.jsonl", "v.jsonl")
    mutate_file("v.jsonl", rng)
    if rng.random() < 0.5:
        Path("v.jsonl").rename("v.jsonl.unfinished")
    return ["judge", "run", "completions.jsonl", "--judge", "oracle", "--out", "v.jsonl"]


def saved_completions(toy, rng):
    rows = toy.completions
    if rng.random() < 0.3:
        rows = [{"doc": {"prompt": row["prompt"][0]["content"]}, "filtered_resps": [row["text"]]} for row in rows]
    elif rng.random() < 0.4:
        rows = [{"instruction": row["prompt"][0]["content"], "output": row["text"]} for row in rows]
    form = rng.choice(FORMATS)
    name = write(f"c.{form}", mutate_table(rows, form, rng))
    write("r.yaml", yaml.safe_dump(toy.eval | {"completions": name, "judges": ["oracle"]}).encode())
    return ["eval", "r.yaml"]


def run_folder(toy, rng):
    toy.copy("run")
    files = sorted(path for path in Path("run").rglob("*") if path.is_file() and "alpaca" not in str(path))
    for _ in range(rng.choice((1, 1, 2))):
        mutate_file(str(rng.choice(files)), rng)
    return rng.choice((["report", "run", "--out", "rep"], ["card", "run"]))


def mutate_one_file(folder, rng):
    """Mutate a file of a folder, and now and then make it one that wasn't finished."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    mutate_file(str(path), rng)
    if path.suffix == ".jsonl" and rng.random() < 0.3:
        path.rename(f"{path}.unfinished")


def evaluated_again(toy, rng):
    toy.copy("run")
    mutate_one_file(Path("run/evaluation"), rng)
    return ["eval", "eval.yaml"]


def baseline(toy, rng):
    shutil.copytree(toy.clean / "run", "base")
    files = sorted(path for path in Path("base/evaluation").iterdir() if path.is_file())
    mutate_file(str(rng.choice(files)), rng)
    toy.copy("run")
    write("r.yaml", yaml.safe_dump(toy.eval | {"base": "base"}).encode())
    return ["eval", "r.yaml"]


def labels_again(toy, rng):
    toy.copy("labels")
    mutate_one_file(Path("labels"), rng)
    return ["label", "pairs.jsonl", "--judge", "oracle", "--judge", "oracle:shared", "--out", "labels"]


def label_rows(toy, rng):
    form = rng.choice(FORMATS)
    name = write(f"d.{form}", mutate_table(toy.pairs[:4], form, rng))
    return ["label", name, "--judge", "oracle", "--out", "l", "--conflicts", rng.choice(("error", "drop", "first"))]


def labeled_rows(toy, rng):
    rows = toy.labeled if rng.random() < 0.6 else ROWS["xstest_completions"]
    form = rng.choice(FORMATS)
    name = write(f"a.{form}", mutate_table(rows, form, rng))
    judge = rng.choice(("linear:judge.npz", "oracle", f"people:{name}"))
    if rng.random() < 0.3:
        return ["judge", "fit", name, "--out", "j.npz"]
    return ["judge", "eval", name, "--judge", judge, "--out", "e.json"]


def calibration(toy, rng):
    form = rng.choice(FORMATS)
    name = write(f"a.{form}", mutate_table(toy.labeled, form, rng))
    content = toy.eval | {"calibration": name, "judges": ["linear:judge.npz"]}
    write("r.yaml", yaml.safe_dump(content).encode())
    return ["eval", "r.yaml"]


def judge_specs(toy, rng):
    spec = rng.choice((*SPECS, *JUDGES))
    for _ in range(rng.choice((0, 1, 1, 2))):
        place = rng.randrange(len(spec) + 1)
        extra = rng.choice(
            (":", "+", "@", "é", " ", "majority:", "oracle", "+oracle", "http", ".", "/", "\x1b", "٣", "")
        )
        spec = spec[:place] + extra + spec[place + rng.randrange(2) :]
    if "@http" in spec or "rubric" in spec:
        from bfpo.judging.spec import parse_judge

        return lambda: parse_judge(spec)
    threshold = [] if rng.random() < 0.7 else ["--threshold", rng.choice(("0", "1", "2", "-1", "nan", "x"))]
    return ["judge", "run", "completions.jsonl", f"--judge={spec}", "--out", "o.jsonl", *threshold]


def judge_file(toy, rng):
    import numpy as np

    if rng.random() < 0.5:
        write("j.npz", mutate_bytes(Path("judge.npz").read_bytes(), rng))
    else:
        with np.load("judge.npz") as arrays:
            content = {name: arrays[name] for name in arrays.files}
        name = rng.choice(sorted(content))
        value = rng.choice(
            (None, 1.0, [], [1.0, float("nan")], "x", "{}", "[1]", ["a"], [[1.0]], [1j], [True], -1, 10**9)
        )
        if value is None:
            del content[name]
        elif content[name].dtype.kind in "US" and rng.random() < 0.7:
            text = str(content[name])
            with contextlib.suppress(ValueError):
                text = json.dumps(mutate_value(json.loads(text), rng))
            content[name] = np.array(text)
        else:
            content[name] = np.array(value)
        np.savez("j.npz", **content)
    return ["judge", "run", "completions.jsonl", "--judge", "linear:j.npz", "--out", "o.jsonl"]


def suite(toy, rng):
    write("s.yaml", mutate_yaml(SUITE, rng))
    write("r.yaml", yaml.safe_dump(toy.eval | {"suites": ["s.yaml"], "data": {}, "judges": ["oracle"]}).encode())
    return ["eval", "r.yaml", *(["--dry-run"] if rng.random() < 0.6 else [])]


def checkpoint_files(toy, rng):
    toy.copy("model")
    toy.copy("trained")
    folder = Path("trained/checkpoint-1")
    mark = read_mark(folder)
    mutate_file(str(rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))), rng)
    if rng.random() < 0.4:
        # Damage of before the hashes were taken.
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != MARK]
        write_mark(folder, files, {key: mark[key] for key in ("step", "threads", "run")})
    if rng.random() < 0.5:
        return ["sft", "sft.yaml", f"trainer.resume_from_checkpoint={folder}"]
    shutil.rmtree("trained/checkpoint-2")
    return ["sft", "sft.yaml", "trainer.resume_from_checkpoint=true"]


def redteam_folder(toy, rng):
    toy.copy("rt")
    path = rng.choice(sorted(path for path in Path("rt").rglob("*") if path.is_file()))
    mutate_file(str(path), rng)
    if path.suffix == ".jsonl" and rng.random() < 0.3:
        path.rename(f"{path}.unfinished")
    return ["redteam", "redteam.yaml"]


def gate(toy, rng):
    write("g.yaml", mutate_yaml(GATE, rng))
    if rng.random() < 0.6:
        return lambda: read_gate("g.yaml")
    toy.copy("run")
    return ["eval", "eval.yaml", "--gate", "g.yaml"]


def alpaca_annotations(toy, rng):
    form = rng.choice(("json", "jsonl", "jsonl.gz"))
    name = write(f"a.{form}", mutate_table(ROWS["alpaca_eval"], form, rng))
    return lambda: read_alpaca_annotations(Path(name))


def other_stacks(toy, rng):
    write("o.yaml", mutate_yaml(rng.choice(STACKS), rng))
    extra = ["--kind", rng.choice(("train", "sft"))] if rng.random() < 0.4 else []
    override = ["learning_rate=1e-5"] if rng.random() < 0.1 else []
    return ["migrate", "o.yaml", *override, "--out", "n.yaml", *extra]


def data_manifest(toy, rng):
    toy.copy("run")
    mutate_file("run/data_manifest.json", rng)
    recipe = {"out": "e", "model": {"path": "run"}}
    return lambda: training_judges(check_recipe(recipe, EvalRecipe, "r"))


def model_card(toy, rng):
    toy.copy("run")
    write("C.md", mutate_bytes(b"---\nlicense: x\n---\n# Model\n\n## Evaluation\n\ntext\n", rng))
    return ["card", "run", "--into", "C.md"]


def tokenizer_files(toy, rng):
    toy.copy("model")
    names = ("tokenizer_config.json", "chat_template.jinja", "config.json", "tokenizer.json")
    name = rng.choice([name for name in names if Path("model", name).exists()])
    if name == "chat_template.jinja" and rng.random() < 0.6:
        write(f"model/{name}", rng.choice(TEMPLATES).encode())
    else:
        mutate_file(f"model/{name}", rng)
    return ["data", "inspect", "pairs.jsonl", "--tokenizer", "model", "--examples", "0"]


TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% include '/etc/passwd' %}", "{{ 1/0 }}", "{{ 1 + 'a' }}",
    "{{ messages[99].content.x.y }}", "{{ raise_exception('\x1b]0;x\x07 hi') }}",
    "{% for a in range(10**9) %}x{% endfor %}",
    "{{ messages }}", "", "x", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ 'x' * 1000 }}",
    "{{ messages|tojson }}",
)  # fmt: skip


# Targets with their shares of all inputs. Those that load a model or evaluate take longer.
TARGETS = {
    train_recipe: 10, data_recipe: 4, sft_recipe: 5, eval_recipe: 4, redteam_recipe: 6, experiment_recipe: 6,
    tuning_file: 2, trainer_section: 4, losses: 4, overrides: 6, data_rows: 14, demonstration_rows: 5, prompt_rows: 6,
    completion_rows: 4, existing_verdicts: 3, saved_completions: 2, run_folder: 5, evaluated_again: 2, baseline: 2,
    labels_again: 2, label_rows: 3, labeled_rows: 4, calibration: 1, judge_specs: 4, judge_file: 3, suite: 4, gate: 3,
    alpaca_annotations: 3, other_stacks: 8, data_manifest: 2, model_card: 1, tokenizer_files: 1,
    redteam_folder: 3, checkpoint_files: 0.5,
}  # fmt: skip


def draw(toy, seed, number):
    """Write input `number` of a seed into the box; return its target's name and the case."""
    rng = random.Random(f"{seed}:{number}")
    target = rng.choices(list(TARGETS), weights=list(TARGETS.values()))[0]
    toy.empty_box()
    return target.__name__, target(toy, rng)


def fuzz(toy, seed, count, *, show, most_seconds=None):
    """Run inputs; return the outcomes by target, and the failures as (number, target, outcome).

    Args:
        toy: Unmutated files.
        seed: Seed of all inputs.
        count: Number of inputs.
        most_seconds: Stop after these seconds of CPU.
        show: Function that prints a failure.
    """
    counts, failures = {}, []
    start = time.process_time()
    gc.collect()
    gc.freeze()
    for number in range(count):
        target, case = draw(toy, seed, number)
        outcome = run(case)
        counts.setdefault(target, Counter())[outcome.kind] += 1
        if outcome.kind in FAILURES:
            failures.append((number, target, outcome))
            show(f"--seed {seed} --only {number}: {target} {outcome.kind}: {describe(outcome)}")
        if most_seconds is not None and time.process_time() - start > most_seconds:
            break
    return counts, failures


def describe(outcome):
    """Return the line of a failure that says most."""
    lines = outcome.text.strip().splitlines() or [""]
    return next((line for line in lines if BUG in line), lines[-1])[-400:]


def show_line(*parts):
    """Print a line at once."""
    sys.stdout.write(" ".join(map(str, parts)) + "\n")
    sys.stdout.flush()


def summary(seed, counts, failures, seconds):
    """Return the summary that is committed."""
    from importlib.metadata import version

    totals = sum(counts.values(), Counter())
    packages = ("transformers", "torch", "pydantic", "pyyaml", "pyarrow", "numpy")
    return {
        "command": "python tests/reliability/fuzz.py --count N --seed S --out benchmarks/results/fuzz.json",
        "seed": seed,
        "inputs": totals.total(),
        "outcomes": dict(totals.most_common()),
        "failures": [[number, target, outcome.kind] for number, target, outcome in failures],
        "by_target": {name: dict(counts[name].most_common()) for name in sorted(counts)},
        "cpu_seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": 1},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="Run one input, and show its files and the traceback.")
    parser.add_argument("--out", type=Path, help="File of the summary.")
    arguments = parser.parse_args()
    out = arguments.out and arguments.out.resolve()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        toy = Toy(Path(folder))
        if arguments.only is not None:
            target, case = draw(toy, arguments.seed, arguments.only)
            show_line(target, case if isinstance(case, list) else "")
            outcome = run(case)
            show_line(outcome.kind, outcome.text[-3000:])
            with contextlib.suppress(SystemExit):
                draw(toy, arguments.seed, arguments.only)
                case() if callable(case) else app(args=case)
            return
        start = time.process_time()
        counts, failures = fuzz(toy, arguments.seed, arguments.count, show=show_line)
        os.chdir("/")
    result = summary(arguments.seed, counts, failures, time.process_time() - start)
    show_line(json.dumps({key: result[key] for key in ("inputs", "outcomes", "cpu_seconds")}))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
