"""Checkpoints that count only when they are whole, and runs that end well when they are told to stop."""

import hashlib
import json
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bfpo.core.files import write_json
from bfpo.core.terminal import say
from bfpo.errors import RecipeError, TrainingError

MARK = "complete.json"


class CompletionMark(TrainerCallback):
    """Writes a mark into a checkpoint once every process has written its part.

    A process killed while it writes leaves a checkpoint without a mark, and resuming skips it. The mark tells the
    size of every file, and what the run must have in common with the one that goes on from here.

    Args:
        shared: World size, batch size, seed, a hash of the data: equal in both runs, or resuming is refused.
        keep: How many checkpoints to keep; None keeps all. Older ones go only after the new one is marked, and never
            the best one: transformers would delete before the mark, and a kill in between would leave none.
    """

    def __init__(self, shared: dict[str, Any], *, keep: int | None) -> None:
        self._shared, self._keep = shared, keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint of this step."""
        process = PartialState()
        process.wait_for_everyone()
        if process.is_main_process:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / MARK]
            sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
            write_json(
                folder / MARK,
                {"step": state.global_step, "threads": torch.get_num_threads(), "run": self._shared, "files": sizes},
            )
            best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
            older = sorted(number for number, _ in _checkpoints(folder.parent) if number < state.global_step)
            for number in older[: max(len(older) - self._keep + 1, 0)] if self._keep else []:
                if f"checkpoint-{number}" != best:
                    shutil.rmtree(folder.parent / f"checkpoint-{number}")
        process.wait_for_everyone()


def folder_to_resume(out: Path, asked: str | bool | None) -> Path | None:
    """Return the checkpoint to go on from; None to start at step 0.

    Args:
        out: The run's folder.
        asked: A checkpoint's folder, or True for the newest whole one of the run.

    Raises:
        TrainingError: If the folder isn't a whole checkpoint.
    """
    if isinstance(asked, str):
        folder = Path(asked)
        if fault := checkpoint_fault(folder):
            raise TrainingError(f"{folder} can't be resumed from: {fault}")
        return folder
    newest = newest_complete(out) if asked else None
    if asked and newest is None:
        say(f"no whole checkpoint in {out}: starting at step 0")
    return newest


def newest_complete(out: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, and say which newer ones are skipped and why."""
    for _, folder in sorted(_checkpoints(out), reverse=True):
        fault = checkpoint_fault(folder)
        if fault is None:
            return folder
        say(f"{folder} is skipped: {fault}")
    return None


def unmark_after(out: Path, step: int) -> None:
    """Take the marks off checkpoints behind a step: training is about to write them anew."""
    process = PartialState()
    if process.is_main_process:
        for number, folder in _checkpoints(out):
            if number > step:
                (folder / MARK).unlink(missing_ok=True)
    process.wait_for_everyone()


def _checkpoints(out: Path) -> list[tuple[int, Path]]:
    numbered = ((folder.name.removeprefix("checkpoint-"), folder) for folder in out.glob("checkpoint-*"))
    return [(int(number), folder) for number, folder in numbered if number.isdecimal() and folder.is_dir()]


def checkpoint_fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None when it is whole."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it was not written completely"
    except (OSError, json.JSONDecodeError) as error:
        return f"its mark can't be read ({error})"
    for name, size in mark["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found:,} bytes, {size:,} were written"
    return None


def check_same_run(folder: Path, shared: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another plan.

    Raises:
        RecipeError: Naming what differs.
    """
    mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    for name, now in shared.items():
        if (then := mark["run"].get(name)) != now:
            raise RecipeError(
                f"{folder} can't be continued: {name} was {then}, now it is {now}; go on as before, or start a new "
                "run in another trainer.output_dir"
            )
    if mark["threads"] != torch.get_num_threads():
        say(
            f"note: the checkpoint was made with {mark['threads']} threads, this process has "
            f"{torch.get_num_threads()}: results will agree, but not to the last bit"
        )


def start_fingerprint(model: nn.Module) -> str:
    """Return a hash of the model that training starts from: names, shapes and the first numbers of every tensor.

    The reference of a resumed run is made anew from the start model, so it must be the same one.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:8].to(torch.float64).cpu().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {first}".encode())
    return digest.hexdigest()[:16]


class StopOnSignal(TrainerCallback):
    """On SIGTERM, finishes the step, saves a checkpoint and ends training.

    Every process must get the signal, as torchrun and batch systems send it.
    """

    def __init__(self) -> None:
        self.stopped_at: int | None = None
        self._asked = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signal over."""
        self._previous = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End here if the signal came to any process."""
        process = PartialState()
        asked = torch.tensor(float(self._asked), device=process.device)
        if process.num_processes > 1:
            torch.distributed.all_reduce(asked)
        if asked > 0 and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signal back."""
        signal.signal(signal.SIGTERM, self._previous)
