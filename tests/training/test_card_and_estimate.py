"""The model card of a run, the chat with its model, and the estimate of its memory."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from bfpo.commands.chat import ChatStreamer, chat
from bfpo.config.loading import check_recipe
from bfpo.config.recipes import LoraSection, ModelSection, NewModel, TrainRecipe
from bfpo.core.files import write_jsonl
from bfpo.data.chat_format import ChatFormat
from bfpo.data.table import Example
from bfpo.errors import ModelError
from bfpo.model.layout import packed_layout
from bfpo.model.logps import add_layout_forward
from bfpo.model.lora import add_adapter, lora_config
from bfpo.model.selective import select_parameters
from bfpo.training.card import model_card
from bfpo.training.estimate import Arithmetic, footprint
from bfpo.training.run import run_training


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory, main_pairs):
    """A folder with a finished toy run on rows of PKU-SafeRLHF."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [
        {
            "prompt": pair.prompt[0].content,
            "response_0": pair.chosen,
            "response_1": pair.rejected,
            "is_response_0_safe": pair.labels.chosen,
            "is_response_1_safe": pair.labels.rejected,
            "better_response_id": 0,
            "safer_response_id": 0,
        }
        for pair in main_pairs
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    content = {
        "model": {"new": {"shape": "nano", "vocab_size": 300}},
        "data": [{"adapter": "pku_saferlhf", "path": "rows.jsonl"}],
        "holdout": 0.3,
        "loss": {"beta": 0.5},
        "trainer": {
            "output_dir": "runs/toy",
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "save_strategy": "no",
        },
    }
    with contextlib.chdir(folder):
        run_training(check_recipe(content, TrainRecipe, "toy"))
    return folder


