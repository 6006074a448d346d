"""Engine that returns completions saved by another program."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bfpo.config.recipes import Source
from bfpo.core.conversation import Conversation, as_messages, conversation_key
from bfpo.core.files import content_hash, file_hash
from bfpo.core.samples import Completion, Prompt
from bfpo.data.prompt_sets import PROMPT_ALIASES
from bfpo.data.rows import SourceRow, read_rows, refuse_lone_surrogates
from bfpo.errors import DataError, Unanswered
from bfpo.generation.server_replies import read_finish_reason

_PROMPT_COLUMNS = ("prompt", "instruction", "question", "goal")
_TEXT_COLUMNS = ("text", "completion", "response", "output")
_BATCH = 256


class SavedEngine:
    """Engine that answers prompts from a file; see `Engine`.

    Args:
        path: `completions.jsonl`, or any table with a prompt (`prompt`, `instruction`, `question` or `goal`) and an
            answer (`text`, `completion`, `response` or `output`) in each row, or the samples that lm-eval writes with
            `--log_samples` for a task of `bfpo.evaluation.lm_eval.pack`. Further rows of a prompt are further
            samples. Prompts are matched without their system messages.
        name: Name of the model in completions, if the file has none.

    Raises:
        DataError: If the file is malformed, or has answers of several models.
    """

    name = "saved"

    def __init__(self, path: str, name: str) -> None:
        self._path, self._name = path, name
        self._rows: dict[str, list[SourceRow]] = {}
        self.settings_hash = content_hash("saved", file_hash(Path(path)))
        models = set()
        for row in map(_flatten, read_rows(Source(path=path))):
            with row.locate_errors():
                refuse_lone_surrogates(row)
            prompt = as_messages(row.value(_find_column(row, _PROMPT_COLUMNS)))
            row.text(_find_column(row, _TEXT_COLUMNS))
            model = row.values.get("model")
            if not isinstance(model, str | None):
                raise DataError(f"{row.where}: column 'model' is {model!r}; expected a string")
            models.add(model)
            self._rows.setdefault(_prompt_key(prompt), []).append(row)
        if len(models) > 1:
            names = ", ".join(sorted(map(str, models)))
            raise DataError(f"{path}: answers of several models ({names}); write a file for each model")

    @property
    def faults(self) -> Counter[str]:
        """Always empty: nothing is retried."""
        return Counter()

    @property
    def counts_tokens(self) -> bool:
        """Whether the file has the number of tokens of its answers; otherwise their words are counted."""
        return all("completion_tokens" in row.values for rows in self._rows.values() for row in rows)

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts in their order.

        Raises:
            Unanswered: At the end, if some are missing from the file.
        """
        keys = [_prompt_key(prompt.prompt) for prompt, _ in requests]
        saved = [
            (prompt, sample, self._find_rows(key)[sample])
            for key, (prompt, sample) in zip(keys, requests, strict=True)
            if sample < len(self._find_rows(key))
        ]
        for start in range(0, len(saved), _BATCH):
            yield [self._completion(prompt, sample, row) for prompt, sample, row in saved[start : start + _BATCH]]
        if len(saved) < len(requests):
            answered = {(prompt.prompt_id, sample) for prompt, sample, _ in saved}
            requested = [(prompt.prompt_id, sample) for prompt, sample in requests]
            failed = {key: f"not in {self._path}" for key in requested if key not in answered}
            raise Unanswered(failed, len(requests), refused=failed)

    def _find_rows(self, key: str) -> Sequence[SourceRow]:
        """Return the rows of a prompt, or of the wording that the completions of its set are published with."""
        return self._rows[key] if key in self._rows else self._rows.get(PROMPT_ALIASES.get(key, ""), [])

    def _completion(self, prompt: Prompt, sample: int, row: SourceRow) -> Completion:
        text, values = row.text(_find_column(row, _TEXT_COLUMNS)), row.values
        ending = values.get("finish_reason")
        words = sum(len(message.content.split()) for message in prompt.prompt)
        return Completion(
            prompt_id=prompt.prompt_id,
            sample=sample,
            prompt=prompt.prompt,
            text=text,
            finish_reason="refused" if ending == "refused" else read_finish_reason(ending),
            prompt_tokens=_token_count(row, "prompt_tokens") or words,
            completion_tokens=_token_count(row, "completion_tokens") or len(text.split()),
            model=str(values.get("model") or self._name),
            engine=str(values.get("engine") or self.name),
            settings_hash=self.settings_hash,
        )


def _token_count(row: SourceRow, column: str) -> int:
    """Return a number of tokens; 0 where the row has none."""
    with row.locate_errors():
        number = row.number(column) or 0
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
    return conversation_key(
        tuple(
            replace(message, content=message.content.strip()) for message in conversation if message.role != "system"
        )
    )


def _find_column(row: SourceRow, names: Sequence[str]) -> str:
    column = next((name for name in names if name in row.values), None)
    if column is None:
        raise DataError(f"{row.where}: no column {' or '.join(names)}; the columns are {', '.join(row.values)}")
    return column
