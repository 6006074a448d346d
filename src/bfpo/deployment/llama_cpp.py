"""llama.cpp in this process, by the package `xllamacpp`: what it makes of a GGUF file."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2 as httpx
import torch

from bfpo.deployment.answers import MAX_NEW_TOKENS, PROMPTS, Answered
from bfpo.errors import ModelError

# Seconds that one answer may take.
_TIMEOUT = 600.0


def is_installed() -> bool:
    """Return whether llama.cpp can be asked."""
    return find_spec("xllamacpp") is not None


def answer_with_llama_cpp(file: Path, *, has_template: bool, context: int) -> Answered:
    """Return what llama.cpp reads and answers for each of `PROMPTS`, with the file's own chat template and tokenizer.

    Args:
        file: GGUF file.
        has_template: Whether the file has a chat template.
        context: Maximum number of tokens of a prompt and its answer.

    Raises:
        ModelError: If llama.cpp can't load the file.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.use_jinja, params.warmup, params.verbosity = True, False, 0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ModelError(f"{file}: llama.cpp can't load it: {error}") from None
    with httpx.Client(base_url=server.listening_address, timeout=_TIMEOUT, trust_env=False) as client:
        prompts = [_encode(client, prompt, has_template=has_template) for prompt in PROMPTS]
        return Answered(prompts, [_answer(client, prompt) for prompt in prompts])


def _encode(client: httpx.Client, prompt: str, *, has_template: bool) -> list[int]:
    if has_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = _post(client, "/apply-template", {"messages": messages})["prompt"]
    options = {"add_special": True, "parse_special": has_template}
    return list(_post(client, "/tokenize", {"content": prompt, **options})["tokens"])


def _answer(client: httpx.Client, prompt: Sequence[int]) -> list[int]:
    settings = {"temperature": 0.0, "n_predict": MAX_NEW_TOKENS, "return_tokens": True, "cache_prompt": False}
    return list(_post(client, "/completion", {"prompt": list(prompt), **settings})["tokens"])


def _post(client: httpx.Client, path: str, content: dict[str, Any]) -> Any:
    reply = client.post(path, json=content)
    if reply.status_code != 200:
        raise ModelError(f"llama.cpp answers {path} with {reply.status_code}: {reply.text[:300]}")
    return reply.json()
