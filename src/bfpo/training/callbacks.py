"""Callbacks that time, write and show metrics during training: `metrics.jsonl` and a progress line."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bfpo.core.files import write_text
from bfpo.core.pairs import CELLS
from bfpo.core.terminal import console, say


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`, one JSON object per line, `step` first.

    When training starts, lines after the step it starts from are removed, because a resumed run repeats those steps;
    so is an incomplete last line.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the lines after the step that training starts from."""
        if not state.is_world_process_zero or not self._path.exists():
            return
        lines = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            step = _step_of(line)
            if step is None or step > state.global_step or state.global_step == 0:
                break
            lines.append(line)
        write_text(self._path, "".join(lines))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line with the step and the logged values."""
        if state.is_world_process_zero:
            line = json.dumps({"step": state.global_step, **_replace_non_finite(logs or {})}, allow_nan=False)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _step_of(line: str) -> int | None:
    """Return the step of a line; None if the line is incomplete."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _replace_non_finite(logs: dict[str, Any]) -> dict[str, Any]:
    """Replace infinite values, which JSON can't represent, by None: fp16's first gradient norms may be infinite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in logs.items()
    }


class Pauses(TrainerCallback):
    """Measures the evaluations and saves between steps, whose time isn't that of training."""

    def __init__(self) -> None:
        self._seconds, self._since = 0.0, time.monotonic()

    def take(self) -> float:
        """Return the seconds of all pauses since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start again; an evaluation may come before the first step."""
        self._seconds, self._since = 0.0, time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a pause; it has no length unless there is an evaluation or a save."""
        self._since = time.monotonic()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the pause until now."""
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now

    # transformers calls this at the end of a save.
    on_save = on_evaluate


class ProgressLine(TrainerCallback):
    """Progress bar with the main metrics on a terminal, one plain line per log elsewhere.

    The remaining time includes the evaluations that are still to come, the one after training too.

    Args:
        eval_tokens: Number of tokens of an evaluation.
        show: Function that returns the metrics of a log as one line; None is `format_metrics`.
    """

    def __init__(self, eval_tokens: int = 0, *, show: Callable[[dict[str, Any]], str] | None = None) -> None:
        out = console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[metrics]}"),
            console=out,
            transient=True,
            disable=not out.is_terminal,
        )
        self._plain = not out.is_terminal
        self._show = show or format_metrics
        self._task = self._progress.add_task("training", total=None, metrics="", left="")
        self._start = (0, 0.0)
        self._eval_tokens, self._tokens_per_second = eval_tokens, 0.0
        # Start and end of the evaluation that runs or ran last, its duration, and that of all evaluations.
        self._eval_times: tuple[float, float] | None = None
        self._eval_seconds, self._all_eval_seconds = 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        self._start = (state.global_step, time.monotonic())
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step)
        if state.is_world_process_zero:
            self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the bar."""
        left = f"{self._seconds_left(args, state):,.0f} s left" if state.global_step > self._start[0] else ""
        self._progress.update(self._task, completed=state.global_step, left=left)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how long the evaluation before this step took."""
        if self._eval_times is not None:
            start, end = self._eval_times
            self._eval_seconds, self._eval_times = end - start, None
            self._all_eval_seconds += end - start

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time of an evaluation's batch."""
        now = time.monotonic()
        self._eval_times = (now if self._eval_times is None else self._eval_times[0], now)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest metrics."""
        if not logs or "loss" not in logs:
            return
        metrics = self._show(logs)
        self._tokens_per_second = logs.get("tokens_per_second", 0.0)
        self._progress.update(self._task, metrics=metrics)
        if self._plain:
            left = self._seconds_left(args, state)
            say(f"step {state.global_step}/{state.max_steps}  {metrics}  {left:.0f} s left")

    def _seconds_left(self, args: TrainingArguments, state: TrainerState) -> float:
        first_step, start_time = self._start
        elapsed = time.monotonic() - start_time - self._all_eval_seconds
        per_step = elapsed / max(state.global_step - first_step, 1)
        evaluations = _evaluations_left(args, state) if self._eval_tokens else 0
        # Until an evaluation has been timed: without the backward passes a token takes about half the time.
        estimate = 0.5 * self._eval_tokens / self._tokens_per_second if self._tokens_per_second else 0.0
        return per_step * (state.max_steps - state.global_step) + evaluations * (self._eval_seconds or estimate)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar; also called when training ends with an error."""
        self._progress.stop()


def _evaluations_left(args: TrainingArguments, state: TrainerState) -> int:
    """Return the number of evaluations to come: those during training, and one after it."""
    steps_left, during = state.max_steps - state.global_step, 0
    if args.eval_strategy == "steps" and state.eval_steps:
        during = state.max_steps // state.eval_steps - state.global_step // state.eval_steps
    elif args.eval_strategy == "epoch" and steps_left:
        during = math.ceil(state.num_train_epochs - (state.epoch or 0))
    return during + 1


def format_metrics(logs: dict[str, Any]) -> str:
    """Return loss, normalized loss, mean margin of each cell that has pairs, and speed as one line."""
    parts = [f"loss {logs['loss']:.4g}"]
    if "bfpo/normalized_loss" in logs:
        parts.append(f"normalized {logs['bfpo/normalized_loss']:.3f}")
    parts += [f"{cell} {logs[key]:+.1f}" for cell in CELLS if (key := f"bfpo/margin/{cell}") in logs]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)
