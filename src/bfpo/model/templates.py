"""Chat templates are programs that come with a model: limits on their time and output, and errors of one class."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, SupportsIndex

from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from bfpo.core.template_errors import TEMPLATE_ERRORS
from bfpo.errors import ModelError

# Seconds of CPU time that a conversation may take; the largest public templates take milliseconds.
MAX_SECONDS = 5.0
MAX_CHARACTERS = 20_000_000
# Memory that the first rendering may take, in bytes.
MAX_MEMORY = 2 << 30

_PROBES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning."}],
]


class TemplateLimit(TemplateRuntimeError):
    """A chat template exceeded a limit."""


def limit_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Limit the chat template of a tokenizer, and check it on a few short conversations.

    transformers renders templates in jinja2's sandbox, so they can't reach files or other programs. Here every
    rendering gets a limit on its CPU time and on the length of its output, and whatever goes wrong in it becomes a
    jinja2 `TemplateError`. Copies of the tokenizer, also unpickled ones, have the same limits.

    It can't stop a template that allocates much memory in one operation on other conversations than those of the
    check, which alone has a limit on memory (on Linux), or one that is slow in another thread than the main one,
    where Python handles no signals.

    Args:
        tokenizer: Tokenizer, which gets a subclass of its class with another `apply_chat_template`.

    Raises:
        ModelError: If the template can't be compiled, exceeds a limit, tries to leave the sandbox, or fails on every
            conversation. One that refuses these conversations by itself passes: it may be a judge's.
    """
    if not isinstance(tokenizer, _LimitedTemplate):
        base: Any = type(tokenizer)
        tokenizer.__class__ = _limited_class(base)
    if tokenizer.chat_template is not None:
        _probe(tokenizer)


class _LimitedTemplate:
    """Mixin for tokenizers whose chat templates have limits.

    A replaced method of the tokenizer object would not do: in a copy it would render the template of the original.
    """

    chat_template: Any

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        unlimited = super().apply_chat_template  # type: ignore[misc]
        if self.chat_template is None and options.get("chat_template") is None:
            return unlimited(*args, **options)
        try:
            with _cpu_time_limit(MAX_SECONDS):
                rendered = unlimited(*args, **options)
        except TemplateError:
            raise
        except MemoryError as error:
            raise TemplateLimit("it needs too much memory") from error
        except TEMPLATE_ERRORS as error:
            raise TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
        if isinstance(rendered, str) and len(rendered) > MAX_CHARACTERS:
            raise TemplateLimit(f"it writes {len(rendered):,} characters, more than {MAX_CHARACTERS:,}")
        return rendered

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # A class that is made at run time can't be pickled by its name, so its base is.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, (limited, *args), *rest = reduced
        return (_new_limited, (limited.__bases__[1], *args), *rest)


@cache
def _limited_class(base: Any) -> Any:
    """Return the subclass of a tokenizer class whose templates have limits. Its name is saved with a tokenizer."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (_LimitedTemplate, base), names)


def _new_limited(base: type, *args: Any) -> Any:
    """Return a new, empty tokenizer of the limited class, for copies."""
    limited = _limited_class(base)
    return limited.__new__(limited, *args)


def _probe(tokenizer: PreTrainedTokenizerBase) -> None:
    name = f"chat template of '{tokenizer.name_or_path}'"
    faults = []
    for messages in _PROBES:
        try:
            with _memory_limit(MAX_MEMORY):
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateSyntaxError as error:
            raise ModelError(f"{name}: line {error.lineno}: {error.message}") from None
        except (SecurityError, TemplateLimit) as error:
            raise ModelError(f"{name}: {error}") from None
        except TemplateError as error:
            # Without a cause the template, or an undefined variable, refuses the conversation.
            faults.append(None if error.__cause__ is None else str(error))
        else:
            return
    if all(faults):
        raise ModelError(f"{name}: it fails on every conversation ({faults[0]})")


@contextmanager
def _cpu_time_limit(seconds: float) -> Iterator[None]:
    """Raise `TemplateLimit` in a block that takes more CPU time; without effect outside of the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGVTALRM"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TemplateLimit(f"it takes more than {seconds:g} seconds")

    previous = signal.signal(signal.SIGVTALRM, stop)
    # Repeated, because jinja2 ignores errors while it computes constants.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@contextmanager
def _memory_limit(size: int) -> Iterator[None]:
    """Let allocations of more than `size` bytes fail in a block; only on Linux."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + size
    for bound in (soft, hard):
        limit = limit if bound == resource.RLIM_INFINITY else min(limit, bound)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
