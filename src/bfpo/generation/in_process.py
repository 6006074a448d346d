"""The `transformers` engine: a model in this process, sampled so that batching doesn't matter."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from bfpo.config.recipes import ModelSection
from bfpo.core.files import content_hash, file_hash
from bfpo.core.samples import Completion, Key, Prompt, Sampling, sample_seed
from bfpo.errors import ModelError, RecipeError, Unanswered, did_you_mean
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.lora import CausalLM
from bfpo.model.merge import DTYPES

# What a checkpoint's answers depend on; README, training state and evaluation stand beside it.
_CHECKPOINT_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "tokenizer*", "*.jinja")


class TransformersEngine:
    """Runs a model in this process: batched by length, padded on the left, with a key-value cache.

    A completion depends on the model, its prompt, the sample's number and the seed, and on nothing else: the noise
    is drawn per prompt, sample and position. (In float32 a batch of another shape rounds differently, which can tip
    a near tie; in float64 results are the same in any batch.) Of the checkpoint's generation config only the tokens
    that end a turn are used: temperature and top-p are the sampling's, and nothing else shapes the distribution.

    Args:
        model: A causal language model.
        tokenizer: With a chat template.
        sampling: How to sample.
        name: What completions call the model.
        identity: What the model is, for the settings' hash: the content of its files.
        max_batch_tokens: Largest prompts + answers of a batch, in tokens; one completion is always taken.

    Raises:
        ModelError: If the tokenizer has no chat template, or no token that ends a turn.
    """

    name = "transformers"

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        name: str,
        identity: str,
        max_batch_tokens: int = 16384,
    ) -> None:
        if tokenizer.chat_template is None:
            raise ModelError(f"{name} has no chat template: it can't be asked anything")
        self.model, self.tokenizer, self.sampling = model.eval(), tokenizer, sampling
        self.model_name, self._identity = name, identity
        self._max_batch_tokens = max_batch_tokens
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        self._ends: list[int] = sorted(int(end) for end in found if end is not None)
        if not self._ends:
            raise ModelError(f"{name}: neither the tokenizer nor the generation config says what ends a turn")

    @property
    def faults(self) -> Counter[str]:
        """Nothing is asked twice."""
        return Counter()

    @property
    def settings_hash(self) -> str:
        """Hash of model, template, ends and sampling; the number of samples doesn't enter, so more can be added."""
        sampling = self.sampling
        settings = (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed)
        # The tokenizer's own end is in the identity; only other ends (of the generation config) say more.
        ends = () if self._ends == [self.tokenizer.eos_token_id] else (self._ends,)
        dtype, template = str(self.model.dtype), self.tokenizer.chat_template
        return content_hash(self.name, self._identity, dtype, template, settings, *ends)

    def generate(self, wanted: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts, shortest first; see `Engine`.

        Raises:
            Unanswered: At the end, if prompts with the longest answer don't fit into the model's positions.
        """
        ids = [self._prompt_ids(prompt) for prompt, _ in wanted]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        most = None if limit is None else limit - self.sampling.max_new_tokens
        # A prompt of many samples is told once for each: what isn't had is counted in completions.
        failed: dict[Key, str] = {
            (prompt.prompt_id, sample): f"prompt too long for the model's {limit} positions "
            f"with {self.sampling.max_new_tokens} new tokens"
            for (prompt, sample), one in zip(wanted, ids, strict=True)
            if most is not None and len(one) > most
        }
        fits = (index for index, one in enumerate(ids) if most is None or len(one) <= most)
        order = sorted(fits, key=lambda index: len(ids[index]))
        batch: list[int] = []
        for index in order:
            # Prompts come shortest first, so this one would be the batch's longest.
            longest = len(ids[index]) + self.sampling.max_new_tokens
            if batch and (len(batch) + 1) * longest > self._max_batch_tokens:
                yield self._answer([wanted[i] for i in batch], [ids[i] for i in batch])
                batch = []
            batch.append(index)
        if batch:
            yield self._answer([wanted[i] for i in batch], [ids[i] for i in batch])
        if failed:
            raise Unanswered(failed, len(wanted), refused=failed)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        messages = [message._asdict() for message in prompt.prompt]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(str(text), add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def _answer(self, wanted: Sequence[tuple[Prompt, int]], ids: Sequence[list[int]]) -> list[Completion]:
        device = next(self.model.parameters()).device
        width = max(map(len, ids))
        padding = self.tokenizer.pad_token_id
        padding = self._ends[0] if padding is None else padding
        inputs = torch.tensor([[padding] * (width - len(one)) + one for one in ids], device=device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids], device=device)
        # transformers fills what a given config leaves open from the model's own (a repetition penalty, top-k):
        # so the model's own is replaced while it answers.
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=self._ends,
            pad_token_id=padding,
        )
        try:
            output = self.model.generate(
                inputs,
                attention_mask=mask,
                logits_processor=self._processors([(prompt.prompt_id, sample) for prompt, sample in wanted]),
            )
        finally:
            self.model.generation_config = own
        assert isinstance(output, Tensor)
        return [
            self._completion(prompt, sample, one, new)
            for (prompt, sample), one, new in zip(wanted, ids, output[:, width:].tolist(), strict=True)
        ]

    def _processors(self, keys: Sequence[tuple[str, int]]) -> LogitsProcessorList:
        sampling = self.sampling
        if sampling.temperature == 0:
            return LogitsProcessorList()
        processors: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        return LogitsProcessorList([*processors, SeededNoise([sample_seed(sampling.seed, *key) for key in keys])])

    def _completion(self, prompt: Prompt, sample: int, prompt_ids: list[int], new: list[int]) -> Completion:
        end = next((index for index, token in enumerate(new) if token in self._ends), None)
        answer = new if end is None else new[:end]
        return Completion(
            prompt_id=prompt.prompt_id,
            sample=sample,
            prompt=prompt.prompt,
            text=str(self.tokenizer.decode(answer, skip_special_tokens=True)),
            finish_reason="length" if end is None else "stop",
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(answer) + (end is not None),
            model=self.model_name,
            engine=self.name,
            settings_hash=self.settings_hash,
        )


class SeededNoise(LogitsProcessor):
    """Adds Gumbel noise, so that the likeliest token of the sum is a sample of the distribution.

    Every row draws from its own generator, one vector per position: the row's noise is the same in any batch.

    Args:
        seeds: One per row.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores plus noise, (rows, vocabulary) float64."""
        noise = torch.empty(scores.shape, dtype=torch.float64)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.double() - noise.log().to(scores.device)


def load_engine(
    path: str, sampling: Sampling, *, dtype: str = "float32", revision: str | None = None
) -> TransformersEngine:
    """Load a checkpoint to ask it.

    Args:
        path: Folder or hub id of a model or an adapter.
        sampling: How to sample.
        dtype: Of the weights.
        revision: Hub revision.

    Raises:
        RecipeError: If the type is unknown.
        ModelError: If it can't be loaded or asked.
    """
    model, tokenizer, identity = load_checkpoint(path, dtype=dtype, revision=revision)
    return TransformersEngine(model, tokenizer, sampling, name=path, identity=identity)


def load_checkpoint(path: str, *, dtype: str, revision: str | None) -> tuple[CausalLM, PreTrainedTokenizerBase, str]:
    """Return a checkpoint's model, on the GPU if there is one, its tokenizer, and what names its content.

    Raises:
        RecipeError: If the type is unknown.
        ModelError: If it can't be loaded.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype '{dtype}'; {did_you_mean(dtype, list(DTYPES))}")
    section = ModelSection.model_validate({"path": path, "dtype": dtype, "revision": revision})
    model, tokenizer = load_model(section), load_tokenizer(section)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer, checkpoint_identity(path, revision)


def checkpoint_identity(path: str, revision: str | None = None) -> str:
    """Return what names a checkpoint's content, once it was loaded.

    Args:
        path: Folder: the hash of its files. Hub id: with the commit that was loaded, for a branch may move. An
            adapter's is joined with its base model's.
        revision: Hub revision.
    """
    folder = Path(path)
    files = (
        sorted({file for pattern in _CHECKPOINT_FILES for file in folder.glob(pattern)}) if folder.is_dir() else []
    )
    own = content_hash(*((file.name, file_hash(file)) for file in files)) if files else _on_the_hub(path, revision)
    adapter = find_adapter_config_file(path, revision=revision, local_files_only=True)
    if adapter is None:
        return own
    config = json.loads(Path(adapter).read_text(encoding="utf-8"))
    base = checkpoint_identity(str(config["base_model_name_or_path"]), config.get("revision"))
    return content_hash(own, base)


def _on_the_hub(path: str, revision: str | None) -> str:
    options = {"revision": revision, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    for name in ("config.json", "adapter_config.json"):
        # Read from the cache alone, as it was just filled: nothing is asked of the hub again.
        with suppress(OSError):
            if commit := extract_commit_hash(cached_file(path, name, **options), None):
                return f"{path}@{commit}"
    return f"{path}@{revision}"
