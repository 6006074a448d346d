"""The `transformers` engine: a model in this process, sampled independently of batching."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from bfpo.config.recipes import ModelSection, is_gguf
from bfpo.core.files import content_hash, file_hash
from bfpo.core.samples import Completion, Key, Prompt, Sampling, sample_seed
from bfpo.core.terminal import say, show_activity
from bfpo.data.chat_format import ChatFormat
from bfpo.errors import ModelError, RecipeError, Unanswered, did_you_mean
from bfpo.generation.decoding import Answer, Decoder, DecodeRequest
from bfpo.generation.guards.factor import FactorGuard
from bfpo.generation.guards.project import Projection
from bfpo.generation.model_inputs import TemplateRefusal, render_prompt
from bfpo.generation.model_text import has_channels, parse_model_text
from bfpo.generation.noise import VERSION as NOISE_VERSION
from bfpo.generation.sampler import Sampler
from bfpo.generation.slots import UnsupportedModel
from bfpo.generation.whole_batches import WholeBatches
from bfpo.model.gguf import find_gguf
from bfpo.model.load import load_model, load_tokenizer
from bfpo.model.lora import CausalLM
from bfpo.model.merge import DTYPES
from bfpo.model.vocabulary import check_token_ids

# Files that a checkpoint's completions depend on; README, training state and evaluation don't count.
_CHECKPOINT_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "tokenizer*", "*.jinja")


class TransformersEngine:
    """Engine that runs a model in this process, with a key-value cache.

    Prompts are answered shortest first. A finished answer leaves the batch at once, and a waiting prompt takes its
    place; samples of a prompt share its encoding. Models that can't be decoded this way are decoded in whole batches
    by transformers' `generate`, with a note.

    A completion depends only on the model, its prompt, the sample number and the seed: the noise is a function of
    prompt, sample, position and token. (In float32 a batch of another shape rounds differently, which can tip a near
    tie; in float64 results are the same in any batch.) The only setting used from the checkpoint's generation config
    are the tokens that end a turn. Temperature and top-p come from `sampling`, and no other processor changes the
    distribution.

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
        self.model_name, self.identity = name, identity
        self._max_batch_tokens = max_batch_tokens
        self._can_edit_cache: bool | None = None
        self._notes: set[str] = set()
        self._guard: FactorGuard | Projection | None = None
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
        return self._hash_settings(*([NOISE_VERSION] if self.sampling.temperature > 0 else []))

    @property
    def former_settings_hash(self) -> str:
        """The same hash as it was before noise had a version; a finished file with it is kept."""
        return self._hash_settings()

    def behind(self, guard: FactorGuard | Projection) -> "TransformersEngine":
        """Return an engine of the same model that decodes behind a guard.

        Args:
            guard: Guard that changes the probabilities of the next token, or the states that it is predicted from.
        """
        guarded = copy(self)
        guarded._guard = guard
        return guarded

    def with_sampling(self, sampling: Sampling) -> "TransformersEngine":
        """Return an engine of the same model, behind the same guard, that samples differently."""
        resampled = copy(self)
        resampled.sampling = sampling
        return resampled

    def _hash_settings(self, *noise: int) -> str:
        sampling = self.sampling
        settings = (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed, *noise)
        # The identity covers the tokenizer's end token; those of the generation config are added if they differ.
        ends = () if self._end_ids == [self.tokenizer.eos_token_id] else (self._end_ids,)
        dtype, template = str(self.model.dtype), self.tokenizer.chat_template
        guard = () if self._guard is None else (self._guard.settings_hash,)
        return content_hash(self.name, self.identity, dtype, template, settings, *ends, *guard)

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts as they end; see `Engine`.

        Raises:
            ModelError: If the tokenizer gives ids that the model has no embeddings for.
            Unanswered: At the end, if the chat template refuses prompts, or they exceed the model's positions with
                the longest completion.
        """
        for answers in self.continue_answers([self.begin_answer(prompt, sample) for prompt, sample in requests]):
            yield [self.completion_of(answer) for answer in answers]

    def begin_answer(self, prompt: Prompt, sample: int) -> "TokenAnswer":
        """Return an answer without tokens, or with those of the prompt's given beginning.

        Raises:
            RecipeError: If that is not shorter than the longest completion.
        """
        if prompt.prefill is None:
            return TokenAnswer(prompt, sample)
        token_ids = tuple(self.tokenizer(prompt.prefill, add_special_tokens=False)["input_ids"])
        if len(token_ids) >= self.sampling.max_new_tokens:
            raise RecipeError(
                f"prefill has {len(token_ids)} tokens, and max_new_tokens is {self.sampling.max_new_tokens}; "
                "expected a larger one"
            )
        return TokenAnswer(prompt, sample, token_ids)

    def continue_answers(
        self, beginnings: Sequence["TokenAnswer"], goes_on: Callable[["TokenAnswer"], bool] | None = None
    ) -> Iterator[list["TokenAnswer"]]:
        """Yield answers with these beginnings, each of which has no end yet; see `generate`.

        Args:
            beginnings: Beginnings of answers, possibly empty.
            goes_on: Function that gets an answer so far after each token, and returns whether it goes on; it isn't
                called for a model that is decoded in whole batches.
        """
        failed: dict[Key, str] = {}
        fitting: list[TokenAnswer] = []
        to_decode: list[DecodeRequest] = []
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        max_prompt = None if positions is None else positions - self.sampling.max_new_tokens
        for beginning in beginnings:
            key = (beginning.prompt.prompt_id, beginning.sample)
            try:
                prompt_ids = self._prompt_ids(beginning.prompt)
            except TemplateRefusal as refusal:
                failed[key] = str(refusal)
                continue
            if max_prompt is not None and len(prompt_ids) > max_prompt:
                failed[key] = (
                    f"prompt too long for the model's {positions} positions with {self.sampling.max_new_tokens} new "
                    "tokens"
                )
                continue
            beginning = beginning._replace(prompt_tokens=len(prompt_ids))
            fitting.append(beginning)
            seed = sample_seed(self.sampling.seed, *key)
            max_new_tokens = self.sampling.max_new_tokens - len(beginning.token_ids)
            watch = None if goes_on is None else partial(_watch, goes_on, beginning)
            to_decode.append(DecodeRequest((*prompt_ids, *beginning.token_ids), seed, max_new_tokens, watch))
        check_token_ids(
            self.model.config, [*(request.prompt_ids for request in to_decode), [self._pad_id]], self.model_name
        )
        tokens = _TokenCount()
        for answers in self._decode(to_decode, tokens.add):
            beginnings_of = [(fitting[index], new_ids) for index, new_ids in answers]
            yield [beginning.continued(new_ids) for beginning, new_ids in beginnings_of]
        if failed:
            raise Unanswered(failed, len(beginnings), refused=failed)

    def _decode(self, requests: Sequence[DecodeRequest], report: Callable[[int], None]) -> Iterator[list[Answer]]:
        """Yield answers as they end, or in whole batches for a model whose cache can't be edited."""
        if not requests:
            return
        factor = self._guard if isinstance(self._guard, FactorGuard) else None
        projection = self._guard if isinstance(self._guard, Projection) else None
        sampler = Sampler(self.sampling, factor)
        if self._can_edit_cache is None:
            try:
                Decoder(self.model, self._end_ids, sampler, max_tokens=1).check(requests[0].prompt_ids)
                self._can_edit_cache = True
            except UnsupportedModel as reason:
                say(f"note: {self.model_name} is decoded in whole batches by transformers' generate: {reason}")
                self._can_edit_cache = False
        if factor is not None and not self._can_edit_cache:
            raise ModelError(
                f"{self.model_name}: the guard factor needs a cache in which candidates can be read; use first_safe"
            )
        options: dict[str, Any] = {"max_tokens": self._max_batch_tokens, "report": report}
        decoder = (
            Decoder(self.model, self._end_ids, sampler, shares_prefix=projection is None, **options)
            if self._can_edit_cache
            else WholeBatches(self.model, self._end_ids, sampler, pad_id=self._pad_id, **options)
        )
        batches = decoder.decode(requests)
        if projection is None:
            yield from batches
            return
        while True:
            # Not while the caller has control: another engine may run the same model.
            with projection.applied(self.model):
                answers = next(batches, None)
            if answers is None:
                return
            yield answers

    @property
    def _pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        return self._end_ids[0] if pad_id is None else int(pad_id)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        text = render_prompt(self._chat_format, prompt.prompt, prompt.inputs)
        if prompt.prefill is not None and self._opens_thought(prompt):
            raise TemplateRefusal("the chat template begins a thought, so the answer can't be begun for the model")
        for unread in self._chat_format.find_unread(text, prompt.prompt, prompt.inputs):
            if unread not in self._notes:
                self._notes.add(unread)
                say(f"note: {unread}")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def tokens_of(self, completion: Completion) -> tuple[list[int], list[int]]:
        """Return the tokens of a completion's prompt and of its text, with the end of turn if it ended by itself.

        Args:
            completion: Completion without reasoning and tool calls.
        """
        prompt = Prompt(
            completion.prompt_id,
            completion.prompt,
            tools=completion.tools,
            chat_template_kwargs=completion.chat_template_kwargs,
        )
        text_ids: list[int] = self.tokenizer(completion.text, add_special_tokens=False)["input_ids"]
        end = [self._end_ids[0]] if completion.finish_reason == "stop" else []
        return self._prompt_ids(prompt), [*text_ids, *end]

    def completion_of(self, answer: "TokenAnswer") -> Completion:
        """Return the completion that the tokens of an answer stand for; they are decoded only here."""
        prompt, new_ids = answer.prompt, list(answer.token_ids)
        end = next((index for index, token in enumerate(new_ids) if token in self._end_ids), None)
        text_ids = new_ids if end is None else new_ids[:end]
        raw_text = str(self.tokenizer.decode(text_ids, skip_special_tokens=False))
        message = parse_model_text(
            raw_text,
            opened=self._opens_thought(prompt),
            has_tools=prompt.tools is not None,
            special_tokens=self._special_tokens,
        )
        is_plain = message.reasoning is None and not message.tool_calls and not has_channels(raw_text)
        text = str(self.tokenizer.decode(text_ids, skip_special_tokens=True)) if is_plain else message.content
        return Completion.on(
            prompt,
            answer.sample,
            text=text,
            finish_reason="length" if end is None else "stop",
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=len(text_ids) + (end is not None),
            model=self.model_name,
            engine=self.name,
            settings_hash=self.settings_hash,
            reasoning=message.reasoning,
            tool_calls=message.tool_calls,
        )

    @cached_property
    def _chat_format(self) -> ChatFormat:
        return ChatFormat(self.tokenizer)

    @cached_property
    def _special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return [*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)]

    def _opens_thought(self, prompt: Prompt) -> bool:
        """Return whether the prompt for generation ends inside a thought."""
        if not self._chat_format.opened:
            return False
        text = self._chat_format.render_prompt(prompt.prompt, prompt.inputs)
        return text.endswith(self._chat_format.opened)


