"""Checkpoints that are used only if complete, and runs that save and stop on SIGTERM."""

import hashlib
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bfpo.core.files import content_hash, file_hashes, parse_json, write_json
from bfpo.core.terminal import say
from bfpo.errors import ModelError, RecipeError, TrainingError

MARK = "complete.json"
CHECKPOINT_KEYS = {"step", "threads", "run"}
# Settings that the checkpoints of earlier versions don't have.
_LATER_SETTINGS = ("signals", "trained", "adapter scales", "optimizer")


class CompletionMark(TrainerCallback):
    """Writes a mark into a checkpoint once every process has written its part.

    A process that is killed while it writes leaves a checkpoint without a mark, which is skipped on resuming. The
    mark contains the size and the SHA-256 of every file, and the settings that a resumed run must share.

    Args:
        settings: Function that returns the settings that a resumed run must share: world size, batch size, seed, a
            hash of the data.
        keep: Number of checkpoints to keep; None keeps all. Older ones are deleted only after the new one is marked,
            and the best one never: transformers deletes before the mark, and a kill in between would leave none.
    """

    def __init__(self, settings: Callable[[], dict[str, Any]], *, keep: int | None) -> None:
        self._settings, self._keep = settings, keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint of this step, then delete older ones."""
        process = PartialState()
        process.wait_for_everyone()
        if process.is_main_process:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            metadata = {"step": state.global_step, "threads": torch.get_num_threads(), "run": self._settings()}
            files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / MARK]
            write_mark(folder, files, metadata)
            best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
            self._delete_older(folder.parent, state.global_step, best)
        process.wait_for_everyone()

    def _delete_older(self, out: Path, step: int, best: str | None) -> None:
        if not self._keep:
            return
        older = sorted(number for number, _ in _checkpoints(out) if number < step)
        for number in older[: max(len(older) - self._keep + 1, 0)]:
            if f"checkpoint-{number}" != best:
                shutil.rmtree(out / f"checkpoint-{number}")


def find_checkpoint(out: Path, requested: str | bool | None) -> Path | None:
    """Return the checkpoint to resume from; None to start at step 0.

    Args:
        out: Output folder of the run.
        requested: Folder of a checkpoint, or True for the run's newest complete one.

    Raises:
        TrainingError: If the requested folder isn't a complete checkpoint.
    """
    if isinstance(requested, str):
        folder = Path(requested)
        if fault := checkpoint_fault(folder):
            raise TrainingError(f"{folder} can't be resumed from: {fault}")
        return folder
    if not requested:
        return None
    newest = newest_complete(out)
    if newest is None:
        say(f"no complete checkpoint in {out}: starting at step 0")
    return newest


def newest_complete(out: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, and print why newer ones are skipped."""
    for _, folder in sorted(_checkpoints(out), reverse=True):
        fault = checkpoint_fault(folder)
        if fault is None:
            return folder
        say(f"{folder} is skipped: {fault}")
    return None


def micro_batch_of_run(out: Path, requested: str | bool | None) -> int | None:
    """Return the micro-batch of the checkpoint that a run resumes from; None if there is none with a readable mark.

    Args:
        out: Output folder of the run.
        requested: Folder of a checkpoint, or True for the run's newest one. All of a run have the same.
    """
    if not requested:
        return None
    folders = [folder for _, folder in sorted(_checkpoints(out), reverse=True)]
    for folder in [Path(requested)] if isinstance(requested, str) else folders:
        try:
            return int(read_mark(folder)["run"]["per_device_train_batch_size"])
        except (OSError, ValueError, LookupError, TypeError):
            # Resuming says what is wrong with it.
            continue
    return None


def unmark_after(out: Path, step: int) -> None:
    """Remove the marks of checkpoints after a step: training is about to overwrite them."""
    process = PartialState()
    if process.is_main_process:
        for number, folder in _checkpoints(out):
            if number > step:
                (folder / MARK).unlink(missing_ok=True)
    process.wait_for_everyone()


def _checkpoints(out: Path) -> list[tuple[int, Path]]:
    numbered = ((folder.name.removeprefix("checkpoint-"), folder) for folder in out.glob("checkpoint-*"))
    return [(int(number), folder) for number, folder in numbered if number.isdecimal() and folder.is_dir()]


def write_mark(folder: Path, files: list[Path], metadata: dict[str, Any]) -> None:
    """Write the mark of a complete folder: sizes and hashes of its files, and other metadata.

    Args:
        folder: Folder to mark.
        files: Its files; the mark isn't one of them.
        metadata: Other content of the mark.
    """
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    mark = {**metadata, "files": sizes, "sha256": file_hashes(folder, sizes)}
    write_json(folder / MARK, {**mark, "checksum": content_hash(mark)})


