"""What a running training writes and shows: `metrics.jsonl`, and a live line."""

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bfpo.core.files import write_text
from bfpo.core.pairs import CELLS
from bfpo.core.terminal import console, say


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`, one JSON object per line, `step` first.

    When training starts, lines behind the step it starts from are cut off, and so is a half-written last line: a
    resumed run repeats those steps.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the file back to the step that training starts from."""
        if not state.is_world_process_zero or not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            step = _step_of(line)
            if step is None or step > state.global_step or state.global_step == 0:
                break
            kept.append(line)
        write_text(self._path, "".join(kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **_finite(logs or {})}, allow_nan=False) + "\n")


def _step_of(line: str) -> int | None:
    """Return the step of a line; None if it isn't a whole line."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _finite(logs: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers as JSON can hold them: the gradient's norm may be infinite while fp16 finds its scale."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}


class LiveLine(TrainerCallback):
    """A progress bar with the numbers that matter on a terminal, one plain line per log elsewhere."""

    def __init__(self) -> None:
        out = console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=out,
            transient=True,
            disable=not out.is_terminal,
        )
        self._plain = not out.is_terminal
        self._task = self._progress.add_task("training", total=None, numbers="")
        self._start = (0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count."""
        self._start = (state.global_step, time.monotonic())
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step)
        if state.is_world_process_zero:
            self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance."""
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest numbers."""
        if not logs or "loss" not in logs:
            return
        numbers = live_numbers(logs)
        self._progress.update(self._task, numbers=numbers)
        if self._plain:
            first, began = self._start
            per_step = (time.monotonic() - began) / max(state.global_step - first, 1)
            left = per_step * (state.max_steps - state.global_step)
            say(f"step {state.global_step}/{state.max_steps}  {numbers}  {left:.0f} s left")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away."""
        self.close()

    def close(self) -> None:
        """Take the bar away, however training ended."""
        self._progress.stop()


def live_numbers(logs: dict[str, Any]) -> str:
    """Return loss, normalized loss, margin of each cell that has pairs, and speed, as one line."""
    parts = [f"loss {logs['loss']:.4g}"]
    if "bfpo/normalized_loss" in logs:
        parts.append(f"normalized {logs['bfpo/normalized_loss']:.3f}")
    parts += [f"{cell} {logs[key]:+.1f}" for cell in CELLS if (key := f"bfpo/margin/{cell}") in logs]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)
