"""Prompts, completions and verdicts, and the protocols of the engines and judges that make them.

Each stage of an evaluation reads the file of the stage before and writes its own (`prompts.jsonl`,
`completions.jsonl`, `verdicts.jsonl`; one JSON object per line), so that the same completions can be judged by
several judges. Nothing here needs torch.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

from pydantic import (
    StrictBool,
    StrictInt,
)

from bfpo.core.conversation import ASKING_ROLES, Conversation, Message
from bfpo.core.file_rows import FileRow, FiniteFloat, Messages, OptionalText, TemplateKwargs, ToolCalls, Tools
from bfpo.core.files import content_hash
from bfpo.core.guarding import GuardCounts
from bfpo.core.pairs import NO_INPUTS, TemplateInputs
from bfpo.core.reasoning import join_reasoning
from bfpo.errors import DataError

Kind = Literal["harmful", "benign", "lookalike"]
"""`lookalike`: a benign prompt that looks like a harmful one, for measuring over-refusal."""
KINDS: tuple[Kind, ...] = get_args(Kind)

FinishReason = Literal["stop", "length", "filtered", "refused", "guarded"]
"""`stop`: the model ended its turn. `length`: the answer was cut. `filtered`: the server's filter removed the answer
or its end. `refused`: the server reports a refusal of the model in place of an answer. `guarded`: a guard put its
refusal in place of an answer."""

Key = tuple[str, int]
"""`prompt_id` and `sample`: the identity of a completion among those of one model."""


@dataclass(frozen=True, slots=True)
class Prompt(FileRow):
    """Prompt for a model.

    Args:
        prompt_id: Identifier; unique in its file.
        prompt: Conversation up to and including the last user turn, or the last result of a tool.
        kind: What the prompt tests; None if unknown.
        category: Kind of harm, or of task.
        source: Name of the data set that it comes from.
        license: License of that data set.
        tools: JSON schemas of the functions that the model can call; None without tools.
        chat_template_kwargs: Arguments of the chat template.
        language: Language of the prompt, as an ISO 639-1 code; None if unknown.
        group: Identifier that variants of one prompt share; None if it is a prompt of its own.
        target_functions: Names of the tools that doing what is asked takes.
        prefill: Beginning of the answer, which the model continues; None if it begins on its own.

    Raises:
        DataError: If the kind is unknown, or the prompt doesn't end with a user turn or the result of a tool.
    """

    file_name: ClassVar[str] = "prompts.jsonl"

    prompt_id: str
    prompt: Messages
    kind: Kind | None = None
    category: str | None = None
    source: OptionalText = ""
    license: OptionalText = ""
    tools: Tools = None
    chat_template_kwargs: TemplateKwargs = None
    language: str | None = None
    group: str | None = None
    target_functions: tuple[str, ...] = ()
    prefill: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise DataError(f"prompt {self.prompt_id}: kind is {self.kind!r}; expected {', '.join(KINDS)} or null")
        if not self.prompt or self.prompt[-1].role not in ASKING_ROLES:
            raise DataError(f"prompt {self.prompt_id}: expected it to end with a user turn or the result of a tool")

    @property
    def inputs(self) -> TemplateInputs:
        """Tools, and arguments of the chat template."""
        return TemplateInputs(self.tools, self.chat_template_kwargs)


@dataclass(frozen=True, slots=True)
class Completion(FileRow):
    """Answer of a model to a prompt.

    A thought in front of the text, such as a `<think>` block, becomes the reasoning for every engine. So does a
    further one; the same text again is left out, because some servers send it apart and in the answer.

    Args:
        prompt_id: Identifier of the prompt.
        sample: Number of the completion of this prompt, from 0.
        prompt: Conversation that it answers, as in the file of prompts.
        text: Text of the answer, without special tokens and reasoning.
        finish_reason: How the answer ended.
        prompt_tokens: Length of the prompt including the chat template.
        completion_tokens: Length of the answer including the end of turn.
        model: Folder, hub id or name on a server.
        engine: Name of the engine that ran the model.
        settings_hash: Hash of everything that the text depends on besides the prompt and the sample number.
        reasoning: Thought in front of the answer; None without one.
        tool_calls: Functions that the model calls.
        tools: As in the file of prompts.
        chat_template_kwargs: As in the file of prompts.
        language: As in the file of prompts.
        guard: What a guard did for the answer; None without a guard that samples and judges.
    """

    file_name: ClassVar[str] = "completions.jsonl"

    prompt_id: str
    sample: StrictInt
    prompt: Messages
    text: str
    finish_reason: FinishReason
    prompt_tokens: StrictInt
    completion_tokens: StrictInt
    model: str
    engine: str
    settings_hash: str
    reasoning: str | None = None
    tool_calls: ToolCalls = ()
    tools: Tools = None
    chat_template_kwargs: TemplateKwargs = None
    language: str | None = None
    guard: GuardCounts | None = None

    @classmethod
    def on(cls, prompt: Prompt, sample: int, **fields: Any) -> "Completion":
        """Return a completion of a prompt, with the prompt's own columns.

        Args:
            prompt: Prompt that is answered.
            sample: Number of the completion of this prompt.
            fields: Other fields of the completion.
        """
        return cls(
            prompt.prompt_id,
            sample,
            prompt.prompt,
            tools=prompt.tools,
            chat_template_kwargs=prompt.chat_template_kwargs,
            language=prompt.language,
            **fields,
        )

    def __post_init__(self) -> None:
        reasoning, text = join_reasoning(self.reasoning, self.text)
        object.__setattr__(self, "reasoning", reasoning)
        object.__setattr__(self, "text", text)

    @property
    def key(self) -> Key:
        """Identity of the completion."""
        return self.prompt_id, self.sample

    @property
    def message(self) -> Message:
        """The answer as a turn of the conversation."""
        return Message("assistant", self.text, self.reasoning, self.tool_calls)

    @property
    def as_history(self) -> Conversation:
        """The answer as turns of a longer conversation; see `Message`."""
        return self.message.as_history

    @property
    def inputs(self) -> TemplateInputs:
        """Tools, and arguments of the chat template."""
        return TemplateInputs(self.tools, self.chat_template_kwargs)

    @property
    def is_blocked(self) -> bool:
        """Whether a server returned a refusal or nothing in place of an answer, or a guard its refusal."""
        return self.finish_reason in ("refused", "guarded") or (
            self.finish_reason == "filtered" and self.message.is_empty
        )

    @property
    def lacks_answer(self) -> bool:
        """Whether the model's reasoning ended before an answer began."""
        return self.reasoning is not None and self.message.is_empty and not self.is_blocked

    @property
    def is_unread(self) -> bool:
        """Whether a judge has no answer to read."""
        return self.is_blocked or self.lacks_answer

    @property
    def text_hash(self) -> str:
        """Hash of the text, by which a verdict states what was judged; also of reasoning and tool calls."""
        parts = (self.text,) if self.message.is_plain else (self.text, self.reasoning, self.tool_calls)
        return content_hash(*parts)[:12]


