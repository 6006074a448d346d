"""The `transformers` engine: a model in this process, sampled independently of batching."""

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
from bfpo.generation.model_inputs import TemplateRefusal, check_token_ids, render_chat
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.lora import CausalLM
from bfpo.model.merge import DTYPES

# Files that a checkpoint's completions depend on; README, training state and evaluation don't count.
_CHECKPOINT_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "tokenizer*", "*.jinja")


class TransformersEngine:
    """Engine that runs a model in this process: batched by length, padded on the left, with a key-value cache.

    A completion depends only on the model, its prompt, the sample number and the seed: the noise is drawn per prompt,
    sample and position. (In float32 a batch of another shape rounds differently, which can tip a near tie; in float64
    results are the same in any batch.) The only setting used from the checkpoint's generation config are the tokens
    that end a turn. Temperature and top-p come from `sampling`, and no other processor changes the distribution.

    Args:
        model: Causal language model.
        tokenizer: Tokenizer of the model, with a chat template.
        sampling: Sampling of the completions.
        name: Name of the model in completions.
        identity: Hash or name of the model's content, for the settings' hash.
        max_batch_tokens: Maximum number of tokens of a batch, prompts and completions; a batch has at least one row.

    Raises:
        ModelError: If the tokenizer has no chat template, or no token ends a turn.
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
            raise ModelError(f"{name} has no chat template; generation requires one")
        self.model, self.tokenizer, self.sampling = model.eval(), tokenizer, sampling
        self.model_name, self._identity = name, identity
        self._max_batch_tokens = max_batch_tokens
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        ids = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
        self._end_ids: list[int] = sorted(int(token) for token in ids if token is not None)
        if not self._end_ids:
            raise ModelError(f"{name}: neither the tokenizer nor the generation config has an eos_token_id")

    @property
    def faults(self) -> Counter[str]:
        """Always empty: nothing is retried."""
        return Counter()

    @property
    def settings_hash(self) -> str:
        """Hash of model, template, end tokens and sampling, without the number of samples, so more can be added."""
        sampling = self.sampling
        settings = (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed)
        # The identity covers the tokenizer's end token; those of the generation config are added if they differ.
        ends = () if self._end_ids == [self.tokenizer.eos_token_id] else (self._end_ids,)
        dtype, template = str(self.model.dtype), self.tokenizer.chat_template
        return content_hash(self.name, self._identity, dtype, template, settings, *ends)

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts, shortest first; see `Engine`.

        Raises:
            ModelError: If the tokenizer gives ids that the model has no embeddings for.
            Unanswered: At the end, if the chat template refuses prompts, or they exceed the model's positions with
                the longest completion.
        """
        failed: dict[Key, str] = {}
        renderable = []
        prompt_ids: list[list[int]] = []
        for prompt, sample in requests:
            try:
                prompt_ids.append(self._prompt_ids(prompt))
                renderable.append((prompt, sample))
            except TemplateRefusal as refusal:
                failed[prompt.prompt_id, sample] = str(refusal)
        check_token_ids(self.model, [*prompt_ids, [self._pad_id]], self.model_name)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        max_prompt = None if positions is None else positions - self.sampling.max_new_tokens
        fitting = [index for index, ids in enumerate(prompt_ids) if max_prompt is None or len(ids) <= max_prompt]
        batch: list[int] = []
        for index in sorted(fitting, key=lambda index: len(prompt_ids[index])):
            # Prompts come shortest first, so this row is the longest of the batch.
            longest = len(prompt_ids[index]) + self.sampling.max_new_tokens
            if batch and (len(batch) + 1) * longest > self._max_batch_tokens:
                yield self._generate_batch([renderable[i] for i in batch], [prompt_ids[i] for i in batch])
                batch = []
            batch.append(index)
        if batch:
            yield self._generate_batch([renderable[i] for i in batch], [prompt_ids[i] for i in batch])
        reason = (
            f"prompt too long for the model's {positions} positions with {self.sampling.max_new_tokens} new tokens"
        )
        # Missing completions are counted, so each sample of a prompt is listed.
        failed |= {
            (prompt.prompt_id, sample): reason
            for index, (prompt, sample) in enumerate(renderable)
            if max_prompt is not None and len(prompt_ids[index]) > max_prompt
        }
        if failed:
            raise Unanswered(failed, len(requests), refused=failed)

    @property
    def _pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        return self._end_ids[0] if pad_id is None else int(pad_id)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        messages = [message.to_row() for message in prompt.prompt]
        text = render_chat(self.tokenizer, messages, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def _generate_batch(
        self, requests: Sequence[tuple[Prompt, int]], prompt_ids: Sequence[list[int]]
    ) -> list[Completion]:
        device = next(self.model.parameters()).device
        width = max(map(len, prompt_ids))
        pad_id = self._pad_id
        inputs = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
        # transformers takes settings that the given config leaves open (repetition penalty, top-k) from the model's
        # own config, so the model's own config is replaced during generation.
        own_config = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=self._end_ids,
            pad_token_id=pad_id,
        )
        try:
            output = self.model.generate(
                inputs,
                attention_mask=mask,
                logits_processor=self._processors([(prompt.prompt_id, sample) for prompt, sample in requests]),
            )
        finally:
            self.model.generation_config = own_config
        assert isinstance(output, Tensor)
        return [
            self._make_completion(prompt, sample, len(ids), new_ids)
            for (prompt, sample), ids, new_ids in zip(requests, prompt_ids, output[:, width:].tolist(), strict=True)
        ]

    def _processors(self, keys: Sequence[tuple[str, int]]) -> LogitsProcessorList:
        sampling = self.sampling
        if sampling.temperature == 0:
            return LogitsProcessorList()
        processors: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        return LogitsProcessorList([*processors, SeededNoise([sample_seed(sampling.seed, *key) for key in keys])])

    def _make_completion(self, prompt: Prompt, sample: int, prompt_tokens: int, new_ids: list[int]) -> Completion:
        end = next((index for index, token in enumerate(new_ids) if token in self._end_ids), None)
        text_ids = new_ids if end is None else new_ids[:end]
        return Completion(
            prompt_id=prompt.prompt_id,
            sample=sample,
            prompt=prompt.prompt,
            text=str(self.tokenizer.decode(text_ids, skip_special_tokens=True)),
            finish_reason="length" if end is None else "stop",
            prompt_tokens=prompt_tokens,
            completion_tokens=len(text_ids) + (end is not None),
            model=self.model_name,
            engine=self.name,
            settings_hash=self.settings_hash,
        )


