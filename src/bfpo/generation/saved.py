"""Engine that returns completions saved by another program."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bfpo.config.recipes import Source
from bfpo.core.conversation import Conversation, Message, conversation_key
from bfpo.core.files import content_hash, file_hash
from bfpo.core.guarding import GuardCounts, read_guard_counts
from bfpo.core.pairs import TemplateInputs
from bfpo.core.read_messages import as_messages
from bfpo.core.reasoning import REASONING_KEYS
from bfpo.core.samples import Completion, Prompt
from bfpo.core.terminal import say
from bfpo.core.tools import FrozenJson, as_tool_calls
from bfpo.data.pair_formats import find_unread_columns, read_inputs
from bfpo.data.prompt_sets import PROMPT_ALIASES
from bfpo.data.rows import SourceRow, read_rows, refuse_lone_surrogates
from bfpo.errors import DataError, Unanswered
from bfpo.generation.model_text import read_parts_in_text
from bfpo.generation.server_replies import read_finish_reason

_PROMPT_COLUMNS = ("prompt", "instruction", "question", "goal")
_ANSWER_COLUMNS = ("text", "completion", "response", "output")
# Columns with a conversation: the prompt, or the prompt and the answer.
_CHAT_COLUMNS = ("messages", "conversations")
# Prompts are matched without their system messages.
_OTHER_COLUMNS = frozenset((*Completion.__dataclass_fields__, *REASONING_KEYS, "system", "system_prompt"))
_BATCH = 256


class SavedEngine:
    """Engine that answers prompts from a file; see `Engine`.

    Args:
        path: `completions.jsonl`; or any table with a prompt (`prompt`, `instruction`, `question` or `goal`) and an
            answer (`text`, `completion`, `response` or `output`: a text or a message) in each row, or with both in
            `messages` or `conversations`; or the samples that lm-eval writes with `--log_samples` for a task of
            `bfpo.evaluation.lm_eval.pack`. Further rows of a prompt are further samples. Prompts are matched without
            their system messages, and by their tools and template arguments where a row has them.
        name: Name of the model in completions, if the file has none.

    Raises:
        DataError: If the file is malformed, or has answers of several models.
    """

    name = "saved"

    def __init__(self, path: str, name: str) -> None:
        self._path, self._name = path, name
        self._answers: dict[str, list[_SavedAnswer]] = {}
        self.settings_hash = content_hash("saved", file_hash(Path(path)))
        models = set()
        unread: dict[str, None] = {}
        for row in map(_flatten, read_rows(Source(path=path))):
            with row.locate_errors():
                answer = _read_answer(row)
                # Also those in the JSON text of a cell, which the row doesn't have.
                refuse_lone_surrogates(SourceRow(dict(row.values) | {"answer": answer.message.to_row()}, row.where))
                model = row.values.get("model")
                if not isinstance(model, str | None):
                    raise DataError(f"column 'model' is {model!r}; expected a string")
            models.add(model)
            unread |= dict.fromkeys(find_unread_columns(row, answer.columns))
            self._answers.setdefault(_prompt_key(answer.prompt), []).append(answer)
        if len(models) > 1:
            names = ", ".join(sorted(map(str, models)))
            raise DataError(f"{path}: answers of several models ({names}); write a file for each model")
        if unread:
            say(f"note: {path}: columns not read: {', '.join(unread)}")

    @property
    def faults(self) -> Counter[str]:
        """Always empty: nothing is retried."""
        return Counter()

    @property
    def counts_tokens(self) -> bool:
        """Whether the file has the number of tokens of its answers; otherwise their words are counted."""
        rows = (answer.row for answers in self._answers.values() for answer in answers)
        return all("completion_tokens" in row.values for row in rows)

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts in their order.

        Raises:
            Unanswered: At the end, if some are missing from the file.
        """
        answered, failed = [], {}
        for prompt, sample in requests:
            answers = self._find_answers(prompt.prompt)
            matching = [answer for answer in answers if answer.has(prompt.inputs)]
            if sample < len(matching):
                answered.append((prompt, sample, matching[sample]))
            else:
                others = " with these tools and template arguments" if answers and not matching else ""
                failed[prompt.prompt_id, sample] = f"not in {self._path}{others}"
        for start in range(0, len(answered), _BATCH):
            yield [self._completion(*request) for request in answered[start : start + _BATCH]]
        if failed:
            raise Unanswered(failed, len(requests), refused=failed)

    def _find_answers(self, prompt: Conversation) -> Sequence["_SavedAnswer"]:
        """Return the answers to a prompt, or to the wording that the completions of its set are published with."""
        key = _prompt_key(prompt)
        return self._answers[key] if key in self._answers else self._answers.get(PROMPT_ALIASES.get(key, ""), [])

    def _completion(self, prompt: Prompt, sample: int, answer: "_SavedAnswer") -> Completion:
        message, row = answer.message, answer.row
        ending = row.values.get("finish_reason")
        words = sum(len(turn.content.split()) for turn in prompt.prompt)
        completion = Completion.on(
            prompt,
            sample,
            text=message.content,
            finish_reason=ending if ending in ("refused", "guarded") else read_finish_reason(ending),
            prompt_tokens=_token_count(row, "prompt_tokens", words),
            completion_tokens=_token_count(
                row, "completion_tokens", sum(len(text.split()) for text in message.texts())
            ),
            model=str(row.values.get("model") or self._name),
            engine=str(row.values.get("engine") or self.name),
            settings_hash=self.settings_hash,
            # A thought that was cut at once has no text, and there is no answer after it.
            reasoning="" if _is_ours(row) and row.values.get("reasoning") == "" else message.reasoning,
            tool_calls=message.tool_calls,
            guard=answer.guard,
        )
        return read_parts_in_text(completion)


