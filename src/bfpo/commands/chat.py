"""`bfpo chat`: chat with a checkpoint in the terminal."""

import sys

import torch
from transformers import TextStreamer, set_seed
from transformers.utils.logging import disable_progress_bar

from bfpo.config.recipes import ModelSection
from bfpo.core.terminal import console, escape_controls, say
from bfpo.errors import ModelError
from bfpo.generation.model_inputs import TemplateRefusal, render_chat
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.vocabulary import check_token_ids


class PlainStreamer(TextStreamer):
    """Streams a completion to the terminal, with its control characters escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a part of the completion."""
        super().on_finalized_text(escape_controls(text), stream_end=stream_end)


def chat(path: str, *, system: str | None, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Read lines and stream the model's answers, until the end of the input.

    Args:
        path: Folder or hub id of a model or an adapter.
        system: System message; None for none.
        max_new_tokens: Maximum length of an answer, in tokens.
        temperature: Sampling temperature; 0 is greedy decoding.
        seed: Seed of the sampling.

    Raises:
        ModelError: If the model can't be loaded, or its tokenizer has no chat template.
    """
    disable_progress_bar()
    section = ModelSection(path=path)
    tokenizer = load_tokenizer(section)
    if tokenizer.chat_template is None:
        raise ModelError(f"{path} has no chat template, so it isn't a chat model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(section).eval()
    torch.nn.Module.to(model, device)
    streamer = PlainStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    history = [{"role": "system", "content": system}] if system else []
    set_seed(seed)
    say(f"{path} on {device}; /new starts a new conversation, /quit or Ctrl-D ends")
    while (line := _read()) is not None:
        if line == "/new":
            history = history[:1] if system else []
            continue
        history.append({"role": "user", "content": line})
        try:
            text = render_chat(tokenizer, history, add_generation_prompt=True)
        except TemplateRefusal as refusal:
            raise ModelError(f"{path}: {refusal}") from None
        inputs = tokenizer([text], add_special_tokens=False, return_tensors="pt").to(device)
        check_token_ids(model.config, inputs["input_ids"].tolist(), path)
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **sampling,
        )
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        history.append({"role": "assistant", "content": str(answer)})


def _read() -> str | None:
    """Return the next non-empty line; None at the end of the input."""
    while True:
        if sys.stdin.isatty():
            console().print("you> ", end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return None
        if line.strip():
            return line.strip()
