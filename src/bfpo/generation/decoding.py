"""Decoding in which a finished answer leaves the batch at once and a waiting prompt takes its place."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from bfpo.generation.sampler import Sampler
from bfpo.generation.slots import (
    PromptStates,
    SlotCache,
    SlotModel,
    UnsupportedModel,
    arguments_of,
    cache_argument,
)
from bfpo.model.lora import CausalLM, unwrap_adapter

# Prompts of equal length are encoded together up to this number of tokens.
_ENCODED_TOKENS = 512
# A shorter common prefix isn't worth the extra forward pass.
_MIN_PREFIX = 8
# On a CPU, rows are limited so that the longest answer takes at most about this time: a killed run loses it all.
_MAX_SECONDS = 60.0
_MIN_ROWS = 4
# A slow or busy core: seconds per weight to read it, and to multiply it for a row.
_READ, _MULTIPLY = 5e-10, 5e-11
# Lengths of the sequences on which decoding is compared with plain forward passes, and the decoded tokens of each.
_CHECKED, _CHECKED_STEPS = (6, 11), 4
# Allowed difference of logits, relative to their range.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_HALF = 0.05
# What a model's forward raises if it doesn't take the masks or the cache.
_FORWARD_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class DecodeRequest(NamedTuple):
    """Answer to be decoded.

    Args:
        prompt_ids: Token ids of the prompt.
        seed: Seed of the answer.
        max_new_tokens: Maximum length of the answer.
        goes_on: Function that gets the tokens so far after each token, and returns whether the answer goes on.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    goes_on: Callable[[Sequence[int]], bool] | None = None

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of prompt and answer."""
        return len(self.prompt_ids) + self.max_new_tokens


class Answer(NamedTuple):
    """Decoded answer.

    Args:
        number: Number of its request.
        token_ids: Its tokens, an end token included.
    """

    number: int
    token_ids: list[int]


@dataclass(slots=True)
class _ActiveRow:
    """Answer in progress."""

    number: int
    request: DecodeRequest
    token_ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Position of the last token, which isn't in the cache yet."""
        return len(self.request.prompt_ids) + len(self.token_ids) - 1


