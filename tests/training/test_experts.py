"""`bfpo sft` on the steps of a chain: what is imitated, and an adapter for each step by one recipe."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import TrainingArguments

from bfpo.config.loading import check_recipe, load_recipe
from bfpo.config.recipes import LoraSection, SftRecipe, Source, TrainRecipe
from bfpo.core.chain import INSTRUCTIONS_HASH, STEPS, GuidedAnswer
from bfpo.core.conversation import Message, user_says
from bfpo.core.files import write_jsonl
from bfpo.data.demonstrations import load_demonstrations
from bfpo.errors import DataError, RecipeError
from bfpo.generation.open import EngineSection, StepsFile
from bfpo.model.lora import lora_config
from bfpo.training.encode import encode_demonstrations
from bfpo.training.run_experts import run_experts
from bfpo.training.run_sft import run_sft
from bfpo.training.sft import SFTTrainer

WORDS = ("red box", "green ball", "blue door", "round lamp", "small thing", "large place")


def guided(number, **changes):
    """Return a chain whose replies differ, kept unless `changes` says otherwise."""
    replies = [Message("assistant", f"{word} {number}") for word in WORDS[:3]]
    row = GuidedAnswer(
        f"p{number}", user_says(f"near which {number}"), *replies, Message("assistant", "yes"), True, "j@1", True,
        INSTRUCTIONS_HASH,
    )  # fmt: skip
    return replace(row, **changes)


@pytest.fixture
def rows(tmp_path, monkeypatch, make_model, tokenizer):
    """Work in a folder with a base model and `guided.jsonl`; returns its rows."""
    monkeypatch.chdir(tmp_path)
    rows = [guided(number) for number in range(6)]
    write_jsonl(Path("guided.jsonl"), (row.to_row() for row in rows))
    make_model(shape="nano").save_pretrained("base")
    tokenizer.save_pretrained("base")
    return rows


def load(adapter, path="guided.jsonl"):
    return load_demonstrations(Source(adapter=adapter, path=path))


def test_rows_read_back_as_they_were_written(rows):
    thought = Message("assistant", "a box", "A thought.")
    rows = [*rows, guided(9, answer=thought, check=None, safe=None, kept=False, cut=("analysis",))]
    write_jsonl(Path("more.jsonl"), (row.to_row() for row in rows))
    lines = [json.loads(line) for line in Path("more.jsonl").read_text().splitlines()]
    assert [GuidedAnswer.from_row(line) for line in lines] == rows
    assert lines[0]["analysis"] == "red box 0"
    assert "cut" not in lines[0]
    for column, value, message in (
        ("answer", [{"role": "user", "content": "a"}], "a step has the turns user; expected assistant"),
        ("kept", "true", "column 'kept' is 'true'; expected true or false"),
        ("cut", ["thought"], "column 'cut'"),
    ):
        with pytest.raises(DataError, match=message):
            GuidedAnswer.from_row(lines[0] | {column: value})


def test_each_adapter_reads_the_reply_to_its_step_and_the_others_are_context(rows):
    for step in STEPS:
        _, demonstrations = load(f"guided_{step}")
        assert [demonstration.completion for demonstration in demonstrations] == [
            row.reply(step).content for row in rows
        ]
        assert [demonstration.prompt for demonstration in demonstrations] == [row.step_prompt(step) for row in rows]
    prompt = rows[0].step_prompt("check")
    assert [message.content for message in prompt if message.role == "assistant"] == [f"{w} 0" for w in WORDS[:3]]
    _, distilled = load("guided")
    assert [(row.prompt, row.answer.content) for row in rows] == [
        (demonstration.prompt, demonstration.completion) for demonstration in distilled
    ]


def test_what_is_not_imitated_is_counted(rows):
    no, unread = Message("assistant", "no"), Message("assistant", "well")
    others = [
        guided(10, safe=False, kept=False),
        guided(11, safe=False, kept=False, check=no),
        guided(12, check=no),
        guided(13, check=unread),
        guided(14, check=None, cut=("analysis", "answer")),
    ]
    write_jsonl(Path("more.jsonl"), (row.to_row() for row in [*rows, *others]))
    read = {adapter: load(adapter, "more.jsonl") for adapter in ("guided", *(f"guided_{step}" for step in STEPS))}
    counts = {adapter: (len(taken), dict(report.skipped)) for adapter, (report, taken) in read.items()}
    assert counts == {
        "guided": (8, {"answer not kept": 2, "answer cut": 1}),
        "guided_analysis": (8, {"answer not kept": 2, "analysis cut": 1}),
        "guided_guidance": (9, {"answer not kept": 2}),
        "guided_answer": (8, {"answer not kept": 2, "answer cut": 1}),
        # Read where it agrees with the judge, also of an unsafe answer.
        "guided_check": (7, {"check that doesn't agree with the judge": 4}),
    }
    assert not any(report.faulty for report, _ in read.values())
    write_jsonl(Path("old.jsonl"), [guided(1, instructions="old").to_row()])
    with pytest.raises(DataError, match=r"old\.jsonl row 1: the instructions of the chain have changed"):
        load("guided_answer", "old.jsonl")
    assert len(load("guided", "old.jsonl")[1]) == 1


def make_trainer(step, rows, make_model, tokenizer):
    """Return a trainer of an adapter that changes the model, and the demonstrations of a step that it trains on."""
    write_jsonl(Path("some.jsonl"), (row.to_row() for row in rows))
    _, demonstrations = load(f"guided_{step}", "some.jsonl")
    table = encode_demonstrations(demonstrations, tokenizer, None)
    model = make_model(shape="nano").double()
    args = TrainingArguments("runs", per_device_train_batch_size=2, use_cpu=True, report_to="none")
    trainer = SFTTrainer(model, args, table, processing_class=tokenizer, peft_config=lora_config(LoraSection(r=2)))
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(1)
            weight.data.normal_()
    return trainer, demonstrations


def test_the_gradient_of_an_adapter_is_that_of_its_own_step_s_tokens(rows, make_model, tokenizer):
    """Against the plain logits: the negative log-probabilities of the reply's tokens and of the end of its turn."""
    for step in ("guidance", "check"):
        trainer, demonstrations = make_trainer(step, rows[:2], make_model, tokenizer)
        model = trainer.model
        batch = next(iter(trainer.get_train_dataloader()))
        for pack in batch["packs"]:
            trainer.compute_loss(model, {"pack": pack}).backward()
        got = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        model.zero_grad()
        total, count = 0.0, 0
        for demonstration in demonstrations:
            turns = [message.to_row() for message in demonstration.prompt]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            full = prompt + demonstration.completion + tokenizer.eos_token
            before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, full))
            logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scored = range(len(before), len(ids))
            total = total - sum(logps[index - 1, ids[index]] for index in scored)
            count += len(scored)
        (total / count).backward()
        assert all("lora_" in name for name in got)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                torch.testing.assert_close(got[name], weight.grad, rtol=1e-6, atol=1e-9)
                assert float(weight.grad.abs().max()) > 0


