"""Answers by a chain of steps with an adapter for each: to the bit those of plain LoRA, the base, a chain by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bfpo.commands.app import app
from bfpo.config.recipes import LoraSection, ModelSection
from bfpo.core.chain import INSTRUCTIONS, step_prompt
from bfpo.core.conversation import Message, user_says
from bfpo.core.guarding import REFUSAL
from bfpo.core.samples import Prompt, Sampling
from bfpo.data.stages import read_completions
from bfpo.errors import ModelError, Unanswered
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.subject import model_name
from bfpo.generation.in_process import TransformersEngine, load_engine
from bfpo.generation.open import EngineSection, open_engine
from bfpo.generation.steps import StepsEngine
from bfpo.model.load import load_model
from bfpo.model.lora import add_adapter, lora_config
from bfpo.model.shared_adapter import find_shared
from bfpo.redteam.recipe import RedteamRecipe

PROMPTS = [Prompt(f"p{i}", user_says(f"small red box near {i}")) for i in range(3)]
REQUESTS = [(prompt, sample) for prompt in PROMPTS for sample in range(2)]
SAMPLING = Sampling(max_new_tokens=6, temperature=1.0)
STEPS = ("analysis", "guidance", "answer")


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_model, tokenizer):
    """A base model, and adapters `analysis`, `guidance`, `answer`, `zero`, and `X-beside-Y`, in folders."""
    folder = tmp_path_factory.mktemp("models")
    make_model(shape="nano").save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for seed, name in enumerate((*STEPS, "zero")):
        base = make_model(shape="nano")
        base.name_or_path = str(folder / "base")
        adapted = add_adapter(base, lora_config(LoraSection(r=2)), seed=seed)
        if name != "zero":
            torch.manual_seed(seed)
            for parameter_name, weight in adapted.named_parameters():
                if "lora_B" in parameter_name:
                    weight.data.normal_(std=0.3)
        adapted.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, shared in (("answer", "analysis"), ("answer", "zero"), ("guidance", "analysis")):
        beside = shutil.copytree(folder / name, folder / f"{name}-beside-{shared}")
        find_shared(str(folder / shared)).write_record(beside)
    return folder


def open_steps(models, **steps):
    paths = {step: None if name is None else str(models / name) for step, name in steps.items()}
    return open_engine(EngineSection(path=str(models / "base"), steps=paths), SAMPLING)


def texts(engine, requests=REQUESTS):
    completions = [completion for batch in engine.generate(requests) for completion in batch]
    return {
        completion.key: (completion.prompt, completion.text, completion.finish_reason, completion.completion_tokens)
        for completion in completions
    }


def test_one_expert_is_plain_lora_and_none_is_the_base(models):
    base, lora = (texts(load_engine(str(models / name), SAMPLING)) for name in ("base", "answer"))
    assert base != lora
    assert texts(open_steps(models, answer="answer")) == lora
    assert texts(open_steps(models, answer=None)) == base
    assert texts(open_steps(models, answer="zero")) == base


def merged_logits(models, names, ids):
    """Return the logits of the base with the updates of adapters added to its weights, alpha / r being 16."""
    base = AutoModelForCausalLM.from_pretrained(models / "base").double()
    for name in names:
        weights = load_file(models / name / "adapter_model.safetensors")
        for key in [key for key in weights if "lora_A" in key]:
            a, b = weights[key].double(), weights[key.replace("lora_A", "lora_B")].double()
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            base.get_submodule(module).weight.data += 16 * b @ a
    with torch.no_grad():
        return base(input_ids=ids).logits


def test_a_shared_adapter_is_added_to_that_of_a_step(models):
    ids = torch.arange(1, 20)[None]
    engine = open_steps(models, shared="analysis", analysis=None, guidance=None, answer="answer-beside-analysis")
    model = engine._engine.model.double()
    for step, names in (("analysis", ["analysis"]), ("answer", ["analysis", "answer"]), ("guidance", ["analysis"])):
        with engine._adapter_of(step), torch.no_grad():
            got = model(input_ids=ids).logits
        torch.testing.assert_close(got, merged_logits(models, names, ids), rtol=0, atol=1e-10)
    assert float((merged_logits(models, ["answer"], ids) - got).abs().max()) > 1e-3


def test_a_shared_adapter_alone_is_plain_lora_and_one_of_zeros_is_none(models):
    alone, lora = (texts(load_engine(str(models / name), SAMPLING)) for name in ("analysis", "answer"))
    assert texts(open_steps(models, shared="analysis", answer=None)) == alone
    assert texts(open_steps(models, shared="zero", answer="answer-beside-zero")) == lora
    assert texts(open_steps(models, shared="analysis", answer="answer-beside-analysis")) not in (alone, lora)
    zero, plain = (
        open_steps(models, **steps)
        for steps in ({"shared": "zero", "answer": "answer-beside-zero"}, {"answer": "answer"})
    )
    logits = []
    for engine in (zero, plain):
        with engine._adapter_of("answer"), torch.no_grad():
            logits.append(engine._engine.model(input_ids=torch.arange(1, 20)[None]).logits)
    assert torch.equal(*logits)


def test_an_adapter_is_used_beside_the_shared_one_that_it_was_trained_beside(models):
    beside = "answer-beside-analysis"
    for steps, message in (
        ({"answer": beside}, r"beside the shared adapter '.*analysis', and it is used without; name both as steps"),
        ({"shared": "zero", "answer": beside}, r"and shared is '.*zero', which has other weights; name both"),
        (
            {"shared": "analysis", "answer": "answer"},
            r"wasn't trained beside a shared adapter, and shared is '.*'; leave",
        ),
        ({"shared": beside, "answer": None}, r"was trained beside the shared adapter '.*analysis'"),
        ({"shared": "base", "answer": None}, r"the shared adapter, has no adapter_config\.json"),
    ):
        with pytest.raises(ModelError, match=message):
            open_steps(models, **steps)
    with pytest.raises(ModelError, match=r"\{shared: .*analysis, answer: .*beside-analysis\} \(docs/redteam\.md\)"):
        load_model(ModelSection(path=str(models / beside)))
    with pytest.raises(ValidationError, match=r"no shared adapter \(null\); leave out shared"):
        EngineSection(path="m", steps={"shared": None, "answer": None})


def by_hand(engines):
    """Return the last replies of a chain, each step by an engine of its own."""
    replies = {request: [] for request in REQUESTS}
    for step, engine in engines.items():
        requests = [
            (replace(prompt, prompt=step_prompt(prompt.prompt, replies[prompt, sample], step)), sample)
            for prompt, sample in REQUESTS
        ]
        completions = {completion.key: completion for batch in engine.generate(requests) for completion in batch}
        for prompt, sample in REQUESTS:
            replies[prompt, sample].append((step, completions[prompt.prompt_id, sample].message))
    return {(prompt.prompt_id, sample): earlier[-1][1].content for (prompt, sample), earlier in replies.items()}


@pytest.mark.parametrize("names", [STEPS, ("zero", None, "zero"), (None, None, None), ("analysis", None, "answer")])
def test_a_chain_answers_each_step_with_its_own_adapter(models, names):
    engines = {
        step: load_engine(str(models / (name or "base")), SAMPLING) for step, name in zip(STEPS, names, strict=True)
    }
    # The order in which they are named doesn't matter.
    chain = open_steps(models, **dict(list(zip(STEPS, names, strict=True))[::-1]))
    assert {key: answer[1] for key, answer in texts(chain).items()} == by_hand(engines)
    prompts = {key: answer[0] for key, answer in texts(chain).items()}
    assert prompts == {(prompt.prompt_id, sample): prompt.prompt for prompt, sample in REQUESTS}


def test_a_step_without_its_own_adapter_would_answer_differently(models):
    """The adapters of this file change answers: otherwise the tests above could not fail."""
    engines = {step: load_engine(str(models / "analysis"), SAMPLING) for step in STEPS}
    chain = texts(open_steps(models, **dict(zip(STEPS, STEPS, strict=True))))
    assert {key: answer[1] for key, answer in chain.items()} != by_hand(engines)


def test_everything_that_an_answer_depends_on_is_in_the_hash(models, monkeypatch):
    chains = (
        {"answer": None},
        {"answer": "answer"},
        {"answer": "zero"},
        {"answer": "zero", "check": None},
        {"analysis": None, "guidance": None, "answer": "zero"},
        {"analysis": "zero", "guidance": None, "answer": "zero"},
        {"shared": "zero", "answer": None},
        {"shared": "zero", "answer": "answer-beside-zero"},
        {"shared": "analysis", "answer": "answer-beside-analysis"},
    )
    hashes = [open_steps(models, **steps).settings_hash for steps in chains]
    assert len({*hashes, load_engine(str(models / "base"), SAMPLING).settings_hash}) == len(chains) + 1
    assert open_steps(models, **chains[1]).settings_hash == hashes[1]
    monkeypatch.setattr("bfpo.generation.steps.INSTRUCTIONS_HASH", "another wording")
    assert open_steps(models, **chains[1]).settings_hash != hashes[1]


class Scripted(TransformersEngine):
    """Engine whose replies to a step are given, one for each prompt."""

    replies = None

    def generate(self, requests):
        for batch in super().generate(requests):
            for index, completion in enumerate(batch):
                last = completion.prompt[-1].content
                step = next((step for step, text in INSTRUCTIONS.items() if last.endswith(text)), "answer")
                if step in self.replies:
                    text, reasoning = self.replies[step][completion.prompt_id]
                    batch[index] = replace(completion, text=text, reasoning=reasoning)
            yield batch


@pytest.fixture
def scripted(make_model, tokenizer):
    def make(replies, *steps):
        engine = Scripted(make_model(shape="nano"), tokenizer, SAMPLING, name="m", identity="i")
        engine.replies = replies
        return StepsEngine(engine, dict.fromkeys(steps))

    return make


def test_an_answer_that_the_check_does_not_call_safe_becomes_a_refusal(scripted):
    checks = {"p0": ("Yes.", None), "p1": ("no", None), "p2": ("Well", None)}
    requests = [(prompt, 0) for prompt in PROMPTS]
    plain = texts(scripted({}, "answer"), requests)
    ((*answers,),) = scripted({"check": checks}, "answer", "check").generate(requests)
    first, second, third = sorted(answers, key=lambda answer: answer.prompt_id)
    assert (first.text, first.finish_reason) == plain["p0", 0][1:3]
    assert [answer.finish_reason for answer in (second, third)] == ["guarded"] * 2
    assert second.text == third.text == REFUSAL
    assert [(answer.guard.unsafe, answer.guard.undecided) for answer in (first, second, third)] == [
        (0, 0),
        (1, 0),
        (0, 1),
    ]


def test_a_chain_ends_where_a_step_has_no_answer(scripted):
    engine = scripted({"analysis": {"p0": ("", "a thought"), "p1": ("", None), "p2": ("ok", None)}}, *STEPS)
    with pytest.raises(Unanswered) as raised:
        list(engine.generate([(prompt, 0) for prompt in PROMPTS]))
    assert raised.value.failed == {("p0", 0): "step analysis: reasoning without an answer"}


def test_a_given_beginning_is_that_of_the_answer_alone(models):
    requests = [(replace(PROMPTS[0], prefill="round"), 0)]
    base = load_engine(str(models / "base"), SAMPLING)
    assert texts(open_steps(models, answer=None), requests) == texts(base, requests)
    ((chain,),) = open_steps(models, **dict.fromkeys(STEPS)).generate(requests)
    assert chain.text.startswith("round")
    engine = open_steps(models, **dict.fromkeys(STEPS))
    asked = []
    generate = engine._engine.generate
    engine._engine.generate = lambda requests: asked.extend(requests) or generate(requests)
    list(engine.generate(requests))
    assert [prompt.prefill for prompt, _ in asked] == [None, None, "round"]


def test_an_evaluation_names_the_steps(models):
    model = {"path": "m", "steps": {"answer": "a", "guidance": None, "analysis": None}}
    recipe = EvalRecipe.model_validate({"out": "o", "model": model, "judges": ["refusal-rule"]})
    assert model_name(recipe) == "m with steps analysis, guidance, answer"
    with pytest.raises(ValidationError, match="set guide: false"):
        RedteamRecipe.model_validate({"out": "o", "model": model, "prompts": [{"name": "xstest"}], "judge": "oracle"})


def test_wrong_steps_are_refused(models, tmp_path, make_model, tokenizer):
    for steps, message in (
        ({"analysis": None, "answer": None}, "the steps are analysis, answer; expected answer, alone or with both"),
        ({}, "the steps are none"),
        ({"think": None, "answer": None}, "'analysis', 'guidance', 'answer' or 'check'"),
    ):
        with pytest.raises(ValidationError, match=message):
            EngineSection(path="m", steps=steps)
    with pytest.raises(ValidationError, match="leave out server"):
        EngineSection(path="m", server="http://localhost:1/v1", steps={"answer": None})
    with pytest.raises(ModelError, match="the model has an adapter already"):
        open_engine(EngineSection(path=str(models / "zero"), steps={"answer": str(models / "answer")}), SAMPLING)
    with pytest.raises(ModelError, match=r"the step 'answer', has no adapter_config\.json"):
        open_steps(models, answer="base")
    make_model(shape="nano", seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"was trained on '.*base', which isn't the model '.*other'"):
        open_engine(EngineSection(path=str(tmp_path / "other"), steps={"answer": str(models / "answer")}), SAMPLING)


def test_the_commands_take_a_file_of_steps(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {step: str(models / step) for step in STEPS}
    Path("steps.yaml").write_text(json.dumps({"steps": paths}))
    Path("prompts.txt").write_text("small red box\n")
    options = ["--steps", "steps.yaml", "--max-new-tokens", "6", "--temperature", "1"]
    arguments = ["generate", str(models / "base"), "prompts.txt", "--out", "a.jsonl", *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (completion,) = read_completions(Path("a.jsonl"))
    assert (completion.engine, completion.prompt) == ("steps", user_says("small red box"))
    shown = CliRunner().invoke(app, ["chat", str(models / "base"), *options], input="small red box\n")
    assert "".join(completion.text.split()) in "".join(shown.output.split())
    refused = CliRunner().invoke(app, [*arguments, "--server", "http://localhost:1/v1"])
    assert refused.exit_code != 0


def test_step_prompts_keep_replies_without_their_reasoning():
    request = (Message("system", "Be brief."), Message("user", "Open the box."))
    thought = Message("assistant", "A box.", "A thought.")
    assert step_prompt(request, (), "answer") == request
    first = step_prompt(request, (), "analysis")
    assert first == (request[0], Message("user", f"Open the box.\n\n{INSTRUCTIONS['analysis']}"))
    second = step_prompt(request, [("analysis", thought)], "guidance")
    assert second == (*first, Message("assistant", "A box."), Message("user", INSTRUCTIONS["guidance"]))
    alone = step_prompt(request, [("answer", thought)], "check")
    assert alone == (*request, Message("assistant", "A box."), Message("user", INSTRUCTIONS["check"]))