class _SavedAnswer(NamedTuple):
    """Answer in a row of a file.

    Args:
        prompt: Conversation that it answers.
        message: Assistant turn.
        inputs: Tools and template arguments of the row.
        columns: Columns that are read.
        row: The row.
        guard: What a guard did for the answer.
    """

    prompt: Conversation
    message: Message
    inputs: TemplateInputs
    columns: frozenset[str]
    row: SourceRow
    guard: GuardCounts | None

    def has(self, inputs: TemplateInputs) -> bool:
        """Return whether the answer is to a prompt with these tools and arguments; a row may not say which it had."""
        pairs = ((self.inputs.tools, inputs.tools), (self.inputs.kwargs, inputs.kwargs))
        return all(ours is None or _value(ours) == _value(theirs) for ours, theirs in pairs)


def _value(json: FrozenJson | None) -> object:
    return None if json is None else json.value


def _read_answer(row: SourceRow) -> _SavedAnswer:
    """Return the answer of a row.

    Raises:
        DataError: If there is none, or it is ambiguous.
    """
    values = row.values
    chat_column = next((name for name in _CHAT_COLUMNS if values.get(name)), None)
    chat = row.messages(chat_column) if chat_column else ()
    answer_column = _find_answer_column(row)
    if answer_column is None and chat and chat[-1].role == "tool":
        raise DataError(f"column '{chat_column}' ends with the result of a tool; expected it to end with the answer")
    if answer_column is None and chat and chat[-1].role == "assistant":
        prompt, message = chat[:-1], chat[-1]
    else:
        column = _find_column(row, _ANSWER_COLUMNS) if answer_column is None else answer_column
        prompt, message = chat, _read_message(row, column)
        if chat and chat[-1].role == "assistant":
            raise DataError(f"columns '{chat_column}' and '{column}' both have an answer; keep one")
    prompt_column = next((name for name in _PROMPT_COLUMNS if name in values), None)
    if not prompt:
        prompt_column = _find_column(row, _PROMPT_COLUMNS)
        prompt = row.messages(prompt_column)
    elif prompt_column and values[prompt_column] and not _begins_with(prompt, row.messages(prompt_column)):
        raise DataError(f"columns '{prompt_column}' and '{chat_column}' have different prompts; keep one")
    if prompt_column == "instruction" and values.get("input"):
        raise DataError("column 'input' is a part of the prompt; join it with 'instruction' as the model was asked")
    columns = _OTHER_COLUMNS | {name for name in (chat_column, answer_column, prompt_column) if name}
    # A column of that name in a file of another program is something else.
    guard = read_guard_counts(values.get("guard")) if _is_ours(row) else None
    return _SavedAnswer(prompt, _add_columns(row, message), read_inputs(row), columns, row, guard)


