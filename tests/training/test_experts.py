"""`bfpo sft` on the steps of a chain: what is imitated, and an adapter for each step by one recipe."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import TrainingArguments

from bfpo.config.loading import check_recipe, load_recipe
from bfpo.config.recipes import LoraSection, ModelSection, SftRecipe, Source, TrainRecipe
from bfpo.core.chain import INSTRUCTIONS_HASH, STEPS, GuidedAnswer
from bfpo.core.conversation import Message, user_says
from bfpo.core.files import write_jsonl
from bfpo.data.demonstrations import load_demonstrations
from bfpo.errors import DataError, ModelError, RecipeError
from bfpo.generation.open import EngineSection, StepsFile
from bfpo.model.load import add_shared, load_model
from bfpo.model.lora import add_adapter, lora_config
from bfpo.model.shared_adapter import find_shared
from bfpo.training.encode import encode_demonstrations
from bfpo.training.run_experts import expert_recipe, run_experts
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


def save_shared(make_model, base="base"):
    """Save an adapter in the folder `shared`."""
    model = make_model(shape="nano")
    model.name_or_path = base
    add_adapter(model, lora_config(LoraSection(r=2)), seed=7).save_pretrained("shared")


def make_trainer(step, rows, make_model, tokenizer, *, shared=False):
    """Return a trainer of an adapter that changes the model, and the demonstrations of a step that it trains on."""
    write_jsonl(Path("some.jsonl"), (row.to_row() for row in rows))
    _, demonstrations = load(f"guided_{step}", "some.jsonl")
    table = encode_demonstrations(demonstrations, tokenizer, None)
    model = add_adapter(make_model(shape="nano").double(), lora_config(LoraSection(r=2)), seed=42)
    if shared:
        save_shared(make_model)
        add_shared(model, find_shared("shared"))
    args = TrainingArguments("runs", per_device_train_batch_size=2, use_cpu=True, report_to="none")
    trainer = SFTTrainer(model, args, table, processing_class=tokenizer)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(1)
            weight.data.normal_()
    return trainer, demonstrations


@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_of_an_adapter_is_that_of_its_own_step_s_tokens(rows, make_model, tokenizer, shared):
    """Against the plain logits: the negative log-probabilities of the reply's tokens and of the end of its turn."""
    for step in ("guidance", "check"):
        trainer, demonstrations = make_trainer(step, rows[:2], make_model, tokenizer, shared=shared)
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
        assert all("lora_" in name and ".default." in name for name in got)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                torch.testing.assert_close(got[name], weight.grad, rtol=1e-6, atol=1e-9)
                assert float(weight.grad.abs().max()) > 0


@pytest.mark.slow
def test_a_shared_adapter_stays_as_it_is_while_another_is_trained_and_saved(rows, make_model, tokenizer):
    trainer, _ = make_trainer("answer", rows, make_model, tokenizer, shared=True)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.args.max_steps = 2
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ".default." in name}
    assert any(".shared." in name for name in before)
    assert trainer.model.base_model.active_adapters == ["default", "shared"]
    trainer.save_model("own")
    assert not [path for path in Path("own").iterdir() if path.is_dir()]
    own = {name.replace(".default.", "."): weight for name, weight in trainer.model.named_parameters()}
    saved = load_file("own/adapter_model.safetensors")
    assert len(saved) == len(changed)
    assert all(torch.equal(weight, own[name]) for name, weight in saved.items())
    record = json.loads(Path("own/shared_adapter.json").read_text())
    assert record == {"path": "shared", "sha256": find_shared("shared").sha256}


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


ALL = ["analysis", "shared", "guidance", "answer"]


