"""Engine that answers by a chain of steps, each with an adapter of its own on one base model."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from bfpo.config.recipes import ModelSection
from bfpo.core.chain import INSTRUCTIONS_HASH, SHARED, STEPS, Expert, Step, read_check, step_prompt
from bfpo.core.conversation import Message
from bfpo.core.files import content_hash
from bfpo.core.guarding import REFUSAL, GuardCounts
from bfpo.core.samples import Completion, Key, Prompt, Sampling
from bfpo.errors import ModelError, Unanswered
from bfpo.generation.guards.first_safe import refuse
from bfpo.generation.in_process import TransformersEngine, checkpoint_identity, load_checkpoint
from bfpo.model.load import add_experts, load_tokenizer
from bfpo.model.lora import activate

# A killed run loses the chains that are in progress.
_TOGETHER = 64


class StepsEngine:
    """Engine whose answers are the last of a chain of steps; see `Engine` and `bfpo.core.chain`.

    All steps have the sampling of the engine and the seed of the request. A step reads the whole conversation again,
    because its adapter gives the earlier turns other keys and values. A chain ends without an answer where an earlier
    step has none. Where there is a check, an answer that it doesn't call safe becomes a refusal, as of a guard.

    Args:
        engine: Engine of the model; one with adapters has one named for each step that isn't null.
        adapters: Step → identity of its adapter; None for the model without one. In the order of the chain. `shared`,
            if it is there, is active beside the adapter of each step.
    """

    name = "steps"

    def __init__(self, engine: TransformersEngine, adapters: Mapping[Expert, str | None]) -> None:
        self._engine, self._adapters = engine, dict(adapters)
        self._steps = [step for step in STEPS if step in adapters]

    @property
    def faults(self) -> Counter[str]:
        """Always empty: nothing is retried."""
        return Counter()

    @property
    def settings_hash(self) -> str:
        """Hash of the engine's settings, the steps with their adapters, and the wording of the instructions."""
        wording = REFUSAL if "check" in self._steps else None
        return content_hash(self.name, self._engine.settings_hash, self._adapters, INSTRUCTIONS_HASH, wording)

    def generate(self, requests: Sequence[tuple[Prompt, int]]) -> Iterator[list[Completion]]:
        """Answer prompts, some of them at a time; see `Engine`.

        Raises:
            Unanswered: At the end, if a step of some wasn't answered.
        """
        failed: dict[Key, str] = {}
        for start in range(0, len(requests), _TOGETHER):
            if completions := self._answer(requests[start : start + _TOGETHER], failed):
                yield completions
        if failed:
            raise Unanswered(failed, len(requests), refused=failed)

    def _answer(self, requests: Sequence[tuple[Prompt, int]], failed: dict[Key, str]) -> list[Completion]:
        """Return the answers to prompts, and note the others with their reasons in `failed`."""
        prompts = {(prompt.prompt_id, sample): prompt for prompt, sample in requests}
        replies: dict[Key, list[tuple[Step, Message]]] = {key: [] for key in prompts}
        answers: dict[Key, Completion] = {}
        for step in self._steps:
            if step == "check":
                break
            for completion in self._reply(step, prompts, replies, failed):
                if step == "answer":
                    answers[completion.key] = completion
                elif completion.is_unread:
                    failed[completion.key] = f"step {step}: reasoning without an answer"
                else:
                    replies[completion.key].append((step, completion.message))
            replies = {key: earlier for key, earlier in replies.items() if key not in failed}
        checks: dict[Key, Completion] = {}
        if "check" in self._steps:
            for key, answer in answers.items():
                replies[key].append(("answer", answer.message))
            # An answer that can't be checked, such as in a conversation that is too long, doesn't pass.
            unchecked: dict[Key, str] = {}
            to_check = {key: replies[key] for key, answer in answers.items() if not answer.is_unread}
            checks = {check.key: check for check in self._reply("check", prompts, to_check, unchecked)}
        return [self._finish(answer, prompts[key], checks.get(key)) for key, answer in answers.items()]

    def _reply(
        self,
        step: Step,
        prompts: Mapping[Key, Prompt],
        replies: Mapping[Key, Sequence[tuple[Step, Message]]],
        failed: dict[Key, str],
    ) -> list[Completion]:
        """Return the replies to a step; it is asked of every prompt in `replies`."""
        requests = [(_of_step(prompts[key], earlier, step), key[1]) for key, earlier in replies.items()]
        completions: list[Completion] = []
        with self._adapter_of(step):
            try:
                for batch in self._engine.generate(requests):
                    completions += batch
            except Unanswered as error:
                alone = len(self._steps) == 1
                failed |= {key: why if alone else f"step {step}: {why}" for key, why in error.failed.items()}
        return completions

    def _adapter_of(self, step: Step) -> AbstractContextManager[None]:
        """Switch the adapters of a step on until the next ones are; return the context that the step runs in."""
        model = self._engine.model
        if not isinstance(model, PeftModel):
            return nullcontext()
        active: list[str] = [name for name in (step, SHARED) if self._adapters.get(name) is not None]
        if not active:
            disabled: AbstractContextManager[None] = model.disable_adapter()
            return disabled
        activate(model, active)
        return nullcontext()

    def _finish(self, answer: Completion, prompt: Prompt, check: Completion | None) -> Completion:
        """Return the last reply of a chain as the answer to its prompt."""
        answer = replace(answer, prompt=prompt.prompt, engine=self.name, settings_hash=self.settings_hash)
        if "check" not in self._steps or answer.is_unread:
            return answer
        passes = None if check is None else read_check(check.text)
        counts = GuardCounts(
            samples=1,
            tokens=answer.completion_tokens,
            judge_calls=int(check is not None),
            unsafe=int(passes is False),
            undecided=int(passes is None),
        )
        answer = replace(answer, guard=counts)
        return answer if passes else refuse(answer, REFUSAL)


