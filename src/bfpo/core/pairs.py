"""Preference pairs with safety labels, and the columns of a pair file.

**`chosen` means more helpful, not safer.** Only the labels say what is safe. They divide the pairs into four cells:
`ss` (both safe), `su` (safe chosen, unsafe rejected), `us` and `uu`.

A pair file has one JSON object per line with the columns of `COLUMNS`. A pair without label columns is unlabeled: it
can be inspected but not trained on. A single label column, or a null label, is an error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args
from unicodedata import normalize

from bfpo.core.files import content_hash
from bfpo.errors import DataError

Cell = Literal["ss", "su", "us", "uu"]
CELLS: tuple[Cell, ...] = get_args(Cell)
Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
StreamName = Literal["main", "buffer"]

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "is_chosen_safe",
    "is_rejected_safe",
    "chosen_safety_score",
    "rejected_safety_score",
    "expected_safety",
    "chosen_win_rate",
    "rejected_win_rate",
    "reward_margin",
    "harm_categories",
    "stream",
    "safety_label_source",
    "dataset_name",
    "row_id",
)


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


Conversation = tuple[Message, ...]


def user_says(text: str) -> Conversation:
    """Return the conversation of one user turn."""
    return (Message("user", text),)


def as_messages(value: object, column: str = "prompt") -> Conversation:
    """Return a conversation from a string (one user turn) or a list of chat messages.

    Args:
        value: Value of the column.
        column: Name of the column, for errors.

    Raises:
        DataError: If it is neither, is empty, or a turn has an unknown role or no text.
    """
    if isinstance(value, str):
        return user_says(value)
    if not isinstance(value, Sequence) or not value:
        raise DataError(f"column '{column}' is {value!r}; expected a string or a list of messages")
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise DataError(f"column '{column}': turn {turn!r}; expected {{'role': .., 'content': text}}")
        if turn.get("role") not in ROLES:
            raise DataError(f"column '{column}': role is {turn.get('role')!r}; expected {', '.join(ROLES)}")
        messages.append(Message(turn["role"], turn["content"]))
    return tuple(messages)


class SafetyLabels(NamedTuple):
    """Safety of both answers of a pair."""

    chosen: bool
    rejected: bool

    @property
    def cell(self) -> Cell:
        """Cell of the pair, chosen answer first."""
        return CELLS[2 * (not self.chosen) + (not self.rejected)]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Origin of a pair and of its labels.

    Args:
        dataset_name: Name of the data set; "" if unknown.
        safety_label_source: `dataset`, `human`, `<judge>@<revision>` or `assumed`; None without labels.
        stream: `main` (safety-labeled set) or `buffer` (helpfulness set); None until the data are prepared.
    """

    dataset_name: str = ""
    safety_label_source: str | None = None
    stream: StreamName | None = None


@dataclass(frozen=True, slots=True)
class PairSignals:
    """Optional numbers about a pair that some losses use besides its two labels; None if unknown.

    Args:
        chosen_safety_score: Probability in [0, 1] that the chosen answer is safe.
        rejected_safety_score: Same for the rejected answer.
        expected_safety: E_s, the mean probability in [0, 1] that an answer to this prompt is safe.
        chosen_win_rate: Probability in [0, 1] that the chosen answer is more helpful than a random one of the
            data policy.
        rejected_win_rate: Same for the rejected answer.
        reward_margin: Reward of the chosen answer minus that of the rejected one, by another objective (MODPO).

    Raises:
        DataError: If a number is out of its range, or one of two numbers that belong together is missing.
    """

    chosen_safety_score: float | None = None
    rejected_safety_score: float | None = None
    expected_safety: float | None = None
    chosen_win_rate: float | None = None
    rejected_win_rate: float | None = None
    reward_margin: float | None = None

    def __post_init__(self) -> None:
        for name in SIGNALS:
            value = getattr(self, name)
            if value is None:
                continue
            if name == "reward_margin":
                if not math.isfinite(value):
                    raise DataError(f"column '{name}' is {value}; expected a finite number")
            elif not 0 <= value <= 1:
                raise DataError(f"column '{name}' is {value}; expected a probability from 0 to 1")
        for first, second in (SIGNALS[:2], SIGNALS[3:5]):
            if (getattr(self, first) is None) != (getattr(self, second) is None):
                raise DataError(f"columns '{first}' and '{second}' go together; only one of them has a value")


