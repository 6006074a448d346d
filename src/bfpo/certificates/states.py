"""Hidden states that a head reads: of paraphrases in several precisions, and of answers. They are kept on disk."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bfpo.certificates.recipe import Precision
from bfpo.core.files import content_hash, open_atomic
from bfpo.core.samples import Completion, Prompt
from bfpo.core.terminal import progress, warn
from bfpo.errors import DataError, ModelError
from bfpo.model.cost_head import CostHead
from bfpo.model.hidden_states import hidden_states
from bfpo.model.lora import CausalLM
from bfpo.model.vocabulary import check_token_ids


@dataclass(frozen=True, slots=True, eq=False)
class HeadedModel:
    """A head, and the model whose hidden states it reads.

    Args:
        head: The head.
        head_path: Its file, or its folder.
        model: The model, in evaluation mode.
        path: Folder or hub id of the model.
        identity: Hash or name of its content.
        encode: Function that returns the tokens of a completion's prompt and of its text.
    """

    head: CostHead
    head_path: str
    model: CausalLM
    path: str
    identity: str
    encode: Callable[[Completion], tuple[list[int], list[int]]]

    def tokens_of(self, completion: Completion) -> tuple[list[int], list[int]]:
        """Return the tokens of a completion's prompt and of its text.

        Raises:
            DataError: If they exceed the model's positions.
            ModelError: If the model has no embedding for one.
        """
        prompt_ids, answer_ids = self.encode(completion)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        count = len(prompt_ids) + len(answer_ids)
        if positions is not None and count > positions:
            raise DataError(
                f"prompt '{completion.prompt_id}' with its answer has {count} tokens, and {self.path} has "
                f"{positions} positions; shorten or remove it"
            )
        check_token_ids(self.model.config, [[*prompt_ids, *answer_ids]], self.path)
        return prompt_ids, answer_ids


class StateStore:
    """Hidden states of a model, computed once and kept in a folder.

    Args:
        headed: The model, and the head whose layers are read.
        folder: Folder of the files; each is named by a hash of what its states depend on.
    """

    def __init__(self, headed: HeadedModel, folder: Path) -> None:
        self._headed, self._folder = headed, folder

    def of_prompts(self, prompts: Sequence[Prompt], answer: str) -> Tensor:
        """Return the states at the last token of prompts that are followed by a text, (prompts, width)."""
        return self._at_ends(self._headed.model, prompts, answer, str(self._headed.model.dtype))

    def in_precisions(
        self, prompts: Sequence[Prompt], answer: str, precisions: Sequence[Precision]
    ) -> dict[str, Tensor]:
        """Return the same states with the weights of the model in several precisions.

        A precision in which the model doesn't run here is left out, with a warning.

        Raises:
            ModelError: If fewer than two are left.
        """
        states: dict[str, Tensor] = {}
        for precision in dict.fromkeys(precisions):
            try:
                states[precision] = self._at_ends(
                    _in_precision(self._headed.model, precision), prompts, answer, precision
                )
            except (RuntimeError, NotImplementedError) as error:
                reason = str(error).strip().partition("\n")[0]
                warn(f"the model doesn't run here in {precision}, which is left out: {reason}")
        if len(states) < 2:
            raise ModelError(
                f"boxes.precisions: {self._headed.path} runs here in {', '.join(states) or 'none'} of "
                f"{', '.join(precisions)}; a hull needs two precisions"
            )
        return states

    def of_answers(self, completions: Sequence[Completion]) -> list[Tensor]:
        """Return the states after each token of answers, (tokens, width) for each."""
        tokens = [self._headed.tokens_of(completion) for completion in completions]

        def read(number: int) -> Tensor:
            prompt_ids, answer_ids = tokens[number]
            states = hidden_states(self._headed.model, [*prompt_ids, *answer_ids], self._headed.head.layers)
            return states[len(prompt_ids) :]

        states = self._load_or_compute("reading answers", [str(self._headed.model.dtype), tokens], len(tokens), read)
        return list(states.split([len(answer_ids) for _, answer_ids in tokens]))

    def _at_ends(self, model: CausalLM, prompts: Sequence[Prompt], answer: str, precision: str) -> Tensor:
        rows = [[*prompt_ids, *answer_ids] for prompt_ids, answer_ids in map(self._tokens(answer), prompts)]
        return self._load_or_compute(
            f"reading paraphrases in {precision.removeprefix('torch.')}",
            [precision, rows],
            len(rows),
            lambda number: hidden_states(model, rows[number], self._headed.head.layers)[-1:],
        )

    def _tokens(self, answer: str) -> Callable[[Prompt], tuple[list[int], list[int]]]:
        """Return a function from a prompt to its tokens and those of the beginning of an answer."""
        path = self._headed.path
        return lambda prompt: self._headed.tokens_of(
            Completion.on(
                prompt,
                0,
                text=answer,
                finish_reason="length",
                prompt_tokens=0,
                completion_tokens=0,
                model=path,
                engine="",
                settings_hash="",
            )
        )

    def _load_or_compute(self, what: str, depends_on: object, count: int, read: Callable[[int], Tensor]) -> Tensor:
        key = content_hash(self._headed.identity, self._headed.head.layers, depends_on)
        path = self._folder / f"{key}.safetensors"
        if path.is_file():
            return load_file(path)["states"]
        states = torch.cat(list(_with_progress(what, count, read)))
        if not bool(states.isfinite().all()):
            raise ModelError(
                f"{self._headed.path}: {what}: some hidden states aren't finite, so no box contains them"
            )
        with open_atomic(path) as file:
            file.write(save({"states": states.contiguous()}))
        return states


def _with_progress(what: str, count: int, read: Callable[[int], Tensor]) -> Iterable[Tensor]:
    with progress(what, count) as advance:
        for number in range(count):
            yield read(number)
            advance(1)


def _in_precision(model: CausalLM, precision: Precision) -> CausalLM:
    """Return a copy of a model with its weights in another precision.

    int8 is simulated: the weights of each linear layer but the head are rounded to multiples of max|w| / 127 of their
    output, as weight-only quantization does, and computed with in float32.

    Raises:
        NotImplementedError: If weights of int8 are in fused layers, which aren't simulated.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    copied: CausalLM = nn.Module.to(deepcopy(model), dtype)
    if precision == "int8":
        head = copied.get_output_embeddings()
        if fused := [name for name, parameter in copied.named_parameters() if parameter.dim() > 2]:
            raise NotImplementedError(f"int8 isn't simulated for fused layers such as {fused[0]}")
        with torch.no_grad():
            for module in copied.modules():
                if isinstance(module, nn.Linear | Conv1D) and module is not head:
                    # Weights of a Conv1D, as in GPT-2, are (inputs, outputs).
                    inputs = 1 if isinstance(module, nn.Linear) else 0
                    step = module.weight.abs().amax(dim=inputs, keepdim=True).clamp_min(1e-12) / 127
                    module.weight.copy_((module.weight / step).round() * step)
    return copied