def _of_step(prompt: Prompt, earlier: Sequence[tuple[Step, Message]], step: Step) -> Prompt:
    """Return the prompt of a step; a given beginning is that of the answer."""
    prefill = prompt.prefill if step == "answer" else None
    return replace(prompt, prompt=step_prompt(prompt.prompt, earlier, step), prefill=prefill)


def load_steps(
    path: str,
    steps: Mapping[Expert, str | None],
    sampling: Sampling,
    *,
    dtype: str = "float32",
    revision: str | None = None,
) -> StepsEngine:
    """Load a base model and the adapters of the steps as an engine.

    Args:
        path: Folder or hub id of the base model.
        steps: Step → folder or hub id of its adapter; None for the base model itself. In the order of the chain,
            after `shared` if there is a shared adapter.
        sampling: Sampling of the replies.
        dtype: Data type of the weights.
        revision: Hub revision of the base model.

    Raises:
        RecipeError: If `dtype` is unknown.
        ModelError: If a checkpoint can't be loaded, an adapter was trained on another base or beside another shared
            adapter, or adapters have different chat templates.
    """
    model, tokenizer, identity = load_checkpoint(path, dtype=dtype, revision=revision)
    adapters = {step: adapter for step, adapter in steps.items() if adapter is not None}
    identities: dict[Expert, str | None] = dict.fromkeys(steps)
    if adapters:
        adapted = add_experts(model, {str(step): adapter for step, adapter in adapters.items()})
        torch.nn.Module.to(adapted, model.device)
        tokenizer = _load_common_tokenizer(adapters)
        for step, adapter in adapters.items():
            _check_base(adapted.peft_config[step], adapter, path, identity)
            identities[step] = checkpoint_identity(adapter)
        model = adapted
    engine = TransformersEngine(model, tokenizer, sampling, name=path, identity=identity)
    return StepsEngine(engine, identities)


def _load_common_tokenizer(adapters: Mapping[Expert, str]) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the adapters were trained with.

    Raises:
        ModelError: If their chat templates differ.
    """
    tokenizers = {adapter: load_tokenizer(ModelSection(path=adapter)) for adapter in adapters.values()}
    (first, tokenizer), *others = tokenizers.items()
    for adapter, other in others:
        if other.chat_template != tokenizer.chat_template:
            raise ModelError(f"'{adapter}' and '{first}' were trained with different chat templates; use one for all")
    return tokenizer


def _check_base(config: PeftConfig, adapter: str, path: str, identity: str) -> None:
    """Check that an adapter was trained on the base model that it is loaded onto.

    Raises:
        ModelError: If it wasn't.
    """
    base = str(config.base_model_name_or_path)
    if base != path and checkpoint_identity(base, config.revision) != identity:
        raise ModelError(f"'{adapter}' was trained on '{base}', which isn't the model '{path}'")
