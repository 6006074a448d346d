"""The reward function of TRL: samples in, combined values out. It holds the combiner, whose multiplier it updates."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from bfpo.core.samples import Completion, Judge, Prompt
from bfpo.errors import TrainingError
from bfpo.losses.combine import Combiner
from bfpo.losses.combiners import Array
from bfpo.online.scores import Score, Scorers, count_missing, judge_if_read
from bfpo.online.state import RunState
from bfpo.online.watch import describe_hacking, watched_batch

# Number of samples from which on `max_missing` holds.
_MIN_COUNTED = 100


class CombinedValue:
    """Function that gives each sample its combined value; a sample with a missing score gets None.

    All processes see the scores of all samples, so their multipliers are equal. TRL leaves a sample with None out of
    the baseline and gives it no gradient.

    Args:
        prompts: Prompts, by id.
        scorers: The judges that train the policy.
        combiner: Combiner at the first step of this process.
        state: State of the run so far, changed in place.
        samples_per_prompt: Number of samples of a prompt.
        end_ids: Ids of the tokens that end a turn.
        max_missing: Maximum share of samples without a score.
        watch: Held-out judge, number of steps from a batch that it reads to the next, and number of batches that are
            compared; None without one.
    """

    __name__ = "value"

    def __init__(
        self,
        prompts: Mapping[str, Prompt],
        scorers: Scorers,
        combiner: Combiner,
        state: RunState,
        *,
        samples_per_prompt: int,
        end_ids: Sequence[int],
        max_missing: float,
        watch: tuple[Judge, int, int] | None = None,
    ) -> None:
        self.combiner, self.state = combiner, state
        self.hacking: str | None = None
        self._prompts, self._scorers = prompts, scorers
        self._samples_per_prompt, self._end_ids = samples_per_prompt, frozenset(end_ids)
        self._max_missing = max_missing
        self._watch = watch

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        prompt_id: Sequence[str],
        trainer_state: Any,
        log_metric: Callable[[str, float], None],
        **columns: Any,
    ) -> list[float | None]:
        """Return the values of the samples of this process, as TRL calls a reward function.

        Args:
            completions: Conversations with the one answer.
            completion_ids: Token ids of the answers, up to the end of the turn.
            prompt_id: Identifiers of the prompts.
            trainer_state: State of the trainer.
            log_metric: Function that logs a metric of this step.
            columns: Other columns, which aren't read.

        Raises:
            TrainingError: If more scores are missing than allowed.
        """
        samples = [
            self._completion(name, index, answer[-1]["content"], ids)
            for index, (name, answer, ids) in enumerate(zip(prompt_id, completions, completion_ids, strict=True))
        ]
        own_calls = self._scorers.calls
        own_scores = self._scorers.score(samples)
        scores = [Score(*score) for score in gather_object([tuple(score) for score in own_scores])]
        calls = sum(gather_object([self._scorers.calls - own_calls]))
        self._count(scores, calls)
        reward, cost = self._arrays(scores)
        values = self.combiner(reward, cost).ravel()
        self._log(reward, cost, log_metric)
        self.combiner = self.combiner.after(reward, cost)
        self.state.keep(self.combiner)
        step = trainer_state.global_step + 1
        self._watch_batch(samples, reward, cost, step, trainer_state.max_steps, log_metric)
        start = PartialState().process_index * len(samples)
        own_values = values[start : start + len(samples)]
        return [None if np.isnan(value) else float(value) for value in own_values]

    def _completion(self, name: str, index: int, text: str, ids: Sequence[int]) -> Completion:
        return Completion.on(
            self._prompts[name],
            index,
            text=text,
            finish_reason="stop" if ids and ids[-1] in self._end_ids else "length",
            prompt_tokens=0,
            completion_tokens=len(ids),
            model="the policy",
            engine="trl",
            settings_hash="",
        )

    def _count(self, scores: Sequence[Score], calls: int) -> None:
        self.state.samples += len(scores)
        self.state.scorer_calls += calls
        self.state.missing = dict(Counter(self.state.missing) + count_missing(scores))
        missing = sum(self.state.missing.values())
        # Of few samples more may be missing by chance.
        share = missing / self.state.samples
        is_certain = self.state.samples >= _MIN_COUNTED or share == 1
        if share > self._max_missing and is_certain:
            reason, count = max(self.state.missing.items(), key=lambda item: item[1])
            raise TrainingError(
                f"{missing:,} of {self.state.samples:,} samples have no score, more than max_missing "
                f"{self._max_missing:g}; most frequent: {reason} ({count:,}). Use a judge that scores these answers, "
                "or raise max_missing"
            )

    def _arrays(self, scores: Sequence[Score]) -> tuple[Array, Array]:
        """Return rewards and costs, (prompts, samples); both are NaN where one is missing."""
        complete = [(np.nan, np.nan) if score.missing is not None else (score.reward, score.cost) for score in scores]
        both = np.array(complete, dtype=np.float64).reshape(-1, self._samples_per_prompt, 2)
        return both[..., 0], both[..., 1]

    def _log(self, reward: Array, cost: Array, log_metric: Callable[[str, float], None]) -> None:
        if not np.isnan(reward).all():
            log_metric("online/reward", float(np.nanmean(reward)))
            log_metric("online/cost", float(np.nanmean(cost)))
        log_metric("online/missing", float(np.isnan(reward).mean()))
        log_metric("online/samples", float(self.state.samples))
        for name in self.combiner.state:
            if (value := getattr(self.combiner, name)) is not None:
                log_metric(f"online/{name}", float(value))

    def _watch_batch(
        self,
        samples: Sequence[Completion],
        reward: Array,
        cost: Array,
        step: int,
        max_steps: int,
        log_metric: Callable[[str, float], None],
    ) -> None:
        if self._watch is None:
            return
        judge, every, window = self._watch
        if (step - 1) % every or np.isnan(reward).all():
            return
        verdicts = judge_if_read(judge, samples)
        called_safe = gather_object([verdict is not None and verdict.safe is True for verdict in verdicts])
        safe = np.array(called_safe, dtype=bool).reshape(reward.shape)
        log_metric("online/watched_safety", float(safe.mean()))
        self.state.watched.append(watched_batch(step, reward, cost, safe))
        self.hacking = describe_hacking(self.state.watched, window, planned=-(-max_steps // every))