@pytest.mark.slow
def test_experts_beside_a_shared_one_are_ordinary_runs_and_finished_ones_stay(rows, monkeypatch, capsys):
    trained = []

    def interrupted(expert, **options):
        if expert.trainer["output_dir"].endswith("answer"):
            raise KeyboardInterrupt
        trained.append(Path(expert.trainer["output_dir"]).name)
        return run_sft(expert, **options)

    resuming = recipe(experts=ALL, trainer=recipe().trainer | {"resume_from_checkpoint": True})
    with monkeypatch.context() as patch:
        patch.setattr("bfpo.training.run_experts.run_sft", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_experts(recipe(experts=ALL))
        assert trained == ["shared", "analysis", "guidance"]
    folders = [f"runs/steps/{name}" for name in ("shared", "analysis", "guidance", "answer")]
    before = [Path(folder, "run.json").read_bytes() for folder in folders[:3]]
    capsys.readouterr()
    run_experts(resuming)
    output = capsys.readouterr().out
    assert [f"{folder} is finished; it stays" in output for folder in folders] == [True, True, True, False]
    assert [Path(folder, "run.json").read_bytes() for folder in folders[:3]] == before
    steps = load_recipe(Path("runs/steps/steps.yaml"), StepsFile).steps
    assert list(steps.items()) == [(Path(folder).name, folder) for folder in folders]
    # Each by hand, the last one also from a checkpoint; a killed run would resume from it.
    sources = [{"adapter": f"guided_{step}", "path": "guided.jsonl"} for step in ("analysis", "guidance", "answer")]
    options = recipe().trainer | {"save_strategy": "steps", "save_steps": 1}
    run_sft(recipe(experts=[], data=sources, trainer=options | {"output_dir": "runs/s"}))
    answer = {"experts": [], "data": sources[2:], "shared_adapter": "runs/steps/shared"}
    run_sft(recipe(**answer, trainer=options | {"output_dir": "runs/a"}))
    shutil.rmtree("runs/a/checkpoint-2")
    resumed = options | {"output_dir": "runs/a", "resume_from_checkpoint": True}
    run_sft(recipe(**answer, trainer=resumed))
    assert "resuming from runs/a/checkpoint-1" in capsys.readouterr().out
    for folder, other in (("runs/s", "runs/steps/shared"), ("runs/a", "runs/steps/answer")):
        first, second = (load_file(f"{path}/adapter_model.safetensors") for path in (folder, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ModelError, match="was trained beside the shared adapter 'runs/steps/shared'"):
        load_model(ModelSection(path="runs/a/checkpoint-1"))
    # Another shared adapter in its place: neither finished nor to be resumed.
    shutil.copy("runs/s/checkpoint-1/adapter_model.safetensors", "runs/steps/shared/adapter_model.safetensors")
    with pytest.raises(RecipeError, match="start model"):
        run_sft(recipe(**answer, trainer=resumed))
    run_experts(resuming)
    assert json.loads(Path(folders[3], "shared_adapter.json").read_text())["sha256"] == find_shared(folders[0]).sha256
    assert "runs/steps/answer is finished" not in capsys.readouterr().out


def test_the_recipe_of_each_expert_says_what_is_trained_beside_what(rows):
    shared, answer = (expert_recipe(recipe(experts=ALL), name) for name in ("shared", "answer"))
    assert [source.adapter for source in shared.data] == ["guided_analysis", "guided_guidance", "guided_answer"]
    assert (shared.shared_adapter, shared.trainer["output_dir"]) == (None, "runs/steps/shared")
    assert [source.adapter for source in answer.data] == ["guided_answer"]
    assert answer.shared_adapter == "runs/steps/shared"
    assert expert_recipe(recipe(shared_adapter="s"), "answer").shared_adapter == "s"


def test_wrong_shared_adapters_are_refused(rows, make_model):
    for changes, message in (
        ({"experts": ["shared", "answer"]}, "active in every step; add analysis, guidance"),
        ({"experts": ALL, "shared_adapter": "s"}, "leave out shared_adapter"),
        ({"experts": ALL, "lora": None}, "experts has shared, a new adapter; set lora"),
        ({"experts": [], "lora": None, "shared_adapter": "s"}, "active beside a new adapter; set lora"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe(**changes)
    with pytest.raises(ModelError, match=r"'base', the shared adapter, has no adapter_config\.json"):
        run_sft(recipe(experts=[], shared_adapter="base"))
    shutil.copytree("base", "another")
    save_shared(make_model, "another")
    with pytest.raises(ModelError, match=r"was trained on 'another' .* expected the same .* 'base'"):
        run_sft(recipe(experts=[], shared_adapter="shared"))
    sft = recipe(experts=[], shared_adapter="s").model_dump()
    with pytest.raises((ValidationError, RecipeError), match="can't be used alone"):
        check_recipe({"data": [{"path": "p"}], "model": {"sft": sft}}, TrainRecipe, "train")


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
