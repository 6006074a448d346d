"""Callbacks of an online run: its state in every checkpoint, the end at reward hacking, the line of metrics."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bfpo.online.value import CombinedValue

_SHOWN = (
    ("reward", "online/reward", ".3f"),
    ("cost", "online/cost", ".3f"),
    ("λ", "online/multiplier", ".3g"),
    ("a1", "online/a1", ".3g"),
    ("tail below", "online/tail_start", ".3g"),
    ("held-out safety", "online/watched_safety", ".1%"),
)


class StateFile(TrainerCallback):
    """Writes `multiplier.json` into every checkpoint, before it is marked complete.

    Args:
        value: Reward function, which holds the state.
    """

    def __init__(self, value: CombinedValue) -> None:
        self._value = value

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state of this step."""
        if PartialState().is_main_process:
            self._value.state.write(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


class HackingStop(TrainerCallback):
    """Ends training where the held-out judge shows that the reward is hacked.

    Args:
        value: Reward function, which the held-out judge watches.
    """

    def __init__(self, value: CombinedValue) -> None:
        self._value = value

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after this step."""
        if self._value.hacking is not None:
            control.should_training_stop = True


def format_online_metrics(logs: dict[str, Any]) -> str:
    """Return reward, cost, what the combiner adapts, KL, length and number of samples as one line."""
    parts = [f"{name} {logs[key]:{form}}" for name, key, form in _SHOWN if logs.get(key) is not None]
    length = logs.get("completions/mean_length")
    if length is not None and logs.get("kl") is not None:
        # TRL's KL is a mean over tokens.
        parts.append(f"KL {logs['kl'] * length:.2f} nats")
    if length is not None:
        parts.append(f"{length:.0f} tokens ({logs['completions/clipped_ratio']:.0%} cut)")
    if logs.get("online/missing"):
        parts.append(f"missing {logs['online/missing']:.1%}")
    if "online/samples" in logs:
        parts.append(f"{logs['online/samples']:,.0f} samples")
    return "  ".join(parts)
