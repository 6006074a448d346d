"""The beginnings of a model's answers: the hidden states after each token, and how the answer was judged."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bfpo.config.recipes import LayoutSection
from bfpo.core.samples import Completion, Verdict
from bfpo.core.terminal import progress
from bfpo.data.stages import verdicts_on
from bfpo.data.table import Example
from bfpo.errors import DataError
from bfpo.generation.in_process import TransformersEngine
from bfpo.model.layout import packed_layout, packs, padded_layout
from bfpo.model.layout_check import resolve_layout
from bfpo.model.logps import add_layout_forward, completion_states

# Of a pack the states of all layers are in memory at once.
_PACK_TOKENS = 2048
_CHECKED_EXAMPLES = 4


class JudgedAnswer(NamedTuple):
    """Answer with its verdict.

    Args:
        completion: Plain text that the model sampled.
        unsafe: Whether it isn't known to be safe.
    """

    completion: Completion
    unsafe: bool


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The T beginnings of answers: each ends with another token, the last ones with the end of turn.

    Args:
        states: Hidden states after the last token, (T, layers · width).
        unsafe: 1 if the whole answer is unsafe, 0 otherwise, (T,).
        tokens: Number of tokens, from 1, (T,).
        lengths: Number of tokens of the whole answer, (T,).
        prompts: Id of the prompt, T.
    """

    states: Tensor
    unsafe: Tensor
    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    prompts: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, prompts: Sequence[str]) -> "Prefixes":
        """Return those of some prompts."""
        rows = np.flatnonzero(np.isin(self.prompts, list(prompts)))
        return Prefixes(
            self.states[rows], self.unsafe[rows], self.tokens[rows], self.lengths[rows], self.prompts[rows]
        )


def judged_answers(
    completions: Sequence[Completion], verdicts: Sequence[Verdict]
) -> tuple[list[JudgedAnswer], Counter[str]]:
    """Return the answers that a head can learn from, and how many were left out, by reason.

    An undecided verdict counts as unsafe.

    Raises:
        DataError: If an answer has no verdict, several, or one about another text, or no answer is left.
    """
    answers: list[JudgedAnswer] = []
    left_out: Counter[str] = Counter()
    for completion, verdict in zip(completions, verdicts_on(completions, verdicts, "verdicts"), strict=True):
        reason = _reason_to_leave_out(completion)
        if reason is None:
            answers.append(JudgedAnswer(completion, verdict.safe is not True))
        else:
            left_out[reason] += 1
    if not answers:
        raise DataError(f"completions: none that a head can learn from; left out: {dict(left_out)}")
    return answers, left_out


def _reason_to_leave_out(completion: Completion) -> str | None:
    if completion.guard is not None:
        return "sampled behind a guard"
    if completion.finish_reason not in ("stop", "length"):
        return "not written by the model to its end"
    return None if completion.message.is_plain else "with reasoning or tool calls"


def prefix_example(prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> Example:
    """Return answers to a prompt so that a layout reads the state after each token of each, and no other.

    A layout reads the state from which a scored token is predicted. So the first token of an answer isn't scored,
    because the prompt's last state predicts it, and a token that nothing reads follows the last.
    """
    completions = [np.array([*ids, 0], dtype=np.int32) for ids in answers]
    for completion in completions:
        completion[0] = ~completion[0]
    return Example(np.array(prompt_ids, dtype=np.int32), tuple(completions))


def read_prefixes(
    engine: TransformersEngine, answers: Sequence[JudgedAnswer], layers: Sequence[int], *, limit: int, seed: int
) -> Prefixes:
    """Run a model over answers, each prompt once, and return their beginnings.

    Args:
        engine: Engine of the model.
        answers: Answers.
        layers: As in `CostHead`.
        limit: Maximum number of beginnings that are kept, a random sample of all.
        seed: Seed of the sample.
    """
    in_order = sorted(answers, key=lambda answer: answer.completion.key)
    groups = [list(group) for _, group in groupby(in_order, lambda answer: answer.completion.prompt_id)]
    examples, ids_of = [], []
    for group in groups:
        both = [engine.tokens_of(answer.completion) for answer in group]
        # An empty answer that was cut has no token.
        ids = [answer_ids for _, answer_ids in both if answer_ids]
        ids_of += [
            (answer, len(answer_ids)) for answer, (_, answer_ids) in zip(group, both, strict=True) if answer_ids
        ]
        if ids:
            examples.append(prefix_example(both[0][0], ids))
    tokens = np.concatenate([np.arange(1, length + 1) for _, length in ids_of])
    rows = np.arange(len(tokens))
    if len(tokens) > limit:
        rows = np.sort(np.random.default_rng(seed).choice(len(tokens), size=limit, replace=False))
    lengths = np.array([length for _, length in ids_of])
    number = np.repeat(np.arange(len(lengths)), lengths)[rows]
    return Prefixes(
        states=_states(engine, examples, layers, rows),
        unsafe=torch.tensor([float(answer.unsafe) for answer, _ in ids_of])[number],
        tokens=tokens[rows],
        lengths=lengths[number],
        prompts=np.array([answer.completion.prompt_id for answer, _ in ids_of])[number],
    )


@torch.inference_mode()
def _states(
    engine: TransformersEngine, examples: Sequence[Example], layers: Sequence[int], rows: NDArray[np.int64]
) -> Tensor:
    """Return the rows of the states that the examples' layouts read, on the CPU, in the model's type."""

    def read(model: Any, layout: Any) -> Tensor:
        return completion_states(model, layout, layers)

    model: Any = engine.model
    add_layout_forward(model, read)
    longest = max(len(prompt) + max(map(len, completions)) for prompt, completions in examples)
    layout, _ = resolve_layout(model, LayoutSection(), examples[:_CHECKED_EXAMPLES], longest=longest)
    make_layout = packed_layout if layout.kind == "packed" else padded_layout
    states, start = [], 0
    with progress("reading hidden states", len(examples)) as advance:
        for pack in packs(examples, _PACK_TOKENS):
            of_pack = model(layout=make_layout(examples[pack]).to(model.device), score=read)
            first, end = np.searchsorted(rows, (start, start + len(of_pack)))
            states.append(of_pack[torch.from_numpy(rows[first:end] - start).to(of_pack.device)].cpu())
            start += len(of_pack)
            advance(len(examples[pack]))
    return torch.cat(states)