class Decoder:
    """Decodes requests, shortest prompts first; a prompt is encoded once for all its requests.

    Args:
        model: Causal language model in evaluation mode.
        end_ids: Tokens that end an answer.
        sampler: Chooses the tokens.
        max_tokens: Maximum number of tokens of all rows at their full length; there is at least one row.
        max_rows: Maximum number of rows; None for the limit of `max_rows`.
        shares_prefix: Whether the first tokens that all prompts have in common are encoded once.
        report: Function that gets the number of new tokens after each forward pass.

    Raises:
        UnsupportedModel: If the model can't be decoded this way.
    """

    def __init__(
        self,
        model: CausalLM,
        end_ids: Sequence[int],
        sampler: Sampler,
        *,
        max_tokens: int,
        max_rows: int | None = None,
        shares_prefix: bool = True,
        report: Callable[[int], None] = lambda count: None,
    ) -> None:
        base = unwrap_adapter(model)
        # Training extends a model's forward.
        forward = arguments_of(base)
        config = base.get_decoder().config
        attention = getattr(config, "_attn_implementation", None)
        if missing := {"position_ids", "attention_mask"} - forward:
            raise UnsupportedModel(f"its forward has no {', '.join(sorted(missing))}")
        if cache_argument(forward) is None:
            raise UnsupportedModel("its forward takes no cache")
        if base.config.is_encoder_decoder or attention not in ("sdpa", "eager"):
            raise UnsupportedModel(f"its attention is {attention}")
        self._plain_model, self._model = model, SlotModel(model, forward, config)
        self._end_ids, self._sampler, self._report = frozenset(end_ids), sampler, report
        self._max_tokens, self._max_rows, self._shares_prefix = max_tokens, max_rows, shares_prefix
        self._num_weights = base.num_parameters()
        self._is_on_cpu = base.device.type == "cpu"

    @torch.inference_mode()
    def decode(self, requests: Sequence[DecodeRequest]) -> Iterator[list[Answer]]:
        """Yield answers as they end."""
        limit = self._max_rows
        if limit is None:
            longest = max((request.max_new_tokens for request in requests), default=1)
            limit = max_rows(self._num_weights, longest) if self._is_on_cpu else len(requests)
        waiting, rows, cache = self._encode(requests), list[_ActiveRow](), SlotCache()
        upcoming = next(waiting, None)
        while rows or upcoming is not None:
            ended = []
            while upcoming is not None and self._has_room(rows, upcoming.request, limit):
                row, states, prompt = upcoming
                if self._is_ended(row):
                    ended.append(row)
                else:
                    longest = max([row.request.max_length, *(other.request.max_length for other in rows)])
                    slots = min(limit, self._max_tokens // longest)
                    cache.reserve(states, slots, longest, used=len(rows))
                    cache.put(len(rows), states, prompt)
                    rows.append(row)
                upcoming = next(waiting, None)
            ended += self._step(rows, cache)
            if ended:
                yield [Answer(row.number, row.token_ids) for row in ended]

    def _has_room(self, rows: Sequence[_ActiveRow], request: DecodeRequest, limit: int) -> bool:
        longest = max([request.max_length, *(row.request.max_length for row in rows)])
        return not rows or (len(rows) < limit and (len(rows) + 1) * longest <= self._max_tokens)

    def _encode(self, requests: Sequence[DecodeRequest]) -> Iterator["_Upcoming"]:
        """Yield rows with their first token, encoding each prompt when its first row is next."""
        order = sorted(range(len(requests)), key=lambda index: (len(requests[index].prompt_ids), requests[index][0]))
        by_prompt = [list(group) for _, group in groupby(order, lambda index: requests[index].prompt_ids)]
        prefix = self._encode_prefix([requests[indices[0]].prompt_ids for indices in by_prompt])
        waiting = deque(by_prompt)
        while waiting:
            batch = [waiting.popleft()]
            length = len(requests[batch[0][0]].prompt_ids)
            while waiting and len(requests[waiting[0][0]].prompt_ids) == length:
                if (len(batch) + 1) * length > _ENCODED_TOKENS:
                    break
                batch.append(waiting.popleft())
            states = self._model.encode([requests[indices[0]].prompt_ids for indices in batch], prefix)
            self._report(0)
            for prompt, indices in enumerate(batch):
                seeds = [requests[index].seed for index in indices]
                peek = partial(self._peek_behind_prompt, states, prompt)
                tokens = self._sampler.choose(states.logits[prompt, None], seeds, [0] * len(indices), peek)
                for index, token in zip(indices, tokens, strict=True):
                    self._report(1)
                    yield _Upcoming(_ActiveRow(index, requests[index], [token]), states, prompt)

    def _encode_prefix(self, prompts: Sequence[tuple[int, ...]]) -> PromptStates | None:
        """Return the states of the first tokens that all prompts have in common, such as a system message."""
        if len(prompts) < 2 or not self._shares_prefix:
            return None
        # Where the first and the last in alphabetical order agree, all agree. Each prompt keeps its last token, whose
        # logits are needed.
        agree = [token == other for token, other in zip(min(prompts), max(prompts), strict=False)]
        size = min([*map(len, prompts), (*agree, False).index(False) + 1]) - 1
        return self._model.encode([prompts[0][:size]]) if size >= _MIN_PREFIX else None

    def _step(self, rows: list[_ActiveRow], cache: SlotCache) -> list[_ActiveRow]:
        """Add a token to each row; remove and return the rows that end."""
        if not rows:
            return []
        logits = self._model.step(cache, [row.token_ids[-1] for row in rows], [row.position for row in rows])
        seeds, positions = [row.request.seed for row in rows], [len(row.token_ids) for row in rows]
        peek = partial(self._peek_behind_rows, cache, rows)
        for row, token in zip(rows, self._sampler.choose(logits, seeds, positions, peek), strict=True):
            row.token_ids.append(token)
        self._report(len(rows))
        ended = []
        for slot in reversed(range(len(rows))):
            if self._is_ended(rows[slot]):
                ended.append(rows[slot])
                last = rows.pop()
                if slot < len(rows):
                    cache.move(len(rows), slot, last.position)
                    rows[slot] = last
        return ended[::-1]

    def _peek_behind_prompt(
        self, states: PromptStates, prompt: int, candidates: Tensor, layers: Sequence[int]
    ) -> Tensor:
        return self._model.peek(states.select(prompt), [states.num_tokens], candidates, layers)

    def _peek_behind_rows(
        self, cache: SlotCache, rows: Sequence[_ActiveRow], candidates: Tensor, layers: Sequence[int]
    ) -> Tensor:
        lengths = [row.position + 1 for row in rows]
        return self._model.peek(cache.states(len(rows)), lengths, candidates, layers)

    def _is_ended(self, row: _ActiveRow) -> bool:
        request = row.request
        if row.token_ids[-1] in self._end_ids or len(row.token_ids) >= request.max_new_tokens:
            return True
        return request.goes_on is not None and not request.goes_on(row.token_ids)

    @torch.inference_mode()
    def check(self, token_ids: Sequence[int]) -> None:
        """Compare logits of decoding with those of plain forward passes, on two short sequences.

        Args:
            token_ids: Tokens that the sequences are made of.

        Raises:
            UnsupportedModel: If they differ by more than rounding, or the forward raises an error.
        """
        rows = [
            [token_ids[(start + index) % len(token_ids)] for index in range(length)]
            for start, length in enumerate(_CHECKED)
        ]
        try:
            decoded, plain = self._teacher_forced(rows), _plain_logits(self._plain_model, rows)
        except _FORWARD_ERRORS as error:
            reason = (str(error) or type(error).__name__).partition("\n")[0]
            raise UnsupportedModel(reason) from None
        tolerance = _TOLERANCE.get(plain.dtype, _TOLERANCE_HALF)
        difference = float((decoded - plain).abs().max() / (plain.max() - plain.min()).clamp_min(1e-30))
        # Not `difference > tolerance`, which is False for NaN.
        if not difference <= tolerance:
            raise UnsupportedModel(f"its logits change by {difference:.1g} of their range")

    def _teacher_forced(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits of the last tokens of sequences, decoded together."""
        cache, prompts = SlotCache(), [row[:-_CHECKED_STEPS] for row in rows]
        for slot, prompt in enumerate(prompts):
            prefix = self._model.encode([prompt[:slot]]) if slot else None
            states = self._model.encode([prompt], prefix)
            cache.reserve(states, len(rows), max(map(len, rows)), used=slot)
            cache.put(slot, states, 0)
        steps = []
        for step in range(_CHECKED_STEPS):
            positions = [len(prompt) + step for prompt in prompts]
            tokens = [row[position] for row, position in zip(rows, positions, strict=True)]
            steps.append(self._model.step(cache, tokens, positions))
        return torch.stack(steps, dim=1)


class _Upcoming(NamedTuple):
    """Row that can take a slot, and its encoded prompt."""

    row: _ActiveRow
    states: PromptStates
    prompt: int

    @property
    def request(self) -> DecodeRequest:
        return self.row.request


def max_rows(num_weights: int, max_new_tokens: int) -> int:
    """Return the number of rows with which a slow CPU core decodes the longest answers in a minute; at least 4.

    It depends on nothing that varies from run to run: rows that are decoded together affect each other's rounding.

    Args:
        num_weights: Number of the model's weights.
        max_new_tokens: Maximum length of the answers.
    """
    seconds_per_step = _MAX_SECONDS / max_new_tokens
    return max(_MIN_ROWS, int((seconds_per_step / num_weights - _READ) / _MULTIPLY))


def _plain_logits(model: CausalLM, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits of the last tokens of sequences, each fed alone and without a cache."""
    logits = [model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits for row in rows]
    return torch.cat([sequence[:, -_CHECKED_STEPS:] for sequence in logits])