@pytest.fixture
def run(finished_folder, tmp_path, monkeypatch):
    """Work in a copy of the finished run's folder; returns the content of `run.json`."""
    shutil.copytree(finished_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return json.loads(Path("runs/toy/run.json").read_text())


def test_the_card_names_start_model_and_non_commercial_data(run):
    text = Path("runs/toy/README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["bfpo", "train"]}
    assert "from `a new random model`" in body
    assert "CC-BY-NC-4.0 (**non-commercial**)" in body
    assert 'from_pretrained("runs/toy")' in body
    counts = run["data"]["train"]["main"]
    assert f"| main | {counts['ss']} | {counts['su']} | {counts['us']} | {counts['uu']} |" in body
    for cell, metrics in run["evaluation"]["main"]["cells"].items():
        assert (f"| main | {cell} | {metrics['pairs']} |" in body) == (metrics["pairs"] > 0)


def test_the_card_of_a_hub_model_names_its_base_and_data_sets(run):
    sources = json.loads(Path("runs/toy/data_manifest.json").read_text())["sources"]
    run["recipe"]["model"] = {"path": "org/base"}
    sources[0] |= {"files": {}, "source": {"adapter": "pku_saferlhf", "path": "org/data"}}
    front = yaml.safe_load(model_card(run, sources, Path("runs/toy")).split("---\n")[1])
    assert front["base_model"] == "org/base"
    assert front["datasets"] == ["org/data"]


@pytest.mark.usefixtures("run")
def test_the_snippet_of_the_card_runs():
    names = {}
    exec(Path("runs/toy/README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert names["model"].config.vocab_size == len(names["tokenizer"])


def chat_output(monkeypatch, capsys, lines: str, **options) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat("runs/toy", **{"system": None, "max_new_tokens": 5, "temperature": 0.7, "seed": 0} | options)
    return capsys.readouterr().out


@pytest.mark.usefixtures("run")
def test_chat_answers_each_line_and_repeats_its_answers_with_the_same_seed(monkeypatch, capsys):
    first = chat_output(monkeypatch, capsys, "red box\n\nblue ball\n/quit\nnever read\n")
    assert len(first.splitlines()) >= 3
    assert chat_output(monkeypatch, capsys, "red box\nblue ball\n") == first
    assert chat_output(monkeypatch, capsys, "red box\nblue ball\n", seed=1) != first


CALL = '<tool_call>{"name": "pay", "arguments": {"to": "Ada"}}</tool_call>'


@pytest.mark.parametrize(
    ("pieces", "opened", "shown"),
    [
        (["Red ", "box."], False, "Red box.\n"),
        (["<think>\n", "a ", "box</think>\n\n", "Red ", "box.<eos>"], False, "reasoning> a box\nRed box.\n"),
        (["[THINK]a ", "box[/THINK]Red ", "box."], False, "reasoning> a box\nRed box.\n"),
        (["a ", "box\n</think>\n", "Red ", "box."], True, "reasoning> a box\nRed box.\n"),
        (["a ", "box"], True, "reasoning> a box\n"),
        # Nothing says that this is reasoning until it ends.
        (["a ", "box\n", "</think>\n", "Red ", "box."], False, "a box\n\n(the text above is reasoning)\nRed box.\n"),
        (["Now. ", CALL], False, f"Now. {CALL}\n(The assistant calls the tool pay with to = Ada.)\n"),
    ],
)
def test_chat_shows_reasoning_apart_and_calls_in_words(capsys, pieces, opened, shown):
    streamer = ChatStreamer(SimpleNamespace(all_special_tokens=["<eos>", "[THINK]"]), opened=opened)
    for number, piece in enumerate(pieces, start=1):
        streamer.on_finalized_text(piece, stream_end=number == len(pieces))
    assert capsys.readouterr().out == shown
    expected = "" if opened and len(pieces) == 2 else "Now. " + CALL if CALL in pieces else "Red box."
    assert streamer.message.content == expected


@pytest.mark.usefixtures("run")
def test_chat_gives_earlier_turns_to_the_template_as_it_reads_them(monkeypatch, capsys):
    Path("runs/toy/chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if m.reasoning_content is defined and loop.last %}({{ m.reasoning_content }}){% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    prompts = []
    render_prompt = ChatFormat.render_prompt

    def record(self, prompt, *inputs):
        prompts.append((prompt, render_prompt(self, prompt, *inputs)))
        return prompts[-1][1]

    monkeypatch.setattr(ChatFormat, "render_prompt", record)
    output = chat_output(monkeypatch, capsys, "red box\nblue ball\n", system="be kind")
    assert output.count("reasoning> ") == 2
    assert output.count("note: no answer after the reasoning; --max-new-tokens is 5\n") == 2
    conversation, text = prompts[1]
    assert [message.role for message in conversation] == ["system", "user", "assistant", "user"]
    assert conversation[2].reasoning
    assert conversation[2].content == ""
    assert text == "<system>be kind<user>red box<assistant><user>blue ball<assistant><think>\n"


@pytest.mark.usefixtures("run")
def test_chat_needs_a_chat_template():
    Path("runs/toy/chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    with (
        pytest.raises(ModelError, match="runs/toy: the chat template refuses the conversation: System role"),
        pytest.MonkeyPatch.context() as patch,
    ):
        chat_output(patch, None, "red box\n", system="be kind")
    Path("runs/toy/chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template, so it isn't a chat model"):
        chat("runs/toy", system=None, max_new_tokens=5, temperature=0, seed=0)


OPTIONS = {"train_only": None, "lora": None, "reference": "auto"}


def test_the_estimate_of_weights_gradients_and_reference_is_exact(tokenizer):
    assert footprint(ModelSection(new=NewModel()), tokenizer, **OPTIONS).estimate(100).reference == 0
    full = footprint(ModelSection(new=NewModel()), tokenizer, **OPTIONS | {"reference": "shared"}).estimate(100)
    n = full.selection.total
    assert (full.weights, full.gradients, full.optimizer, full.reference) == (4 * n, 4 * n, 8 * n, 4 * n)
    selective = footprint(ModelSection(new=NewModel()), tokenizer, **OPTIONS | {"train_only": ["down_proj"]})
    assert selective.estimate(100).reference == 4 * selective.selection.trained < full.reference
    adapter = footprint(ModelSection(new=NewModel()), tokenizer, **OPTIONS | {"lora": LoraSection(r=2)})
    assert adapter.estimate(100).reference == 0
    assert 0 < adapter.selection.trained < selective.selection.trained
    assert adapter.estimate(200).activations == 2 * adapter.estimate(100).activations


def test_shards_divide_what_ddp_repeats(tokenizer):
    needed = footprint(ModelSection(new=NewModel()), tokenizer, **OPTIONS | {"train_only": ["down_proj"]})
    alone, ddp, sharded = (
        needed.estimate(100, strategy, processes) for strategy, processes in (("none", 1), ("ddp", 4), ("fsdp2", 4))
    )
    assert ddp.total - alone.total == alone.gradients
    assert (sharded.gradients, sharded.optimizer) == (alone.gradients / 4, alone.optimizer / 4)
    assert sharded.weights == alone.weights / 4 + needed.gathered
    assert (sharded.reference, sharded.activations) == (0, alone.activations)


def test_the_estimate_of_a_saved_model_needs_only_its_configuration(tmp_path, tokenizer, make_model):
    make_model().config.save_pretrained(tmp_path)
    saved = footprint(ModelSection(path=str(tmp_path)), tokenizer, **OPTIONS)
    assert saved.selection == footprint(ModelSection(new=NewModel()), tokenizer, **OPTIONS).selection


@pytest.mark.parametrize("lora", [None, LoraSection(r=4)])
def test_tied_embeddings_are_counted_once(tmp_path, tokenizer, make_model, lora):
    config = make_model().config
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    selection = footprint(ModelSection(path=str(tmp_path)), tokenizer, **OPTIONS | {"lora": lora}).selection
    model = AutoModelForCausalLM.from_config(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if lora is not None:
        model = add_adapter(model, lora_config(lora), seed=0)
    assert selection.total == sum(parameter.numel() for parameter in model.parameters())
    assert selection.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def saved_bytes(model, layout, autocast):
    """Return the bytes of what autograd saves in a forward pass, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # The tensor is kept, so that no other one gets its address.
            saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(layout=layout)
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("changes", [{}, {"train_only": ["down_proj"]}, {"lora": LoraSection(r=4)}])
def test_the_bytes_of_a_token_are_those_that_autograd_saves(changes, autocast, tokenizer, make_model):
    options = OPTIONS | changes
    model = make_model(shape="small")
    if options["lora"] is not None:
        model = add_adapter(model, lora_config(options["lora"]), seed=0)
    select_parameters(model, options["train_only"])
    add_layout_forward(model)
    ids = np.arange(96) % 100
    # Half as many examples again: what doesn't depend on them, such as casts of the weights, drops out.
    fewer, more = (packed_layout([Example(ids, (ids, ids))] * count) for count in (2, 3))
    measured = (saved_bytes(model, more, autocast) - saved_bytes(model, fewer, autocast)) / (
        more.num_tokens - fewer.num_tokens
    )
    needed = footprint(
        ModelSection(new=NewModel(shape="small")), tokenizer, **options, arithmetic=Arithmetic(bf16=autocast)
    )
    # Logits of two thirds of the tokens are counted by themselves.
    logits = 4 * 2 / 3 * len(tokenizer)
    assert needed.token == pytest.approx(measured - logits, rel=0.12)
