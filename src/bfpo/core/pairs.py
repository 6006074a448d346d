"""Preference pairs with safety labels, and the columns of a pair file.

**`chosen` means more helpful, not safer.** Only the labels say what is safe. They divide the pairs into four cells:
`ss` (both safe), `su` (safe chosen, unsafe rejected), `us` and `uu`.

A pair file has one JSON object per line with the columns of `COLUMNS`. A pair without label columns is unlabeled: it
can be inspected but not trained on. A single label column, or a null label, is an error.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from bfpo.core.conversation import (
    ASKING_ROLES,
    Answer,
    Conversation,
    answer_turns,
    as_answer,
    conversation_key,
    in_nfc,
    user_says,
)
from bfpo.core.files import content_hash
from bfpo.core.read_messages import as_messages
from bfpo.core.tools import FrozenJson
from bfpo.errors import DataError

Cell = Literal["ss", "su", "us", "uu"]
CELLS: tuple[Cell, ...] = get_args(Cell)
StreamName = Literal["main", "buffer"]
SIDES = ("chosen", "rejected")

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "tools",
    "chat_template_kwargs",
    "is_chosen_safe",
    "is_rejected_safe",
    "is_chosen_reasoning_safe",
    "is_rejected_reasoning_safe",
    "is_chosen_cut",
    "is_rejected_cut",
    "chosen_safety_score",
    "rejected_safety_score",
    "expected_safety",
    "chosen_win_rate",
    "rejected_win_rate",
    "reward_margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_cost",
    "rejected_cost",
    "degree_difference",
    "reward_scorer",
    "cost_scorer",
    "harm_categories",
    "stream",
    "safety_label_source",
    "dataset_name",
    "row_id",
)


class SafetyLabels(NamedTuple):
    """Safety of both answers of a pair."""

    chosen: bool
    rejected: bool

    @property
    def cell(self) -> Cell:
        """Cell of the pair, chosen answer first."""
        return CELLS[2 * (not self.chosen) + (not self.rejected)]


class CutAnswers(NamedTuple):
    """Whether each answer of a pair was cut at its maximum length: where it stops isn't where it ends."""

    chosen: bool = False
    rejected: bool = False


NOT_CUT = CutAnswers()