class TokenAnswer(NamedTuple):
    """Answer of a model, or its beginning, as tokens.

    Args:
        prompt: Prompt that it answers.
        sample: Number of the answer, which its noise depends on.
        token_ids: Its tokens.
        prompt_tokens: Length of the prompt; 0 before it is encoded.
    """

    prompt: Prompt
    sample: int
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0

    def continued(self, new_ids: Sequence[int]) -> "TokenAnswer":
        """Return the answer with further tokens."""
        return self._replace(token_ids=(*self.token_ids, *new_ids))


def _watch(goes_on: Callable[[TokenAnswer], bool], beginning: TokenAnswer, new_ids: Sequence[int]) -> bool:
    return goes_on(beginning.continued(new_ids))


class _TokenCount:
    """Number of generated tokens, shown beside the progress of the completions."""

    def __init__(self) -> None:
        self._start, self._count = time.monotonic(), 0

    def add(self, count: int) -> None:
        self._count += count
        seconds = time.monotonic() - self._start
        show_activity(f"{self._count:,} tokens, {self._count / max(seconds, 1e-9):,.0f} per second")


def likeliest_answers(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[str, str]:
    """Return a model's answers at temperature 0, by prompt id; prompts that it can't be asked are left out.

    Args:
        model: Model, in memory.
        tokenizer: Tokenizer of the model, with a chat template.
        prompts: Prompts.
        max_new_tokens: Maximum length of an answer, in tokens.
    """
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    engine = TransformersEngine(model, tokenizer, sampling, name="the policy", identity="")
    answers: dict[str, str] = {}
    with suppress(Unanswered):
        for completions in engine.generate([(prompt, 0) for prompt in prompts]):
            answers |= {completion.prompt_id: completion.message.in_words() for completion in completions}
    return answers


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
        path: Folder, hub id or GGUF file.
        revision: Hub revision.
    """
    if is_gguf(path):
        return content_hash("gguf", file_hash(find_gguf(path, revision)))
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
