"""Decoding in whole batches by transformers' `generate`, for models whose cache can't be edited."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bfpo.generation.decoding import Answer, DecodeRequest, max_rows
from bfpo.generation.sampler import Sampler
from bfpo.model.lora import CausalLM


class WholeBatches:
    """Decodes requests in batches of similar length, padded on the left; a batch ends with its longest answer.

    Args:
        model: Causal language model in evaluation mode.
        end_ids: Tokens that end an answer.
        sampler: Chooses the tokens.
        pad_id: Token for padding.
        max_tokens: Maximum number of tokens of a batch at its full length; a batch has at least one row.
        report: Function that gets the number of new tokens after each forward pass.
    """

    def __init__(
        self,
        model: CausalLM,
        end_ids: Sequence[int],
        sampler: Sampler,
        *,
        pad_id: int,
        max_tokens: int,
        report: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._model, self._end_ids, self._pad_id = model, list(end_ids), pad_id
        self._sampler, self._max_tokens, self._report = sampler, max_tokens, report

    def decode(self, requests: Sequence[DecodeRequest]) -> Iterator[list[Answer]]:
        """Yield the answers of one batch after another, shortest prompts first."""
        limit = len(requests)
        if self._model.device.type == "cpu":
            longest = max(request.max_new_tokens for request in requests)
            limit = max_rows(self._model.num_parameters(), longest)
        batch: list[int] = []
        for index in sorted(range(len(requests)), key=lambda index: len(requests[index].prompt_ids)):
            # Prompts come shortest first, so this row is the longest of the batch.
            is_full = len(batch) == limit or (len(batch) + 1) * requests[index].max_length > self._max_tokens
            if batch and is_full:
                yield self._decode_batch(batch, [requests[i] for i in batch])
                batch = []
            batch.append(index)
        if batch:
            yield self._decode_batch(batch, [requests[i] for i in batch])

    @torch.inference_mode()
    def _decode_batch(self, indices: Sequence[int], requests: Sequence[DecodeRequest]) -> list[Answer]:
        model: Any = self._model
        width = max(len(request.prompt_ids) for request in requests)
        padding = [width - len(request.prompt_ids) for request in requests]
        prompts = [
            [self._pad_id] * size + list(request.prompt_ids) for size, request in zip(padding, requests, strict=True)
        ]
        masks = [[0] * size + [1] * (width - size) for size in padding]
        chooser = _Chooser(self._sampler, [request.seed for request in requests], width, self._report)
        # transformers takes settings that the given config leaves open (repetition penalty, top-k) from the model's
        # own config, so the model's own config is replaced during generation.
        own_config = model.generation_config
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(request.max_new_tokens for request in requests),
            eos_token_id=self._end_ids,
            pad_token_id=self._pad_id,
        )
        try:
            output = model.generate(
                torch.tensor(prompts, device=model.device),
                attention_mask=torch.tensor(masks, device=model.device),
                logits_processor=LogitsProcessorList([chooser]),
            )
        finally:
            model.generation_config = own_config
        assert isinstance(output, Tensor)
        rows = zip(indices, requests, output[:, width:].tolist(), strict=True)
        return [Answer(index, self._cut(token_ids[: request.max_new_tokens])) for index, request, token_ids in rows]

    def _cut(self, token_ids: list[int]) -> list[int]:
        """Return the tokens up to the first end token: padding follows it."""
        end = next((index for index, token in enumerate(token_ids) if token in self._end_ids), len(token_ids))
        return token_ids[: end + 1]


class _Chooser(LogitsProcessor):
    """Logits processor that makes the next token the one that a sampler chooses.

    Args:
        sampler: The sampler.
        seeds: Seeds of the rows.
        width: Number of tokens before the answers.
        report: Function that gets the number of new tokens.
    """

    def __init__(self, sampler: Sampler, seeds: Sequence[int], width: int, report: Callable[[int], None]) -> None:
        self._sampler, self._seeds, self._width, self._report = sampler, seeds, width, report

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores whose largest one is the next token."""
        self._report(len(self._seeds))
        return self._sampler.perturb(scores, self._seeds, [input_ids.shape[1] - self._width] * len(self._seeds))