def checkpoint_fault(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is complete and undamaged.

    The main process reads the files, and all processes get its result.
    """
    process = PartialState()
    result = [_find_fault(folder, CHECKPOINT_KEYS) if process.is_main_process else None]
    if process.num_processes > 1:
        broadcast_object_list(result)
    return result[0]


def check_marked(folder: Path, *, remedy: str) -> None:
    """Check that a folder of a finished model, marked by `write_mark`, is undamaged.

    Args:
        folder: Folder of an earlier version's model, which has no mark, or of a marked one.
        remedy: What to do if it is damaged, for the message.

    Raises:
        ModelError: If it is damaged.
    """
    if not (folder / MARK).exists():
        say(f"note: {folder} was made by an earlier version without hashes, so its files can't be verified")
    elif fault := _find_fault(folder, set()):
        raise ModelError(f"{folder} is damaged: {fault}; {remedy}")


def _find_fault(folder: Path, keys: set[str]) -> str | None:
    try:
        mark = read_mark(folder)
    except FileNotFoundError:
        return "it was not written completely"
    except (OSError, ValueError) as error:
        return f"its mark can't be read ({error})"
    # Marks of earlier versions have no hashes.
    if set(mark) not in (keys | {"files"}, keys | {"files", "sha256", "checksum"}):
        return f"its mark {MARK} is damaged"
    checksum = mark.pop("checksum", None)
    if not isinstance(mark["files"], dict) or checksum not in (None, content_hash(mark)):
        return f"its mark {MARK} is damaged"
    for name, size in mark["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (actual := (folder / name).stat().st_size) != size:
            return f"{name} has {actual:,} bytes, {size:,} were written"
    if checksum is None:
        say(f"note: {folder} was written by an earlier version without hashes, so its files can't be verified")
        return None
    try:
        hashes = file_hashes(folder, mark["files"])
    except OSError as error:
        return f"{error.filename or 'a file'} can't be read ({error.strerror})"
    damaged = [name for name, value in hashes.items() if value != mark["sha256"][name]]
    return f"the content of {', '.join(damaged)} is not what was written" if damaged else None


def read_mark(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's mark.

    Raises:
        OSError: If it can't be read.
        ValueError: If it isn't a JSON object.
    """
    mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    if not isinstance(mark, dict):
        raise ValueError(f"{type(mark).__name__}, not an object")
    return mark


def check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to a run with the same settings.

    Args:
        folder: Folder of a complete checkpoint.
        settings: Settings of the run that resumes from it.

    Raises:
        RecipeError: If a setting differs; the message names it.
    """
    mark = read_mark(folder)
    for name in {**settings, **mark["run"]}:
        if name in _LATER_SETTINGS and name not in mark["run"]:
            # A checkpoint of an earlier version.
            continue
        previous, value = mark["run"].get(name, "not set"), settings.get(name, "not set")
        if previous == value:
            continue
        if isinstance(previous, str):
            # Earlier versions kept whole numbers of a loss as integers: b1=5 is b1=5.0.
            previous = re.sub(r"=(-?\d+)(?=[,)])", r"=\1.0", previous)
        if previous != value and previous != _without_later_fields(str(value), str(previous)):
            raise RecipeError(
                f"{folder} can't be continued: {name} was {previous}, now it is {value}; resume with the old value, "
                "or start a new run in another trainer.output_dir"
            )


def say_resuming(folder: Path) -> None:
    """Print the checkpoint that a run goes on from, and whether results will agree to the last bit."""
    say(f"resuming from {folder}")
    if (threads := read_mark(folder)["threads"]) != torch.get_num_threads():
        say(
            f"note: the checkpoint was written with {threads} threads, this process has "
            f"{torch.get_num_threads()}: results agree, but not to the last bit"
        )


def optimizer_settings(args: TrainingArguments) -> str:
    """Return what the optimizer's state restores when a run is resumed, whatever the arguments say then."""
    names = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    values = ", ".join(f"{name}={getattr(args, name)}" for name in names)
    return f"{getattr(args.optim, 'value', args.optim)}({values})"


def adapter_scales(model: nn.Module) -> list[float]:
    """Return the distinct factors by which adapters of a model are scaled, such as alpha / r of LoRA."""
    scalings = (getattr(module, "scaling", None) for module in model.modules())
    scales = (scale for scaling in scalings if isinstance(scaling, dict) for scale in scaling.values())
    return sorted(set(map(float, scales)))


def _without_later_fields(loss: str, previous: str) -> str:
    """Return the text of a loss without the fields at their defaults that losses of earlier versions didn't have."""
    added = {"safety_weight": 0.0, "label_errors": None, "graded": False, "tail": 1.0, "sft_weight": 0.0}
    for name, default in added.items():
        if f"{name}=" not in previous:
            loss = loss.replace(f", {name}={default}", "")
    return loss


def start_fingerprint(model: nn.Module) -> str:
    """Return a hash of the start model: names, shapes and the first values of every parameter.

    A resumed run takes its reference from the start model again, so it must be the same model.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        first_values = parameter.detach().flatten()[:8].to(torch.float64).cpu().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {first_values}".encode())
    return digest.hexdigest()[:16]


def check_state(folder: Path) -> None:
    """Check that the state in a checkpoint has what the next checkpoint needs, which transformers reads only then.

    Raises:
        TrainingError: If it has weights only.
        ValueError: If it hasn't.
    """
    # DeepSpeed keeps the optimizer and the schedule in a folder of its own.
    if not (folder / "scheduler.pt").exists() and not any(folder.glob("global_step*")):
        raise TrainingError(
            f"{folder} was saved with trainer.save_only_model, without the optimizer's state, so it can't be resumed "
            "from; it can be the model.path of a new run"
        )
    state = parse_json((folder / "trainer_state.json").read_text(encoding="utf-8"))
    callbacks = state.get("stateful_callbacks") if isinstance(state, dict) else None
    if not isinstance(callbacks, dict) or "TrainerControl" not in callbacks:
        raise ValueError("trainer_state.json has no state of TrainerControl")


class StopOnSignal(TrainerCallback):
    """Finishes the step, saves a checkpoint and ends training on SIGTERM.

    The signal may reach any of the processes; torchrun and batch systems send it to all.
    """

    def __init__(self) -> None:
        self.stopped_at: int | None = None
        self._received = False
        self._previous_handler: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the signal handler."""
        self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after this step if any process received the signal."""
        process = PartialState()
        received = torch.tensor(float(self._received), device=process.device)
        if process.num_processes > 1:
            torch.distributed.all_reduce(received)
        if received > 0 and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the previous signal handler."""
        signal.signal(signal.SIGTERM, self._previous_handler)
