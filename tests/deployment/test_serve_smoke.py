"""`bfpo serve` as a process: a tiny model and its adapter, asked by the `openai` client, with and without a guard."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import openai
import pytest
import torch

from bfpo.config.recipes import LoraSection
from bfpo.core.conversation import user_says
from bfpo.core.samples import Prompt, Sampling, prompt_id
from bfpo.generation.in_process import load_engine
from bfpo.model.lora import add_adapter, lora_config

pytestmark = pytest.mark.slow
MESSAGES = [{"role": "user", "content": "round red"}]
JUDGE = '''
from bfpo.core.samples import Verdict

class Judge:
    """Calls answers to prompts with `green` unsafe."""

    name, revision = "color", "1"

    def judge(self, completions):
        for completion in completions:
            yield Verdict.on(completion, self, safe="green" not in completion.prompt[-1].content)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, tokenizer):
    folder = tmp_path_factory.mktemp("served")
    model = make_model()
    model.save_pretrained(folder / "whole")
    tokenizer.save_pretrained(folder / "whole")
    model.name_or_path = str(folder / "whole")
    adapted = add_adapter(model, lora_config(LoraSection(r=8)), seed=0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    adapted.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    (folder / "judges").mkdir()
    (folder / "judges" / "colors.py").write_text(JUDGE)
    guard = "guard: {kind: first_safe, judge: 'judges.colors:Judge', refusal: not this one}\n"
    (folder / "guard.yaml").write_text(guard)
    return folder


@contextmanager
def serving(folder, *arguments):
    """Run `bfpo serve` on a free port, and yield a client; SIGINT must end it with exit code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "bfpo", "serve", *arguments, "--port", str(port)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    output = []
    try:
        end = time.monotonic() + 240
        while True:
            try:
                client.models.list(timeout=5)
                break
            except openai.APIConnectionError:
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < end
                time.sleep(0.2)
        yield client, output
        process.send_signal(signal.SIGINT)
        output.append(process.communicate(timeout=60)[0])
        assert process.returncode == 0, output[0]
    finally:
        process.kill()
        client.close()


def greedy_answer(path):
    """Return the answer of `bfpo generate` at temperature 0."""
    prompt = user_says("round red")
    engine = load_engine(str(path), Sampling(temperature=0.0, max_new_tokens=12))
    ((completion,),) = engine.generate([(Prompt(prompt_id(prompt), prompt), 0)])
    return completion.text


def ask(client, model, *, streams, **fields):
    options = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 12, **fields}
    if not streams:
        return client.chat.completions.create(**options).choices[0].message.content
    chunks = client.chat.completions.create(**options, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("name", ["whole", "adapter"])
def test_without_a_guard_answers_are_those_of_generate(folder, name):
    with serving(folder, name, "--name", "me/mine") as (client, _):
        assert [model.id for model in client.models.list()] == ["me/mine"]
        answers = {ask(client, "me/mine", streams=streams) for streams in (False, True)}
        sampled = {ask(client, "me/mine", streams=False, temperature=1, seed=seed) for seed in range(6)}
    assert answers == {greedy_answer(folder / name)}
    assert len(sampled) > 1


def test_behind_a_guard_answers_are_those_of_generate(folder):
    green = [{"role": "user", "content": "round green"}]
    with serving(folder, "adapter", "--guard", "guard.yaml") as (client, output):
        answers = {ask(client, "adapter", streams=streams) for streams in (False, True)}
        refused = {ask(client, "adapter", streams=streams, messages=green) for streams in (False, True)}
        seeded = {ask(client, "adapter", streams=False, temperature=1, seed=3) for _ in range(2)}
        with pytest.raises(openai.BadRequestError, match="n is 2"):
            ask(client, "adapter", streams=False, n=2)
    assert answers == {greedy_answer(folder / "adapter")}
    assert (refused, len(seeded)) == ({"not this one"}, 1)
    assert "4 passed, 0 cut, 2 fallback, 0 unanswered" in output[0]
    assert "round" not in output[0]