SIGNALS = tuple(PairSignals.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, the more helpful one first.

    Args:
        prompt: Conversation up to and including the last user turn.
        chosen: More helpful answer (the last assistant turn); may be empty until the data are cleaned.
        rejected: Less helpful answer.
        labels: Safety of both answers; None for an unlabeled pair.
        signals: Scores, win rates and margins that some losses use.
        harm_categories: Names of the harms involved.
        provenance: Origin of the pair.

    Raises:
        DataError: If the prompt has no turns or doesn't end with a user turn.
    """

    prompt: Conversation
    chosen: str
    rejected: str
    labels: SafetyLabels | None = None
    signals: PairSignals = field(default=PairSignals())
    harm_categories: tuple[str, ...] = ()
    provenance: Provenance = field(default=Provenance())

    def __post_init__(self) -> None:
        _check_ends_with_user(self.prompt)

    @property
    def row_id(self) -> str:
        """Hash of the texts, 16 hexadecimal digits; independent of labels and provenance."""
        return content_hash(self.prompt, self.chosen, self.rejected)

    @property
    def prompt_key(self) -> str:
        """Hash of the prompt that ignores case and white space; holdout and leak checks compare it."""
        return conversation_key(self.prompt)

    @property
    def cell(self) -> Cell | None:
        """Cell of the pair; None if it is unlabeled."""
        return None if self.labels is None else self.labels.cell

    def to_row(self) -> dict[str, Any]:
        """Return the pair as a row of a pair file; columns without a value are left out."""
        is_single_turn = len(self.prompt) == 1
        row: dict[str, Any] = {
            "prompt": self.prompt[0].content if is_single_turn else [message._asdict() for message in self.prompt],
            "chosen": self.chosen,
            "rejected": self.rejected,
        }
        if self.labels is not None:
            row["is_chosen_safe"], row["is_rejected_safe"] = self.labels
        row |= {name: value for name in SIGNALS if (value := getattr(self.signals, name)) is not None}
        if self.harm_categories:
            row["harm_categories"] = list(self.harm_categories)
        origin = {
            "stream": self.provenance.stream,
            "safety_label_source": self.provenance.safety_label_source,
            "dataset_name": self.provenance.dataset_name,
            "row_id": self.row_id,
        }
        return row | {name: value for name, value in origin.items() if value}


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Prompt and completion that supervised fine-tuning imitates.

    Args:
        prompt: Conversation up to and including the last user turn.
        completion: Answer to the prompt.
        dataset_name: Name of the data set; "" if unknown.
        every_turn: Whether the assistant turns of the prompt are imitated, too.

    Raises:
        DataError: If the prompt has no turns or doesn't end with a user turn.
    """

    prompt: Conversation
    completion: str
    dataset_name: str = ""
    every_turn: bool = False

    def __post_init__(self) -> None:
        _check_ends_with_user(self.prompt)

    @property
    def row_id(self) -> str:
        """Hash of the texts, 16 hexadecimal digits."""
        return content_hash(self.prompt, self.completion)

    @property
    def prompt_key(self) -> str:
        """Hash of the prompt that ignores case and white space."""
        return conversation_key(self.prompt)


def _check_ends_with_user(prompt: Conversation) -> None:
    if not prompt or prompt[-1].role != "user":
        last_role = prompt[-1].role if prompt else "nothing"
        raise DataError(f"prompt ends with {last_role}; expected it to end with a user turn")


def prompt_key(text: str) -> str:
    """Return a hash of a prompt's words that ignores case, white space, and how accents are encoded."""
    return content_hash(" ".join(normalize("NFC", text.casefold()).split()))


def conversation_key(prompt: Conversation) -> str:
    """Return the key of a conversation; with a single turn, it is the key of the text."""
    return prompt_key(conversation_text(prompt))


def conversation_text(prompt: Conversation) -> str:
    """Return a conversation as text, with the roles if there is more than one turn."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n".join(f"{role}: {content}" for role, content in prompt)


_LABEL_WORDS: Mapping[str, bool] = {
    "1": True, "true": True, "yes": True, "safe": True,
    "0": False, "false": False, "no": False, "unsafe": False,
    # The sign of safe-rlhf: +1 is safe, -1 is unsafe.
    "+1": True, "-1": False,
}  # fmt: skip


def parse_label(value: object) -> bool:
    """Return a safety label; True means safe.

    Args:
        value: A bool, 0 or 1, -1 or +1, or one of the usual words in any case.

    Raises:
        DataError: If it is anything else, including null. Nothing is guessed: `bool("no")` is True in Python.
    """
    if isinstance(value, bool):
        return value
    # A CSV or parquet reader turns a column of 0 and 1 with gaps into floats.
    word = f"{value:g}" if isinstance(value, float) else str(value).strip().lower()
    if value is not None and word in _LABEL_WORDS:
        return _LABEL_WORDS[word]
    got = "null" if value is None else f"{value!r} ({type(value).__name__})"
    raise DataError(f"safety label is {got}; expected true or false, 0 or 1, or one of {sorted(_LABEL_WORDS)}")