@dataclass(frozen=True, slots=True)
class Verdict(FileRow):
    """Verdict of a judge on a completion; None for what the judge doesn't assess.

    Args:
        prompt_id: Identifier of the prompt.
        sample: Number of the completion.
        text_hash: Hash of the text that was judged.
        judge: Name of the judge.
        revision: Revision of the judge; name and revision make its verdicts reproducible.
        safe: Whether the answer is safe; None if **undecided**, which never counts as safe.
        p_safe: Probability in [0, 1] that the answer is safe.
        refusal: Whether the answer is a refusal.
        p_refusal: Probability in [0, 1] that the answer is a refusal.
        helpfulness: Helpfulness from 0 to 1.
        severity: Severity of the harm, from 0 (safe) to 1.
        malformed: Whether the text isn't an answer at all.
        category: Kind of harm.
        score: Raw number of the judge, such as a cost.
        reason: Reason why the judge is undecided, or of its verdict.

    Raises:
        DataError: If it is undecided without a reason.
    """

    file_name: ClassVar[str] = "verdicts.jsonl"

    prompt_id: str
    sample: StrictInt
    text_hash: str
    judge: str
    revision: str
    safe: StrictBool | None
    p_safe: FiniteFloat | None = None
    refusal: StrictBool | None = None
    p_refusal: FiniteFloat | None = None
    helpfulness: FiniteFloat | None = None
    severity: FiniteFloat | None = None
    malformed: StrictBool | None = None
    category: str | None = None
    score: FiniteFloat | None = None
    reason: str | None = None

    @classmethod
    def on(cls, completion: Completion, judge: "Judge", *, safe: bool | None, **assessments: Any) -> "Verdict":
        """Return a judge's verdict on a completion.

        Args:
            completion: Completion that was judged.
            judge: Judge that judged it.
            safe: Whether it is safe; None if undecided.
            assessments: Other fields of the verdict.
        """
        return cls(
            completion.prompt_id,
            completion.sample,
            completion.text_hash,
            judge.name,
            judge.revision,
            safe,
            **assessments,
        )

    def __post_init__(self) -> None:
        if self.safe is None and not self.reason:
            raise DataError(f"verdict of {self.judge} on {self.prompt_id}: undecided without a reason")

    @property
    def key(self) -> Key:
        """Identity of the completion."""
        return self.prompt_id, self.sample


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled.

    Args:
        samples: Completions per prompt; at least 1.
        temperature: Temperature; 0 always takes the most likely token.
        top_p: Probability mass that tokens are sampled from, in (0, 1].
        max_new_tokens: Maximum length of a completion, in tokens.
        seed: Seed; with the prompt id and the sample number it determines a completion.

    Raises:
        DataError: If a value is out of its range.
    """

    samples: int = 1
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_valid, allowed in (
            ("samples", self.samples >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not is_valid:
                raise DataError(f"{name} is {getattr(self, name)}; expected {allowed}")


class Engine(Protocol):
    """Engine that runs a model on prompts."""

    @property
    def faults(self) -> Counter[str]:
        """Number of faults that were repaired or led to another attempt, by kind."""

    @property
    def settings_hash(self) -> str:
        """Hash of everything that a completion's text depends on besides the prompt and the sample number."""

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Yield completions in batches, in any order.

        Args:
            requests: Prompts and sample numbers.

        Raises:
            Unanswered: After all batches, if some requests failed.
        """


class Preference(NamedTuple):
    """Preference of a judge between two answers to one prompt.

    Args:
        first_is_better: 1 if the first answer is better, 0 if the second is, 0.5 if they are equal, or a probability
            in between; None if undecided.
        reason: Reason why it is undecided.
    """

    first_is_better: float | None
    reason: str | None = None


class PairJudge(Protocol):
    """Judge that compares the helpfulness of two answers to one prompt; their order may influence it."""

    @property
    def name(self) -> str:
        """Name of the judge."""

    @property
    def revision(self) -> str:
        """Revision of the judge; it changes when the same pair could get another preference."""

    def prefer(self, pairs: Sequence[tuple[Completion, Completion]]) -> Iterator[Preference]:
        """Yield a preference for each pair, in the order of the pairs."""


class Judge(Protocol):
    """Judge of single completions: whether they are safe, and other properties."""

    @property
    def name(self) -> str:
        """Name of the judge."""

    @property
    def revision(self) -> str:
        """Revision of the judge; it changes when the same completion could get another verdict."""

    def judge(self, completions: Sequence[Completion]) -> Iterable[Verdict]:
        """Return a verdict for each completion, in the order of the completions."""


def prompt_id(prompt: Conversation, inputs: TemplateInputs = NO_INPUTS) -> str:
    """Return a hash of a prompt and its tools, which is its id if its source has none."""
    return content_hash(prompt, *inputs.hashed)[:12]


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Return the 63-bit seed of a completion."""
    digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
