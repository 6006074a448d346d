"""An engine that hands over answers which another program saved."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bfpo.config.recipes import Source
from bfpo.core.files import content_hash, file_hash
from bfpo.core.pairs import Conversation, as_messages, conversation_key
from bfpo.core.samples import Completion, Prompt
from bfpo.data.rows import SourceRow, read_rows
from bfpo.errors import DataError, Unanswered

_PROMPT = ("prompt", "instruction", "question", "goal")
_ANSWER = ("text", "completion", "response", "output")
_BATCH = 256


class SavedEngine:
    """Answers prompts with what stands in a file; see `Engine`.

    Args:
        path: `completions.jsonl`, or any table with a prompt and an answer in each row: the columns `prompt`,
            `instruction`, `question` or `goal`, and `text`, `completion`, `response` or `output`. Further rows of a
            prompt are further samples. System messages don't take part in finding a prompt. Or what lm-eval writes of
            a task of `bfpo.evaluation.lm_eval.pack` with `--log_samples`.
        name: What completions call the model, where the file doesn't.

    Raises:
        DataError: If the file is malformed, or holds answers of several models.
    """

    name = "saved"

    def __init__(self, path: str, name: str) -> None:
        self._path, self._name = path, name
        self._answers: dict[str, list[SourceRow]] = {}
        self.settings_hash = content_hash("saved", file_hash(Path(path)))
        models = set()
        for row in map(_plain, read_rows(Source(path=path))):
            prompt = as_messages(row.value(_column(row, _PROMPT)))
            row.text(_column(row, _ANSWER))
            models.add(row.values.get("model"))
            self._answers.setdefault(_key(prompt), []).append(row)
        if len(models) > 1:
            several = ", ".join(sorted(map(str, models)))
            raise DataError(f"{path}: answers of several models ({several}); make a file of each")

    @property
    def faults(self) -> Counter[str]:
        """Nothing is asked twice."""
        return Counter()

    @property
    def counts_tokens(self) -> bool:
        """Whether the file says how long its answers are; else their words are counted."""
        return all("completion_tokens" in row.values for rows in self._answers.values() for row in rows)

    def generate(self, wanted: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts in their order.

        Raises:
            Unanswered: At the end, if the file lacks some of them.
        """
        there = [one for one in wanted if one[1] < len(self._answers.get(_key(one[0].prompt), ()))]
        for start in range(0, len(there), _BATCH):
            yield [self._completion(prompt, sample) for prompt, sample in there[start : start + _BATCH]]
        if len(there) < len(wanted):
            had = {(prompt.prompt_id, sample) for prompt, sample in there}
            keys = [(prompt.prompt_id, sample) for prompt, sample in wanted]
            failed = {key: f"not in {self._path}" for key in keys if key not in had}
            raise Unanswered(failed, len(wanted), refused=failed)

    def _completion(self, prompt: Prompt, sample: int) -> Completion:
        row = self._answers[_key(prompt.prompt)][sample]
        text, values = row.text(_column(row, _ANSWER)), row.values
        words = sum(len(message.content.split()) for message in prompt.prompt)
        return Completion(
            prompt_id=prompt.prompt_id,
            sample=sample,
            prompt=prompt.prompt,
            text=text,
            finish_reason="length" if values.get("finish_reason") == "length" else "stop",
            prompt_tokens=int(values.get("prompt_tokens") or words),
            completion_tokens=int(values.get("completion_tokens") or len(text.split())),
            model=str(values.get("model") or self._name),
            engine=str(values.get("engine") or self.name),
            settings_hash=self.settings_hash,
        )


def _plain(row: SourceRow) -> SourceRow:
    """Return a row of lm-eval's samples with a prompt and an answer; any other as it is."""
    doc, answers = row.values.get("doc"), row.values.get("filtered_resps")
    if not isinstance(doc, Mapping) or not isinstance(answers, list):
        return row
    if "prompt" not in doc or len(answers) != 1:
        raise DataError(
            f"{row.where}: of lm-eval, but of no task that `python -m bfpo.evaluation.lm_eval.pack` holds"
        )
    return SourceRow({"prompt": doc["prompt"], "text": answers[0]}, row.where)


def _key(conversation: Conversation) -> str:
    return conversation_key(
        tuple(
            message._replace(content=message.content.strip()) for message in conversation if message.role != "system"
        )
    )


def _column(row: SourceRow, names: Sequence[str]) -> str:
    found = next((name for name in names if name in row.values), None)
    if found is None:
        raise DataError(f"{row.where}: no column {' or '.join(names)}; the columns are {', '.join(row.values)}")
    return found
