"""The chat template of a recipe, and the time that templates see."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Self

from bfpo.config.recipes import TextSection
from bfpo.errors import ModelError


@contextmanager
def fixed_clock(clock: datetime) -> Iterator[None]:
    """Let `strftime_now` in chat templates see a fixed time.

    `datetime` in that module of transformers is a semi-private name; tests check that the clock is used. It can't be
    passed to the template, because transformers turns all values into text.
    """
    from transformers.utils import chat_template_utils as module

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromisoformat(clock.isoformat())

    name = "datetime"
    original = getattr(module, name)
    setattr(module, name, Clock)
    try:
        yield
    finally:
        setattr(module, name, original)


def chat_template(text: TextSection) -> str | None:
    """Return the chat template of a recipe, which may be in a file; None for the tokenizer's template.

    Raises:
        ModelError: If the file can't be read.
    """
    template = text.chat_template
    if template is None or "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"text.chat_template: {template}: {error.strerror}; expected a template or a file") from None
