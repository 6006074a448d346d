"""Running an attack of several turns: the requests of a turn depend on the replies before it, which are on disk."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from bfpo.core import refusals
from bfpo.core.conversation import Conversation
from bfpo.core.files import content_hash, file_name, read_repaired_jsonl, write_jsonl
from bfpo.core.languages import answer_language
from bfpo.core.samples import Completion, Engine, Key, Prompt
from bfpo.data.rows import SourceRow
from bfpo.data.stages import generate_most
from bfpo.errors import DataError
from bfpo.generation.attacks import Attack, Dialogue

TURNS = "turns.jsonl"
Outcome = Literal["answered", "unread", "refused", "no answer"]
"""`answered`: the reply stays in the conversation. `unread`: it stays too, but is in a language without measured
refusal markers. `refused` and `no answer`: the exchange is dropped."""


@dataclass(frozen=True, slots=True)
class AttackTurn:
    """A reply of the model under attack.

    Args:
        original_id: Identifier of the attacked prompt.
        original_sample: Number of the conversation about it, from 0.
        turn: Number of the turn, from 1.
        is_fallback: Whether the first wording of the turn was refused.
        outcome: Whether the exchange stays in the conversation, and why.
        completion: The reply; its prompt is the conversation up to it, with an id of its own.
    """

    original_id: str
    original_sample: int
    turn: int
    is_fallback: bool
    outcome: Outcome
    completion: Completion

    @property
    def original_key(self) -> Key:
        """Identity of the conversation."""
        return self.original_id, self.original_sample

    @property
    def is_kept(self) -> bool:
        """Whether the exchange stays in the conversation."""
        return self.outcome in ("answered", "unread")

    def answering(self, original: Conversation) -> Completion:
        """Return the reply as an answer to the attacked prompt, which judges read instead of the conversation."""
        return replace(self.completion, prompt=original)

    def to_row(self) -> dict[str, Any]:
        """Return the turn as a row: the columns of the completion, and those of the attack."""
        names = ("original_id", "original_sample", "turn", "is_fallback", "outcome")
        return {name: getattr(self, name) for name in names} | self.completion.to_row()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "AttackTurn":
        """Return the turn that a row describes.

        Raises:
            DataError: If a column is missing or has a value of another type.
        """
        kinds = {"original_id": str, "original_sample": int, "turn": int, "is_fallback": bool}
        for name, kind in kinds.items():
            if type(row.get(name)) is not kind:
                raise DataError(f"column '{name}' is {row.get(name)!r}; expected {kind.__name__}")
        if row.get("outcome") not in get_args(Outcome):
            raise DataError(f"column 'outcome' is {row.get('outcome')!r}; expected {', '.join(get_args(Outcome))}")
        values = {name: row[name] for name in (*kinds, "outcome")}
        return cls(**values, completion=Completion.from_row(row))


class AttackRun(NamedTuple):
    """Outcome of an attack on prompts.

    Args:
        name: Name and hash of the attack, `LABEL@HASH`.
        folder: Folder of its files.
        num_turns: Maximum number of turns.
        turns: Replies, prompt by prompt and turn by turn.
        missing: Reasons of the conversations without a result, by prompt id.
        counts: Number of refused and unread replies, and of the attacker's failures.
        unattacked: Those prompts of `missing` to which the attacker wrote nothing; it would write nothing again.
    """

    name: str
    folder: Path
    num_turns: int
    turns: list[AttackTurn]
    missing: dict[str, str]
    counts: Counter[str]
    unattacked: frozenset[str] = frozenset()


def attack_folder(out: Path, name: str) -> Path:
    """Return the folder of an attack's files.

    Args:
        out: Folder of the evaluation or the red-team run.
        name: `LABEL@HASH`.
    """
    label, _, revision = name.rpartition("@")
    return out / f"attack-{file_name(label)}@{revision}"


def run_attack(
    attack: Attack, engine: Engine, prompts: Sequence[Prompt], out: Path, *, samples: int = 1
) -> AttackRun:
    """Attack a model with conversations about prompts; a second call resumes, also within a turn.

    The model answers at most two requests for each turn: a refused exchange is dropped from the conversation, and the
    turn's fallback tried once.

    Args:
        attack: The attack.
        engine: Model under attack.
        prompts: Prompts with unique ids.
        out: Folder in which the attack's folder is.
        samples: Number of conversations per prompt.

    Raises:
        DataError: If the folder has replies of another model or other settings.
    """
    name = f"{attack.label}@{attack.settings_hash[:8]}"
    folder = attack_folder(out, name)
    dialogues = [Dialogue(prompt, sample) for prompt in prompts for sample in range(samples)]
    turns: dict[Key, list[AttackTurn]] = {dialogue.key: [] for dialogue in dialogues}
    missing: dict[str, str] = {}
    for number in range(1, attack.num_turns + 1):
        pending = [
            dialogue for dialogue in dialogues if dialogue.ended is None and dialogue.prompt.prompt_id not in missing
        ]
        for is_fallback in (False, True):
            if not pending:
                break
            replies, failed = _take_turn(attack, engine, pending, number, is_fallback, folder)
            missing |= failed
            refused = []
            for dialogue, reply in replies:
                turns[dialogue.key].append(reply)
                if not reply.is_kept:
                    refused.append(dialogue)
            pending = refused
    ended = {
        dialogue.prompt.prompt_id: dialogue.ended or "no reply" for dialogue in dialogues if not turns[dialogue.key]
    }
    unattacked = ended.keys() - missing.keys()
    missing = ended | missing
    finished = [
        turn for dialogue in dialogues if dialogue.prompt.prompt_id not in missing for turn in turns[dialogue.key]
    ]
    write_jsonl(folder / TURNS, (turn.to_row() for turn in finished))
    counts = attack.counts + Counter(f"reply {turn.outcome}" for turn in finished)
    return AttackRun(name, folder, attack.num_turns, finished, missing, counts, frozenset(unattacked))


def read_turns(folder: Path) -> list[AttackTurn]:
    """Read the replies of a finished attack; none if the folder has none.

    Raises:
        DataError: If a row is malformed.
    """
    turns = []
    for number, row in enumerate(read_repaired_jsonl(folder / TURNS), start=1):
        with SourceRow(row, f"{folder / TURNS} row {number}").locate_errors():
            turns.append(AttackTurn.from_row(row))
    return turns


def by_conversation(turns: Iterable[AttackTurn]) -> dict[Key, list[AttackTurn]]:
    """Return the replies of each conversation, in their order."""
    conversations: dict[Key, list[AttackTurn]] = {}
    for turn in turns:
        conversations.setdefault(turn.original_key, []).append(turn)
    return conversations


def _take_turn(
    attack: Attack, engine: Engine, dialogues: Sequence[Dialogue], number: int, is_fallback: bool, folder: Path
) -> tuple[list[tuple[Dialogue, AttackTurn]], dict[str, str]]:
    """Run one turn of each dialogue.

    Returns:
        The replies; and the reason of each prompt whose request failed, by id.
    """
    written = attack.write(dialogues, number, is_fallback=is_fallback, folder=folder)
    reasons = {dialogue.prompt.prompt_id: dialogue.failed for dialogue in dialogues if dialogue.failed is not None}
    requests: dict[str, tuple[Dialogue, Conversation, Prompt]] = {}
    for dialogue, messages in zip(dialogues, written, strict=True):
        if messages is not None:
            conversation = (*dialogue.conversation, *messages)
            # An id of its own for every conversation, so that each has noise of its own.
            request_id = content_hash("attack", *dialogue.key, number, is_fallback, conversation)[:12]
            request = replace(dialogue.prompt, prompt_id=request_id, prompt=conversation, prefill=attack.prefill)
            requests[request_id] = dialogue, messages, request
    if not requests:
        return [], reasons
    path = folder / f"turn-{number}{'-fallback' if is_fallback else ''}.jsonl"
    prompts = [request for _, _, request in requests.values()]
    completions, failed = generate_most(engine, prompts, path, max_unanswered=len(prompts))
    replies = []
    for completion in completions:
        dialogue, messages, _ = requests[completion.prompt_id]
        outcome = read_outcome(completion)
        turn = AttackTurn(*dialogue.key, number, is_fallback, outcome, completion)
        if turn.is_kept:
            dialogue.exchanges += [*messages, *completion.as_history]
        dialogue.refused = None if turn.is_kept else messages[0].content
        replies.append((dialogue, turn))
    reasons |= {requests[name][0].prompt.prompt_id: f"turn {number}: {reason}" for name, reason in failed.items()}
    return replies, reasons


def read_outcome(completion: Completion) -> Outcome:
    """Return the outcome of an exchange with this reply, by refusal markers."""
    if completion.is_blocked:
        return "refused"
    if completion.message.is_empty:
        return "no answer"
    refuses = refusals.is_refusal(completion.text, answer_language(completion.text, completion.language))
    if refuses is None:
        return "unread"
    # A call is an answer, also after a text that starts like a refusal.
    return "refused" if refuses and not completion.tool_calls else "answered"