def recipe(**changes):
    content = {
        "model": {"path": "base"},
        "data": [{"adapter": "guided", "path": "guided.jsonl"}],
        "lora": {"r": 2},
        "experts": ["analysis", "answer"],
        "trainer": {
            "output_dir": "runs/steps",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "use_cpu": True,
        },
    }
    return check_recipe(content | changes, SftRecipe, "sft")


@pytest.mark.slow
def test_an_expert_is_plain_lora_on_its_step(rows, capsys):
    run_experts(recipe())
    steps = load_recipe(Path("runs/steps/steps.yaml"), StepsFile).steps
    assert steps == {"analysis": "runs/steps/analysis", "guidance": None, "answer": "runs/steps/answer"}
    EngineSection(path="base", steps=steps)
    weights = {}
    for step in ("analysis", "answer"):
        data = [{"adapter": f"guided_{step}", "path": "guided.jsonl"}]
        trainer = recipe().trainer | {"output_dir": f"runs/plain-{step}"}
        run_sft(recipe(experts=[], data=data, trainer=trainer))
        plain, expert = (
            load_file(f"runs/{name}/adapter_model.safetensors") for name in (f"plain-{step}", f"steps/{step}")
        )
        assert plain.keys() == expert.keys()
        assert all(torch.equal(plain[name], expert[name]) for name in plain)
        weights[step] = expert
    assert any(not torch.equal(weights["analysis"][name], weights["answer"][name]) for name in weights["answer"])
    # A second start that resumes leaves finished experts alone, and trains the missing one.
    before = Path("runs/steps/answer/run.json").read_bytes()
    capsys.readouterr()
    run_experts(recipe(experts=["answer", "guidance"], trainer=recipe().trainer | {"resume_from_checkpoint": True}))
    assert "runs/steps/answer is finished; it stays" in capsys.readouterr().out
    assert Path("runs/steps/answer/run.json").read_bytes() == before
    assert Path("runs/steps/guidance/run.json").exists()
    # An adapter is what each expert can start from, too.
    shared = recipe(model={"path": "runs/plain-answer"}, lora=None, experts=["answer"])
    run_experts(shared, dry_run=True)


def test_wrong_experts_are_refused(rows):
    for changes, message in (
        (
            {"data": [{"adapter": "demonstrations", "path": "d"}]},
            "steps of adapter 'guided'; data has 'demonstrations'",
        ),
        ({"experts": ["answer", "answer"]}, "experts has a step twice: answer, answer"),
        ({"lora": None, "train_only": ["down_proj"]}, "set lora instead"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe(**changes)
    with pytest.raises(RecipeError, match="experts are adapters: set lora"):
        run_experts(recipe(lora=None))
    with pytest.raises(RecipeError, match=r"trainer\.output_dir is missing"):
        run_experts(recipe(trainer={}))
    nested = {"data": [{"path": "p"}], "model": {"sft": recipe().model_dump()}}
    with pytest.raises((ValidationError, RecipeError), match="starts from one model"):
        check_recipe(nested, TrainRecipe, "train")
