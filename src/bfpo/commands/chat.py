"""`bfpo chat`: chat with a checkpoint in the terminal."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed
from transformers.utils.logging import disable_progress_bar

from bfpo.config.recipes import ModelSection
from bfpo.core.chain import Expert
from bfpo.core.conversation import Message
from bfpo.core.samples import Completion, Engine, Prompt, Sampling, prompt_id
from bfpo.core.terminal import console, escape_controls, say
from bfpo.data.chat_format import ChatFormat
from bfpo.errors import ModelError, Unanswered
from bfpo.generation.in_process import TransformersEngine
from bfpo.generation.model_inputs import TemplateRefusal, refusals_of_template
from bfpo.generation.model_text import parse_model_text
from bfpo.judging.guarded_engine import FirstSafeSection, Guard, guard_engine
from bfpo.judging.spec import parse_judge
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.lora import CausalLM
from bfpo.model.vocabulary import check_token_ids


class ChatStreamer(TextStreamer):
    """Streams an answer to the terminal: reasoning apart from the answer, with control characters escaped.

    Args:
        tokenizer: Tokenizer of the model.
        opened: Whether the prompt ends inside a thought.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, opened: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False)
        self._opened, self._text, self._reasoning, self._answer = opened, "", "", ""

    @property
    def message(self) -> Message:
        """The answer so far; calls of tools stay in its text."""
        return self._parse(has_tools=False)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a part of the answer; marks of reasoning in it are whole, because they contain no blanks."""
        self._text += text
        message = self.message
        reasoning = message.reasoning or ""
        if self._answer and not message.content.startswith(self._answer):
            # A text that an end of reasoning follows was no answer.
            _print("\n(the text above is reasoning)", style="dim")
            self._reasoning, self._answer = reasoning, ""
        if new := reasoning.removeprefix(self._reasoning):
            _print(new if self._reasoning else f"reasoning> {new}", style="dim")
            self._reasoning = reasoning
        if message.content.strip() and (new := message.content.removeprefix(self._answer)):
            _print(f"\n{new}" if self._reasoning and not self._answer else new)
            self._answer = message.content
        if stream_end:
            _print("\n")
            for call in self._parse(has_tools=True).tool_calls:
                _print(f"({call.in_words()})\n", style="dim")

    def _parse(self, *, has_tools: bool) -> Message:
        special_tokens: Sequence[str] = self.tokenizer.all_special_tokens
        return parse_model_text(self._text, opened=self._opened, has_tools=has_tools, special_tokens=special_tokens)


def chat(
    path: str,
    *,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    guard: Guard | None = None,
    steps: Mapping[Expert, str | None] | None = None,
) -> None:
    """Read lines and stream the model's answers, until the end of the input.

    Reasoning of earlier turns is given to the chat template, which most leave out. Behind a guard that judges, an
    answer is shown when it has passed, or each of its sentences; with steps, when the last of them is done.

    Args:
        path: Folder or hub id of a model or an adapter.
        system: System message; None for none.
        max_new_tokens: Maximum length of an answer, in tokens.
        temperature: Sampling temperature; 0 is greedy decoding.
        seed: Seed of the sampling.
        guard: Guard in front of the model.
        steps: Steps that an answer is made in, with their adapters on the model.

    Raises:
        RecipeError: If the guard isn't possible with this sampling.
        ModelError: If the model can't be loaded, or its tokenizer has no chat template.
    """
    disable_progress_bar()
    sampling = Sampling(1, temperature, 1.0, max_new_tokens, seed)
    answer: _Streaming | _Whole
    if steps is not None:
        from bfpo.generation.steps import load_steps

        answer = _Whole(load_steps(path, steps, sampling), sampling, guard)
    else:
        model, tokenizer = _load_chat_model(path)
        if guard is None:
            answer = _Streaming(model, tokenizer, path, max_new_tokens, temperature)
        else:
            engine = TransformersEngine(model, tokenizer, sampling, name=path, identity="")
            answer = _Whole(engine, sampling, guard)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    beginning = [Message("system", system)] if system else []
    history = [*beginning]
    set_seed(seed)
    say(f"{path} on {device}; /new starts a new conversation, /quit or Ctrl-D ends")
    while (line := _read()) is not None:
        if line == "/new":
            history = [*beginning]
            continue
        history.append(Message("user", line))
        message = answer(history)
        if message is None:
            history.pop()
            continue
        if message.reasoning is not None and message.is_empty:
            say(f"note: no answer after the reasoning; --max-new-tokens is {max_new_tokens}")
        history.append(message)


def _load_chat_model(path: str) -> tuple[CausalLM, PreTrainedTokenizerBase]:
    section = ModelSection(path=path)
    tokenizer = load_tokenizer(section)
    if tokenizer.chat_template is None:
        raise ModelError(f"{path} has no chat template, so it isn't a chat model")
    model = load_model(section).eval()
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer


class _Streaming:
    """Answers that are shown while they are sampled."""

    def __init__(
        self, model: CausalLM, tokenizer: PreTrainedTokenizerBase, path: str, max_new_tokens: int, temperature: float
    ) -> None:
        self._model, self._tokenizer, self._path = model, tokenizer, path
        self._chat_format, self._max_new_tokens = ChatFormat(tokenizer), max_new_tokens
        self._sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}

    def __call__(self, history: Sequence[Message]) -> Message:
        model, tokenizer = self._model, self._tokenizer
        text = _render(self._chat_format, history, self._path)
        inputs = tokenizer([text], add_special_tokens=False, return_tensors="pt").to(model.device)
        check_token_ids(model.config, inputs["input_ids"].tolist(), self._path)
        streamer = ChatStreamer(tokenizer, opened=bool(self._chat_format.opened))
        generate: Any = model.generate
        generate(
            **inputs,
            max_new_tokens=self._max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            **self._sampling,
        )
        return streamer.message


class _Whole:
    """Answers that are shown when they are whole, or sentence by sentence if a guard judges sentences.

    Reasoning that the guard's judge doesn't read isn't shown.
    """

    def __init__(self, engine: Engine, sampling: Sampling, guard: Guard | None) -> None:
        self._engine = guard_engine(engine, sampling, guard, show=self._show)
        # What of the answer in progress is on the screen.
        self._shown = ""
        # Without a judge, nothing waits for one.
        self._shows_reasoning = not isinstance(guard, FirstSafeSection) or parse_judge(guard.judge).reads == "both"

    def __call__(self, history: Sequence[Message]) -> Message | None:
        """Return the answer to a conversation; None if the model can't be asked, which is printed."""
        conversation, self._shown = tuple(history), ""
        try:
            ((completion,),) = self._engine.generate([(Prompt(prompt_id(conversation), conversation), 0)])
        except Unanswered as error:
            say(f"note: {next(iter(error.failed.values()))}")
            return None
        message = completion.message
        self._show(completion)
        say()
        counts = completion.guard
        if completion.finish_reason == "guarded" and counts is not None:
            say(f"(the guard's refusal; none of {counts.samples} samples passed)")
        elif counts is not None and counts.cut:
            say("(cut by the guard; no next sentence passed)")
        return message

    def _show(self, completion: Completion) -> None:
        """Show what has passed and isn't on the screen yet."""
        message = completion.message
        if not self._shown and message.reasoning and self._shows_reasoning:
            say(f"reasoning> {message.reasoning}")
        text = message.in_words()
        _print(text.removeprefix(self._shown))
        self._shown = text


def _print(text: str, *, style: str | None = None) -> None:
    """Print a part of a line, with control characters escaped."""
    console().print(escape_controls(text), end="", markup=False, emoji=False, style=style)


def _render(chat_format: ChatFormat, history: Sequence[Message], path: str) -> str:
    try:
        with refusals_of_template(chat_format.tokenizer):
            return chat_format.render_prompt(tuple(history))
    except TemplateRefusal as refusal:
        raise ModelError(f"{path}: {refusal}") from None


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