class SeededNoise(LogitsProcessor):
    """Logits processor that adds Gumbel noise, so that the argmax of the sum is a sample of the distribution.

    Every row draws from its own generator, one vector per position: its noise is the same in any batch.

    Args:
        seeds: Seeds of the rows.
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
    """Load a checkpoint as an engine.

    Args:
        path: Folder or hub id of a model or an adapter.
        sampling: Sampling of the completions.
        dtype: Data type of the weights.
        revision: Hub revision.

    Raises:
        RecipeError: If `dtype` is unknown.
        ModelError: If the checkpoint can't be loaded, or its tokenizer has no chat template.
    """
    model, tokenizer, identity = load_checkpoint(path, dtype=dtype, revision=revision)
    return TransformersEngine(model, tokenizer, sampling, name=path, identity=identity)


def load_checkpoint(path: str, *, dtype: str, revision: str | None) -> tuple[CausalLM, PreTrainedTokenizerBase, str]:
    """Return the model of a checkpoint, on the GPU if there is one, its tokenizer and its identity.

    Args:
        path: Folder or hub id of a model or an adapter.
        dtype: Data type of the weights.
        revision: Hub revision.

    Raises:
        RecipeError: If `dtype` is unknown.
        ModelError: If the checkpoint can't be loaded.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype is '{dtype}'; {did_you_mean(dtype, list(DTYPES))}")
    section = ModelSection.model_validate({"path": path, "dtype": dtype, "revision": revision})
    model, tokenizer = load_model(section), load_tokenizer(section)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer, checkpoint_identity(path, revision)


def checkpoint_identity(path: str, revision: str | None = None) -> str:
    """Return a hash or name of the content of a checkpoint that was loaded.

    A folder is identified by the hash of its files, a hub id by the loaded commit, because a branch may move. The
    identity of an adapter includes that of its base model.

    Args:
        path: Folder or hub id.
        revision: Hub revision.
    """
    folder = Path(path)
    files = (
        sorted({file for pattern in _CHECKPOINT_FILES for file in folder.glob(pattern)}) if folder.is_dir() else []
    )
    own = content_hash(*((file.name, file_hash(file)) for file in files)) if files else _hub_identity(path, revision)
    adapter = find_adapter_config_file(path, revision=revision, local_files_only=True)
    if adapter is None:
        return own
    config = json.loads(Path(adapter).read_text(encoding="utf-8"))
    base = checkpoint_identity(str(config["base_model_name_or_path"]), config.get("revision"))
    return content_hash(own, base)


def _hub_identity(path: str, revision: str | None) -> str:
    options = {"revision": revision, "local_files_only": True, "_raise_exceptions_for_missing_entries": False}
    for name in ("config.json", "adapter_config.json"):
        # The cache was just filled, so the hub isn't queried again.
        with suppress(OSError):
            if commit := extract_commit_hash(cached_file(path, name, **options), None):
                return f"{path}@{commit}"
    return f"{path}@{revision}"