@dataclass(frozen=True, slots=True)
class Provenance:
    """Origin of a pair and of its labels.

    Args:
        dataset_name: Name of the data set; "" if unknown.
        safety_label_source: `dataset`, `human`, `<judge>@<revision>` or `assumed`; None without labels.
        stream: `main` (safety-labeled set) or `buffer` (helpfulness set); None until the data are prepared.
        reward_scorer: Who gave the rewards, `<judge>@<revision>`; None if unknown.
        cost_scorer: Who gave the costs.
    """

    dataset_name: str = ""
    safety_label_source: str | None = None
    stream: StreamName | None = None
    reward_scorer: str | None = None
    cost_scorer: str | None = None

    @property
    def is_judged(self) -> bool:
        """Whether the labels are those of a judge: named, or unnamed in a set of the main stream."""
        source = self.safety_label_source or "dataset"
        if source == "dataset":
            # The labels of a helpfulness set are usually assumed.
            return self.stream != "buffer"
        return source not in ("human", "assumed")


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
        chosen_reward: Reward of the chosen answer by a scorer; higher is more helpful.
        rejected_reward: Same for the rejected answer.
        chosen_cost: Cost of the chosen answer by a scorer; above 0 is unsafe.
        rejected_cost: Same for the rejected answer.
        degree_difference: Degree of the chosen answer less that of the rejected one, in [-1, 1], for two versions of
            one safe answer; see `bfpo.data.degrade`.

    Raises:
        DataError: If a number is out of its range, or one of two numbers that belong together is missing.
    """

    chosen_safety_score: float | None = None
    rejected_safety_score: float | None = None
    expected_safety: float | None = None
    chosen_win_rate: float | None = None
    rejected_win_rate: float | None = None
    reward_margin: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    chosen_cost: float | None = None
    rejected_cost: float | None = None
    degree_difference: float | None = None

    def __post_init__(self) -> None:
        for name in SIGNALS:
            value = getattr(self, name)
            if value is None:
                continue
            if name in UNBOUNDED_SIGNALS:
                if not math.isfinite(value):
                    raise DataError(f"column '{name}' is {value}; expected a finite number")
            elif name == "degree_difference":
                if not -1 <= value <= 1:
                    raise DataError(f"column '{name}' is {value}; expected a difference of shares, from -1 to 1")
            elif not 0 <= value <= 1:
                raise DataError(f"column '{name}' is {value}; expected a probability from 0 to 1")
        for first, second in PAIRED_SIGNALS:
            if (getattr(self, first) is None) != (getattr(self, second) is None):
                raise DataError(f"columns '{first}' and '{second}' go together; only one of them has a value")

    def swapped(self) -> "PairSignals":
        """Return the numbers with the two answers in the other order."""
        exchanged = {name: getattr(self, other) for pair in PAIRED_SIGNALS for name, other in (pair, pair[::-1])}
        differences = {
            name: None if (value := getattr(self, name)) is None else -value
            for name in ("reward_margin", "degree_difference")
        }
        return replace(self, **exchanged, **differences)


SIGNALS = tuple(PairSignals.__dataclass_fields__)
PAIRED_SIGNALS = tuple(
    (name, f"rejected_{name.removeprefix('chosen_')}") for name in SIGNALS if name.startswith("chosen_")
)
UNBOUNDED_SIGNALS = ("reward_margin", "chosen_reward", "rejected_reward", "chosen_cost", "rejected_cost")


@dataclass(frozen=True, slots=True)
class TemplateInputs:
    """What a chat template gets besides the messages.

    Args:
        tools: JSON schemas of the functions that the model can call; None without tools.
        kwargs: Arguments of the template, such as `enable_thinking`.
    """

    tools: FrozenJson | None = None
    kwargs: FrozenJson | None = None

    def to_row(self) -> dict[str, Any]:
        """Return the columns `tools` and `chat_template_kwargs`; one without a value is left out."""
        columns = {"tools": self.tools, "chat_template_kwargs": self.kwargs}
        return {name: json.value for name, json in columns.items() if json is not None}

    def texts(self) -> Iterator[str]:
        """Yield the JSON texts of the tools and of the arguments."""
        yield from (json.text for json in (self.tools, self.kwargs) if json is not None)

    def to_hash(self) -> object:
        """Return what `content_hash` hashes."""
        return [self.tools, self.kwargs]

    @property
    def hashed(self) -> tuple["TemplateInputs", ...]:
        """What hashes of a row contain; nothing if there are none, as in the hashes of earlier versions."""
        return () if self == NO_INPUTS else (self,)


NO_INPUTS = TemplateInputs()


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, the more helpful one first.

    Args:
        prompt: Conversation up to and including the last user turn, or the last result of a tool.
        chosen: More helpful answer; may be empty until the data are cleaned. A text, or the turns of an answer with
            reasoning, tool calls or several turns; a single plain turn becomes its text.
        rejected: Less helpful answer.
        labels: Safety of both answers; None for an unlabeled pair.
        signals: Scores, win rates and margins that some losses use.
        harm_categories: Names of the harms involved.
        provenance: Origin of the pair.
        inputs: Tools, and arguments of the chat template.
        reasoning_labels: Safety of the reasoning of both answers; None if unknown. Losses use `labels`.
        cut: Answers that were cut; no end-of-sequence token is scored after them.

    Raises:
        DataError: If the prompt doesn't end with a user turn or a result of a tool, the turns of an answer don't
            begin and end with an assistant turn, or answers that aren't both safe have degrees.
    """

    prompt: Conversation
    chosen: Answer
    rejected: Answer
    labels: SafetyLabels | None = None
    signals: PairSignals = field(default=PairSignals())
    harm_categories: tuple[str, ...] = ()
    provenance: Provenance = field(default=Provenance())
    inputs: TemplateInputs = NO_INPUTS
    reasoning_labels: SafetyLabels | None = None
    cut: CutAnswers = NOT_CUT

    def __post_init__(self) -> None:
        check_asks(self.prompt)
        for side in SIDES:
            object.__setattr__(self, side, as_answer(getattr(self, side)))
        if self.signals.degree_difference is not None and self.labels is not None and not all(self.labels):
            raise DataError(
                "column 'degree_difference' has a value, and an answer is unsafe; degrees are for versions of safe "
                "answers, because an unsafe one becomes less harmful without its key words"
            )

    @property
    def answers(self) -> tuple[Answer, Answer]:
        """Both answers, the chosen one first."""
        return self.chosen, self.rejected

    @property
    def row_id(self) -> str:
        """Hash of the texts in NFC, 16 hexadecimal digits; independent of labels and provenance."""
        return _hash_texts(self.prompt, *self.answers, inputs=self.inputs)

    @property
    def prompt_key(self) -> str:
        """Hash of the prompt that ignores case and white space; holdout and leak checks compare it."""
        return conversation_key(self.prompt)

    @property
    def cell(self) -> Cell | None:
        """Cell of the pair; None if it is unlabeled."""
        return None if self.labels is None else self.labels.cell

    def swapped(self) -> "PreferencePair":
        """Return the pair with its answers, and the labels and signals of each, in the other order."""
        labels, reasoning = (
            None if labels is None else SafetyLabels(labels.rejected, labels.chosen)
            for labels in (self.labels, self.reasoning_labels)
        )
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            labels=labels,
            reasoning_labels=reasoning,
            signals=self.signals.swapped(),
            cut=CutAnswers(self.cut.rejected, self.cut.chosen),
        )

    def texts(self) -> Iterator[str]:
        """Yield every text of the prompt and of both answers."""
        yield from _texts(self.prompt, *self.answers)

    def to_row(self) -> dict[str, Any]:
        """Return the pair as a row of a pair file; columns without a value are left out."""
        row: dict[str, Any] = {"prompt": _prompt_to_row(self.prompt)}
        # Both are texts, or both are lists of messages, as in TRL.
        if all(isinstance(answer, str) and _is_read_as_text(answer) for answer in self.answers):
            row |= {"chosen": self.chosen, "rejected": self.rejected}
        else:
            row |= {side: _turns_to_row(answer) for side, answer in zip(SIDES, self.answers, strict=True)}
        row |= self.inputs.to_row()
        if self.labels is not None:
            row["is_chosen_safe"], row["is_rejected_safe"] = self.labels
        if self.reasoning_labels is not None:
            row["is_chosen_reasoning_safe"], row["is_rejected_reasoning_safe"] = self.reasoning_labels
        cut = zip(("is_chosen_cut", "is_rejected_cut"), self.cut, strict=True)
        row |= {name: True for name, is_cut in cut if is_cut}
        row |= {name: value for name in SIGNALS if (value := getattr(self.signals, name)) is not None}
        if self.harm_categories:
            row["harm_categories"] = list(self.harm_categories)
        origin = {
            "reward_scorer": self.provenance.reward_scorer,
            "cost_scorer": self.provenance.cost_scorer,
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
        prompt: Conversation up to and including the last user turn, or the last result of a tool.
        completion: Answer to the prompt: a text, or its turns.
        dataset_name: Name of the data set; "" if unknown.
        every_turn: Whether the assistant turns of the prompt are imitated, too.
        inputs: Tools, and arguments of the chat template.

    Raises:
        DataError: As for `PreferencePair`.
    """

    prompt: Conversation
    completion: Answer
    dataset_name: str = ""
    every_turn: bool = False
    inputs: TemplateInputs = NO_INPUTS

    def __post_init__(self) -> None:
        check_asks(self.prompt)
        object.__setattr__(self, "completion", as_answer(self.completion))

    @property
    def answers(self) -> tuple[Answer]:
        """The completion, as the only answer."""
        return (self.completion,)

    @property
    def row_id(self) -> str:
        """Hash of the texts in NFC, 16 hexadecimal digits."""
        return _hash_texts(self.prompt, self.completion, inputs=self.inputs)

    @property
    def prompt_key(self) -> str:
        """Hash of the prompt that ignores case and white space."""
        return conversation_key(self.prompt)

    def texts(self) -> Iterator[str]:
        """Yield every text of the prompt and of the completion."""
        yield from _texts(self.prompt, self.completion)


def check_asks(prompt: Conversation) -> None:
    """Check that a prompt ends with a turn that a model can answer.

    Raises:
        DataError: If it doesn't.
    """
    if not prompt or prompt[-1].role not in ASKING_ROLES:
        last_role = prompt[-1].role if prompt else "nothing"
        raise DataError(f"prompt ends with {last_role}; expected it to end with a user turn or the result of a tool")


def _hash_texts(*texts: Answer, inputs: TemplateInputs) -> str:
    return content_hash(*map(in_nfc, texts), *inputs.hashed)


def _texts(prompt: Conversation, *answers: Answer) -> Iterator[str]:
    for message in (*prompt, *(turn for answer in answers for turn in answer_turns(answer))):
        yield from message.texts()


def _prompt_to_row(prompt: Conversation) -> str | list[dict[str, Any]]:
    is_text = len(prompt) == 1 and prompt[0].is_plain and prompt[0].role == "user"
    is_text = is_text and _is_read_as_text(prompt[0].content)
    return prompt[0].content if is_text else [message.to_row() for message in prompt]


def _is_read_as_text(text: str) -> bool:
    """Return whether a reader of the file gets the text back: it reads the JSON of a list of messages as messages."""
    try:
        return as_messages(text) == user_says(text)
    except DataError:
        return False


def _turns_to_row(answer: Answer) -> list[dict[str, Any]]:
    return [message.to_row() for message in answer_turns(answer)]


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
    word = str(value).strip().lower()
    if isinstance(value, float) and value.is_integer():
        # A CSV or parquet reader turns a column of 0 and 1 with gaps into floats.
        word = str(int(value))
    if value is not None and word in _LABEL_WORDS:
        return _LABEL_WORDS[word]
    got = "null" if value is None else f"{value!r} ({type(value).__name__})"
    raise DataError(f"safety label is {got}; expected true or false, 0 or 1, or one of {sorted(_LABEL_WORDS)}")
