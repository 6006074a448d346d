"""Whole online runs on a bandit of one token: what they leave, resuming, refusals, the held-out judge."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry, send_telemetry
from transformers import AutoModelForCausalLM

from bfpo.config.loading import check_recipe
from bfpo.core.conversation import user_says
from bfpo.core.files import write_jsonl
from bfpo.core.samples import Prompt, Verdict
from bfpo.errors import DataError, MissingExtra, ModelError, RecipeError, TrainingError
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.subject import training_judges
from bfpo.losses.combine import Lagrangian
from bfpo.online.arguments import REFUSED
from bfpo.online.recipe import OnlineRecipe
from bfpo.online.run import run_online
from bfpo.online.start import check_reference
from bfpo.online.telemetry import without_telemetry

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import online_bandits as bandits

ROOT = Path(__file__).parents[2]

JUDGE = "online_bandits:BanditJudge:bandit"
TRAINER = {
    "output_dir": "out",
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 1,
    "max_steps": 4,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "save_steps": 2,
    "use_cpu": True,
}


class Partial(bandits.BanditJudge):
    """Judge that rates only some answers."""

    name = "partial"

    def judge(self, completions):
        for verdict in super().judge(completions):
            if verdict.helpfulness < 0.3:
                yield Verdict(*verdict.key, verdict.text_hash, self.name, "1", None, reason="not rated")
            else:
                yield verdict


class Constant(bandits.BanditJudge):
    """Judge that rates all answers alike."""

    def judge(self, completions):
        return [Verdict.on(each, self, safe=True, severity=0.0, helpfulness=0.5) for each in completions]


class Disappointed(bandits.BanditJudge):
    """Held-out judge that finds the first batches safe and the later ones unsafe."""

    name, batches = "disappointed", 0

    def judge(self, completions):
        type(self).batches += 1
        safe = self.batches <= 2
        return [Verdict.on(each, self, safe=safe) for each in completions]


@pytest.fixture(scope="module")
def bandit_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bandit") / "bandit"
    bandits.make_bandit(folder, seed=3)
    # A second prompt, which only the batches need.
    rows = [{"prompt_id": name, "prompt": f"a{index}", "kind": "benign"} for index, name in enumerate(("one", "two"))]
    write_jsonl(folder / "prompts.jsonl", rows)
    return folder


@pytest.fixture(autouse=True)
def folder(bandit_folder, tmp_path, monkeypatch):
    """Work in an empty folder with a link to the bandit."""
    monkeypatch.chdir(tmp_path)
    Path("bandit").symlink_to(bandit_folder)


def content(**changes):
    trainer = changes.pop("trainer", {})
    return {
        "model": {"path": "bandit"},
        "prompts": [{"name": "file", "path": "bandit/prompts.jsonl"}],
        "reward": JUDGE,
        "cost": JUDGE,
        "combine": {"cost_at_most": 0.2, "rate": 1.0},
        "trainer": TRAINER | trainer,
    } | changes


def recipe(**changes):
    return check_recipe(content(**changes), OnlineRecipe, "toy")


def multipliers(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line["online/multiplier"] for line in lines if "online/multiplier" in line]


def test_a_run_leaves_a_checkpoint_its_record_and_its_scorers(capsys):
    run = run_online(recipe())
    assert json.loads(Path("out/run.json").read_text()) == json.loads(json.dumps(run))
    assert (run["steps"], run["samples"], run["scorer_calls"], run["missing"]) == (4, 64, 64, {})
    assert run["scorers"] == {"reward": "bandit@1", "cost": "bandit@1"}
    assert run["start_check"]["samples"] == 16
    assert run["versions"]["trl"].startswith("1.")
    assert AutoModelForCausalLM.from_pretrained("out").config.vocab_size == len(bandits.ANSWERS)
    card = Path("out/README.md").read_text()
    assert "Trained by RL on scores of its own samples" in card
    assert "reward by `bandit@1`, cost by `bandit@1`; 64 samples" in card
    # An evaluation of the model finds its scorers.
    assert training_judges(EvalRecipe(out="e", model={"path": "out"})) == {"bandit"}
    state = json.loads(Path("out/checkpoint-4/multiplier.json").read_text())
    assert state["samples"] == 64
    assert state["combiner"] == run["combiner"]
    assert len(set(multipliers("out"))) == 4
    output = capsys.readouterr().out
    assert "TRL's telemetry is off for this run" in output
    assert "4 steps of 2 prompts with 8 samples: 64 samples of up to 1 tokens, 64 verdicts" in output
    assert "KL 0.00 nats  1 tokens" in output
    assert output.count("λ ") == 4
    assert "samples" in output


def test_a_resumed_run_goes_on_with_the_same_lambda_and_samples():
    run_online(recipe())
    whole = multipliers("out")
    Path("out").rename("whole")
    Path("out").mkdir()
    (Path("whole") / "checkpoint-2").rename("out/checkpoint-2")
    Path("out/metrics.jsonl").write_text((Path("whole") / "metrics.jsonl").read_text())
    run = run_online(recipe(trainer={"resume_from_checkpoint": True}))
    assert multipliers("out") == whole
    assert run["samples"] == 64
    with pytest.raises(RecipeError, match=r"beta was 0\.05, now it is 0\.1"):
        run_online(recipe(trainer={"resume_from_checkpoint": "out/checkpoint-2", "beta": 0.1}))
    Path("out/checkpoint-4/multiplier.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"checkpoint-4 can't be resumed from: multiplier\.json has 2 bytes"):
        run_online(recipe(trainer={"resume_from_checkpoint": "out/checkpoint-4"}))


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_lambda(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'benchmarks'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    steps = {"max_steps": 20, "save_steps": 4, "save_total_limit": 2}
    for name in ("whole", "killed"):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content(trainer={**steps, "output_dir": name})))
    command = [sys.executable, "-m", "bfpo", "online"]
    subprocess.run([*command, "whole.yaml"], check=True, capture_output=True)
    with subprocess.Popen([*command, "killed.yaml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not Path("killed/checkpoint-8/complete.json").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not Path("killed/run.json").exists()
    resumed = [*command, "killed.yaml", "trainer.resume_from_checkpoint=true"]
    assert (
        "resuming from killed/checkpoint-"
        in subprocess.run(resumed, check=True, capture_output=True, text=True).stdout
    )
    assert len(multipliers("whole")) == 20
    assert multipliers("killed") == multipliers("whole")


def test_missing_scores_are_left_out_and_counted(capsys):
    spec = f"{__name__}:Partial:bandit"
    run = run_online(recipe(reward=spec, max_missing=0.9, trainer={"max_steps": 1, "save_strategy": "no"}))
    (reason, count), *_ = run["missing"].items()
    assert reason == "no reward: not rated"
    assert 0 < count < 16
    output = capsys.readouterr()
    assert f"{count} of 16 samples were left out: no reward: not rated" in output.out
    # TRL's warning would have the texts.
    assert "returned None" not in output.err
    with pytest.raises(TrainingError, match=r"start check: \d+% of 16 samples .* more than max_missing 0\.01"):
        run_online(recipe(reward=spec, max_missing=0.01))


def test_nothing_to_learn_is_an_error():
    with pytest.raises(TrainingError, match="the samples of each prompt have equal values"):
        run_online(recipe(reward=f"{__name__}:Constant:bandit", cost=f"{__name__}:Constant:bandit"))


def test_reward_hacking_ends_the_run(capsys):
    Disappointed.batches = 0
    watch = {"judge": f"{__name__}:Disappointed:bandit", "every": 1, "window": 2}
    trainer = {"max_steps": 30, "learning_rate": 0.1, "per_device_train_batch_size": 48, "num_generations": 8}
    # Prompts are the unit of what is compared.
    rows = [{"prompt_id": name, "prompt": name, "kind": "benign"} for name in bandits.ANSWERS]
    write_jsonl(Path("many.jsonl"), rows)
    prompts = [{"name": "file", "path": "many.jsonl", "license": "MIT"}]
    # Costs don't rise here: the multiplier is at its largest.
    run = run_online(recipe(prompts=prompts, watch=watch, combine={"rate": 0.0, "start": 0.5}, trainer=trainer))
    assert run["steps"] < 30
    assert run["stopped_early"].startswith("reward hacking: from steps 1-2 to steps")
    assert "Training stopped early: reward hacking" in Path("out/README.md").read_text()
    assert "warning: stopped at step" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_an_adapter_is_trained_and_saved_alone(start):
    short = {"max_steps": 2, "save_strategy": "no"}
    run = run_online(recipe(lora={"r": 2, "alpha": 4}, trainer=short))
    assert 0 < run["trained"]["parameters"] < run["trained"]["of"]
    if start == "adapter":
        Path("out").rename("first")
        run = run_online(recipe(model={"path": "first"}, trainer=short))
        assert run["start_check"]["reward"] > 0
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in Path("out").iterdir()}
    assert not list(Path("out").rglob("ref*"))
    assert not Path("out/model.safetensors").exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(capsys):
    assert run_online(recipe(), dry_run=True) == {}
    output = capsys.readouterr().out
    assert "4 steps of 2 prompts" in output
    assert "dry run: nothing was sampled or trained" in output
    assert not Path("out").exists()


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("hub_token", "fsdp_config")])
def test_arguments_that_would_change_the_objective_are_refused(name):
    with pytest.raises(RecipeError, match=rf"trainer\.{name} can't be set: "):
        run_online(recipe(trainer={name: None}), dry_run=True)


def test_the_reference_is_loaded_as_the_start_model_is():
    from bfpo.online.plan import check_online

    for changes, loading in (
        ({}, None),
        ({"model": {"path": "bandit", "trust_remote_code": True}}, {"trust_remote_code": True}),
        (
            {"model": {"path": "org/bandit", "trust_remote_code": True, "revision": "a1"}},
            {"trust_remote_code": True, "revision": "a1"},
        ),
        # With an adapter it is the policy without it.
        ({"model": {"path": "bandit", "trust_remote_code": True}, "lora": {"r": 2}}, None),
    ):
        _, args, _ = check_online(recipe(**changes))
        assert args.model_init_kwargs == loading


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"beta": 0.0}, r"trainer\.beta is 0\.0; expected a number above 0, the weight of the KL penalty"),
        ({"temperature": 0.0}, r"trainer\.temperature is 0\.0; expected a number above 0"),
        ({"num_generation": 2}, r"not one of trl\.RLOOConfig; did you mean 'num_generations'"),
        ({"num_generations": 7}, r"trainer: generation_batch_size \(16\) must be divisible by num_generations"),
        ({"per_device_train_batch_size": 32}, r"prompts: 2, and a step has 4 \(32 samples"),
        ({"max_completion_length": 2048}, r"prompts: 'file-\w+' has 1 tokens; .* has room for 0"),
    ],
)
def test_impossible_arguments_are_refused(trainer, message):
    with pytest.raises((RecipeError, DataError), match=message):
        run_online(recipe(trainer=trainer), dry_run=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"new": {}}}, "a new model can't answer prompts; fine-tune it first"),
        ({"model": {"path": "m.gguf"}}, "which TRL can't do from a GGUF file; set lora, or convert"),
        ({"model": {"path": "m", "load_in_4bit": True}}, "load_in_4bit needs lora"),
        ({"reward": "beaver-cost:m"}, "reward: 'beaver-cost:m' doesn't rate helpfulness; expected one of"),
        ({"cost": "reward:m"}, "cost: 'reward:m' doesn't judge safety"),
        ({"watch": {"judge": JUDGE}}, "the reward too; expected a judge that isn't trained on"),
    ],
)
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)


def test_prompts_that_cannot_be_sampled_are_refused(monkeypatch):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [{"role": "user", "content": "a0"}, call, {"role": "tool", "content": "1"}]
    write_jsonl(Path("tools.jsonl"), [{"prompt": turns, "kind": "benign"}])
    with pytest.raises(DataError, match="has tools, reasoning or chat_template_kwargs"):
        run_online(recipe(prompts=[{"name": "file", "path": "tools.jsonl"}]), dry_run=True)
    same = [Prompt("same", user_says(f"a{index}")) for index in range(2)]
    monkeypatch.setattr("bfpo.online.prompts.read_prompt_source", lambda source: (same, {}))
    with pytest.raises(DataError, match="two prompts have the id 'same'"):
        run_online(recipe(), dry_run=True)


def test_a_reference_other_than_the_start_model_is_an_error(tmp_path):
    policy = AutoModelForCausalLM.from_pretrained("bandit")
    check_reference(policy, AutoModelForCausalLM.from_pretrained("bandit"))
    check_reference(policy, None)
    bandits.make_bandit(tmp_path / "other", seed=4)
    with pytest.raises(ModelError, match=r"the reference that TRL loaded differs from the start model in model\."):
        check_reference(policy, AutoModelForCausalLM.from_pretrained("other"))


def test_telemetry_is_off_unless_the_user_chose_otherwise(monkeypatch, capsys):
    from trl.trainer import base_trainer

    # The function that every trainer of TRL calls is the one that is switched off.
    assert base_trainer.send_telemetry is send_telemetry
    sent = []
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: None)
    monkeypatch.setattr(_telemetry, "_TELEMETRY_QUEUE", type("Queue", (), {"put": staticmethod(sent.append)}))
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    with without_telemetry():
        send_telemetry("trl/RLOOTrainer")
    assert sent == []
    assert constants.HF_HUB_DISABLE_TELEMETRY is False
    assert "HF_HUB_DISABLE_TELEMETRY=0" in capsys.readouterr().out
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    with without_telemetry():
        send_telemetry("trl/RLOOTrainer")
    assert len(sent) == 1
    assert capsys.readouterr().out == ""


def test_without_trl_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("bfpo.online.run.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"bfpo online needs trl; pip install 'bfpo\[online\]'"):
        run_online(recipe())


@dataclass(frozen=True)
class Reporting(Lagrangian):
    """Combiner that writes the costs that each process reads, and the multiplier that it goes on with."""

    def after(self, reward, cost):
        """Return the combiner of the next step."""
        following = super().after(reward, cost)
        row = {"costs": np.sort(cost, axis=None).tolist(), "multiplier": following.multiplier}
        with Path(f"process-{os.environ['RANK']}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return following


@pytest.mark.slow
def test_two_processes_read_all_scores_and_have_one_lambda(monkeypatch):
    paths = (ROOT / "benchmarks", Path(__file__).parent, os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    changes = {"combine": {"name": f"{Path(__file__).stem}:Reporting", "cost_at_most": 0.2, "rate": 1.0}}
    trainer = {"per_device_train_batch_size": 8, "save_strategy": "no"}
    Path("two.yaml").write_text(yaml.safe_dump(content(trainer=trainer, **changes)))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [sys.executable, "-W", "ignore", *launch, "-m", "bfpo", "online", "two.yaml"]
    subprocess.run(command, check=True, capture_output=True)
    run = json.loads(Path("out/run.json").read_text())
    assert (run["steps"], run["samples"], run["scorer_calls"]) == (4, 64, 64)
    reports = [Path(f"process-{rank}.jsonl").read_text() for rank in (0, 1)]
    assert reports[0] == reports[1]
    rows = [json.loads(line) for line in reports[0].splitlines()]
    multiplier = 1.0
    for row in rows:
        # Two prompts with eight samples each, of both processes.
        assert len(row["costs"]) == 16
        multiplier *= math.exp(np.mean(row["costs"]) - 0.2)
        assert row["multiplier"] == pytest.approx(multiplier, rel=1e-12)
    # TRL gathers metrics in float32.
    assert multipliers("out")[1:] == pytest.approx([row["multiplier"] for row in rows[:3]], rel=1e-6)


def test_a_judge_without_a_number_needs_the_measure_unsafe():
    judges = {"reward": "reward:org/reward", "cost": "rubric:judge"}
    with pytest.raises(RecipeError, match="cost: 'rubric:judge' says safe or unsafe without a number"):
        recipe(**judges)
    recipe(**judges, combine={"measure": "unsafe"})


def test_a_multiplier_of_zero_is_allowed_if_it_stays():
    slack = {"start": 0.0, "min": 0.0, "max": 0.0, "rate": 0.0}
    assert recipe(combine=slack).combine.start == 0
    with pytest.raises(RecipeError, match="min is 0, from which λ can't grow again"):
        recipe(combine={**slack, "rate": 0.1})
