"""The `Modelfile` that makes a GGUF file a model of Ollama.

Ollama renders the `TEMPLATE` of a Modelfile, in Go's language, in preference to the chat template in the GGUF file;
without one, versions from 0.30 on run the file's own template, and earlier ones send the text of the user alone. So
a template is given where it renders exactly what the model's own does, and otherwise left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from bfpo.generation.model_inputs import TemplateRefusal, render_chat

# What a template may depend on besides the messages' roles and contents.
_KNOWN_VARIABLES = {"messages", "add_generation_prompt", "bos_token", "eos_token", "raise_exception"}
_SYSTEM, _USER, _ANSWER, _SECOND = "Zulu-1", "Yankee-2", "Xray-3", "Whiskey-4"
_ROLES = ("system", "user", "assistant")


class _Untranslatable(Exception):
    """A chat template does more than to put fixed texts around the messages."""


class Turns(NamedTuple):
    """A chat template that only puts fixed texts around the messages.

    Args:
        start: Text before the first message, if that isn't a system message.
        around: Role → texts before and after a message of it.
        answer_start: Text that begins an answer.
    """

    start: str
    around: Mapping[str, tuple[str, str]]
    answer_start: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return a prompt for generation, as Ollama renders it from `go_template`."""
        start = "" if messages[0]["role"] == "system" else self.start
        return start + "".join(map(self._render_message, messages)) + self.answer_start

    def _render_message(self, message: Mapping[str, str]) -> str:
        before, after = self.around[message["role"]]
        return f"{before}{message['content']}{after}"

    def go_template(self) -> str:
        """Return the template in Go's language."""
        system = '(index .Messages 0).Role "system"'
        start = f"{{{{ if ne {system} }}}}{_literal(self.start)}{{{{ end }}}}" if self.start else ""
        around = {role: " }}" + "{{ .Content }}".join(map(_literal, self.around[role])) + "{{" for role in _ROLES}
        branches = " else ".join(f'if eq .Role "{role}"{texts}' for role, texts in around.items())
        return f"{start}{{{{ range .Messages }}}}{{{{ {branches} end }}}}{{{{ end }}}}{_literal(self.answer_start)}"


def translate_template(tokenizer: PreTrainedTokenizerBase) -> Turns | str:
    """Return a tokenizer's chat template as fixed texts around messages, or why it isn't that.

    The texts are found by rendering, and must then give what the template gives on other conversations.

    Args:
        tokenizer: Tokenizer with a chat template.
    """
    try:
        _check_variables(str(tokenizer.chat_template))
        turns = _find_turns(tokenizer)
        for conversation in _CONVERSATIONS:
            if turns.render(conversation) != _render(tokenizer, conversation, True):
                raise _Untranslatable("it changes messages, or depends on more than their roles")
    except (_Untranslatable, TemplateRefusal) as reason:
        return str(reason)
    return turns


def make_modelfile(file: str, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> tuple[str, str | None]:
    """Return the text of a Modelfile, and why it has no template; None if it has one.

    Args:
        file: Name of the GGUF file beside it.
        tokenizer: Tokenizer of the model.
        end_ids: Tokens that end an answer.
    """
    lines, reason = [f"FROM ./{file}"], None
    if tokenizer.chat_template is None:
        lines += ["# The model has no chat template: texts are sent as they are.", 'TEMPLATE """{{ .Prompt }}"""']
    else:
        turns = translate_template(tokenizer)
        if isinstance(turns, str):
            reason = turns
            lines += [
                f"# No TEMPLATE: the chat template can't be translated exactly ({' '.join(reason.split())}).",
                "# Ollama runs the template in the GGUF file from version 0.30 on; earlier ones need a TEMPLATE.",
            ]
        else:
            lines.append(f'TEMPLATE """{turns.go_template()}"""')
    lines += [f'PARAMETER stop """{text}"""' for text in tokenizer.convert_ids_to_tokens(list(end_ids))]
    return "\n".join(lines) + "\n", reason


def _check_variables(template: str) -> None:
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    try:
        used = meta.find_undeclared_variables(environment.parse(template))
    except TemplateSyntaxError as error:
        raise _Untranslatable(f"it has tags of its own: {error.message}") from None
    if others := sorted(used - _KNOWN_VARIABLES):
        raise _Untranslatable(f"it depends on {', '.join(others)}")


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_CONVERSATIONS = [
    [_message("user", " A line\n\nand another ")],
    [_message("system", "Be brief. "), _message("user", "{{ x }}")],
    [_message("user", "One"), _message("assistant", "\n Two <b>\n"), _message("user", "Three")],
    [
        *(_message("system", "S"), _message("user", "One"), _message("assistant", "Two"), _message("user", "Three")),
        *(_message("assistant", "Four"), _message("user", "Five")),
    ],
]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], asks: bool) -> str:
    return render_chat(tokenizer, messages, add_generation_prompt=asks)


def _find_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Return the texts around messages, of each role once."""
    user, answer, second = _message("user", _USER), _message("assistant", _ANSWER), _message("user", _SECOND)
    only = _render(tokenizer, [user], False)
    asked = _render(tokenizer, [user], True)
    answer_start = _cut(asked, only, "")
    before_user, after_user = _around(only, _USER)
    answered = _render(tokenizer, [user, answer], False)
    between, after_answer = _around(answered, _ANSWER)
    before_answer = _cut(between, before_user + _USER + after_user, "")
    between, _ = _around(_render(tokenizer, [user, answer, second], False), _SECOND)
    before_second = _cut(between, answered, "")
    start = _cut(before_user, "", before_second)
    with_system = _render(tokenizer, [_message("system", _SYSTEM), user], False)
    before_system, rest = _around(with_system, _SYSTEM)
    after_system = _cut(rest, "", before_second + _USER + after_user)
    around = {
        "system": (before_system, after_system),
        "user": (before_second, after_user),
        "assistant": (before_answer, after_answer),
    }
    fixed = "".join([start, answer_start, *(text for texts in around.values() for text in texts)])
    # A Modelfile can't quote the marks, and its reader leaves out what Go's `strconv.IsPrint` refuses.
    if '"""' in fixed or not all(letter.isprintable() or letter in "\n\t" for letter in fixed):
        raise _Untranslatable("it contains three quotation marks or invisible characters")
    return Turns(start, around, answer_start)


def _around(text: str, content: str) -> tuple[str, str]:
    """Return the texts before and after the only occurrence of a content."""
    before, found, after = text.partition(content)
    if not found or content in after:
        raise _Untranslatable("it leaves out or repeats messages")
    return before, after


def _cut(text: str, start: str, end: str) -> str:
    """Return a text without its start and end, which it must have."""
    if len(text) < len(start) + len(end) or not text.startswith(start) or not text.endswith(end):
        raise _Untranslatable("what it puts around a message depends on the others")
    return text[len(start) : len(text) - len(end)]


def _literal(text: str) -> str:
    """Return a text as Go's templates print it."""
    text = text.replace("{{", '{{ "{{" }}')
    # An action follows: together with its marks, a brace at the end would be read as the action's.
    return f'{text[:-1]}{{{{ "{{" }}}}' if text.endswith("{") else text
