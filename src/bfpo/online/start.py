"""The start check of an online run: can the start model's samples be scored, and is there anything to learn?"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from bfpo.core.samples import Completion, Prompt, Sampling
from bfpo.core.terminal import say
from bfpo.errors import ModelError, TrainingError, Unanswered
from bfpo.generation.in_process import TransformersEngine
from bfpo.losses.combine import Combiner
from bfpo.losses.combiners import Array
from bfpo.model.lora import CausalLM
from bfpo.online.scores import Scorers, count_missing

# Prompts whose samples are scored before training.
CHECKED_PROMPTS = 8


class OnlineStart(NamedTuple):
    """Scores of the start model's samples.

    Args:
        samples: Number of samples.
        reward: Mean reward.
        cost: Mean cost.
        value: Mean combined value.
        spread: Root mean square, over prompts, of the standard deviation of the values of a prompt's samples.
        missing: Share of samples without a score.
    """

    samples: int
    reward: float
    cost: float
    value: float
    spread: float
    missing: float


def check_start(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    scorers: Scorers,
    combiner: Combiner,
    sampling: Sampling,
    *,
    max_missing: float,
) -> OnlineStart:
    """Sample the start model, score the samples, and say what training starts from.

    Args:
        model: Start model.
        tokenizer: Its tokenizer.
        prompts: Prompts of the run; a seeded sample of them is answered.
        scorers: The judges that train the policy.
        combiner: Combiner at the start.
        sampling: How completions are sampled.
        max_missing: Maximum share of samples without a score.

    Raises:
        TrainingError: If too many samples have no score, or all samples of every prompt have the same value.
    """
    order = np.random.default_rng(sampling.seed).permutation(len(prompts))[:CHECKED_PROMPTS]
    checked_prompts = [prompts[int(index)] for index in order]
    completions = _sample(model, tokenizer, checked_prompts, sampling)
    scores = scorers.score(completions)
    missing = count_missing(scores)
    share = sum(missing.values()) / len(scores)
    if share > max_missing or share == 1:
        reason, count = missing.most_common(1)[0]
        raise TrainingError(
            f"start check: {share:.0%} of {len(scores)} samples of the start model have no score, more than "
            f"max_missing {max_missing:g}; most frequent: {reason} ({count}). Use a judge that scores these answers"
        )
    complete = [(np.nan, np.nan) if score.missing else (score.reward, score.cost) for score in scores]
    both = np.array(complete, dtype=np.float64).reshape(len(checked_prompts), sampling.samples, 2)
    check = _summarize(both[..., 0], both[..., 1], combiner, share)
    if check.spread == 0:
        raise TrainingError(
            f"start check: the samples of each prompt have equal values ({check.value:g} on average), so there is "
            "nothing to learn; check the scorers, or raise temperature or num_generations"
        )
    say(
        f"start check: {check.samples} samples, reward {check.reward:.3f}, cost {check.cost:.3f}, value "
        f"{check.value:.3f}, differing by {check.spread:.3f} within a prompt; {check.missing:.1%} without a score"
    )
    return check


def check_reference(policy: nn.Module, reference: nn.Module | None) -> None:
    """Check that the reference, which TRL loaded by the name of the start model, has the policy's weights.

    Args:
        policy: Policy before training.
        reference: The reference; None if it is the policy without its adapter.

    Raises:
        ModelError: If a weight differs.
    """
    if reference is None:
        return
    weights = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        other = weights.get(name)
        if other is None or not torch.equal(parameter.detach().cpu(), other.detach().cpu()):
            raise ModelError(
                f"start check: the reference that TRL loaded differs from the start model in {name}; did the files "
                "of model.path change while the run started?"
            )


def _sample(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], sampling: Sampling
) -> list[Completion]:
    """Return the samples of each prompt, prompt by prompt."""
    engine = TransformersEngine(model, tokenizer, sampling, name="the policy", identity="")
    keys = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples)]
    try:
        answered = {completion.key: completion for batch in engine.generate(keys) for completion in batch}
    except Unanswered as error:
        raise TrainingError(
            f"start check: {error.failed[next(iter(error.failed))]}; leave such prompts out"
        ) from None
    return [answered[prompt.prompt_id, sample] for prompt, sample in keys]


def _summarize(reward: Array, cost: Array, combiner: Combiner, missing: float) -> OnlineStart:
    values = combiner(reward, cost)
    centered = values - np.nansum(values, axis=1, keepdims=True) / np.maximum(
        (~np.isnan(values)).sum(axis=1, keepdims=True), 1
    )
    mean_reward, mean_cost, mean_value = (float(np.nanmean(array)) for array in (reward, cost, values))
    spread = float(np.sqrt(np.nanmean(cast(Any, centered) ** 2)))
    # Rounding isn't a difference.
    spread = spread if spread > 1e-12 else 0.0
    return OnlineStart(values.size, mean_reward, mean_cost, mean_value, spread, missing)