def _find_answer_column(row: SourceRow) -> str | None:
    """Return the column with the answer; None if there is none, or none with a value beside a conversation."""
    present = [name for name in _ANSWER_COLUMNS if name in row.values]
    filled = [name for name in present if row.values[name] not in (None, "")]
    if any(row.values[name] != row.values[filled[0]] for name in filled):
        raise DataError(f"columns {' and '.join(map(repr, filled))} could both be the answer; keep one")
    if filled or not present:
        return filled[0] if filled else None
    return None if any(row.values.get(name) for name in _CHAT_COLUMNS) else present[0]


def _read_message(row: SourceRow, column: str) -> Message:
    """Return the answer in a column: a text, an assistant message, or null beside a tool call or reasoning."""
    value = row.value(column)
    has_others = any(row.values.get(name) for name in ("tool_calls", *REASONING_KEYS))
    if value is None and has_others:
        return Message("assistant", "")
    if isinstance(value, str):
        return _message_in_text(value, row)
    if value is None:
        raise DataError(f"column '{column}' is null, and the row has no tool call; expected a string")
    messages = as_messages(value, column)
    if [message.role for message in messages] != ["assistant"]:
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"column '{column}' has the turns {roles}; expected one assistant turn")
    return messages[0]


def _message_in_text(text: str, row: SourceRow) -> Message:
    """Return the message that a text is, or that its JSON describes, as in a CSV file of another program."""
    if not _is_ours(row):
        # A model may write JSON of its own.
        with suppress(DataError):
            messages = as_messages(text)
            if [message.role for message in messages] == ["assistant"]:
                return messages[0]
    return Message("assistant", text)


def _is_ours(row: SourceRow) -> bool:
    return "settings_hash" in row.values


def _add_columns(row: SourceRow, message: Message) -> Message:
    """Return an answer with the reasoning and the tool calls that are in columns of their own."""
    thoughts = [message.reasoning] if message.reasoning else []
    for column in REASONING_KEYS:
        if row.values.get(column) is not None and (thought := row.text(column)).strip():
            thoughts.append(thought)
    if any(thought.strip() != thoughts[0].strip() for thought in thoughts):
        raise DataError("the row has two different texts of reasoning; keep one")
    calls = as_tool_calls(row.values.get("tool_calls"))
    if calls and message.tool_calls and calls != message.tool_calls:
        raise DataError("the message and column 'tool_calls' have different calls; keep one")
    return replace(message, reasoning=thoughts[0] if thoughts else None, tool_calls=message.tool_calls or calls)


def _begins_with(conversation: Conversation, prompt: Conversation) -> bool:
    """Return whether a conversation begins with a prompt, system messages aside."""
    turns, start = _without_system(conversation), _without_system(prompt)
    return turns[: len(start)] == start


def _token_count(row: SourceRow, column: str, words: int) -> int:
    """Return a number of tokens; that of words where the row has none."""
    with row.locate_errors():
        number = row.number(column)
        if number is None:
            return words
        if not 0 <= number < 2**31:
            raise DataError(f"column '{column}' is {number}; expected a number of tokens")
    return int(number)


def _flatten(row: SourceRow) -> SourceRow:
    """Return a row of lm-eval's samples as a row of a prompt and a text; other rows unchanged."""
    doc, responses = row.values.get("doc"), row.values.get("filtered_resps")
    if not isinstance(doc, Mapping) or not isinstance(responses, list):
        return row
    if "prompt" not in doc or len(responses) != 1:
        raise DataError(
            f"{row.where}: a sample of lm-eval, but not of a task of `python -m bfpo.evaluation.lm_eval.pack`"
        )
    return SourceRow({"prompt": doc["prompt"], "text": responses[0]}, row.where)


def _prompt_key(conversation: Conversation) -> str:
    return conversation_key(_without_system(conversation))


def _without_system(conversation: Conversation) -> Conversation:
    return tuple(
        replace(message, content=message.content.strip())
        for message in conversation
        if message.role not in ("system", "developer")
    )


def _find_column(row: SourceRow, names: Sequence[str]) -> str:
    column = next((name for name in names if name in row.values), None)
    if column is None:
        raise DataError(f"no column {' or '.join(names)}; the columns are {', '.join(map(str, row.values))}")
    return column
