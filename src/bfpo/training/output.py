"""The output folder of a run. Earlier runs are moved aside, and files are renamed into place once complete."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils.logging import disable_progress_bar

from bfpo.config.loading import dump_recipe
from bfpo.config.recipes import Section
from bfpo.core.environment import git_revision, hardware, versions
from bfpo.core.files import write_json, write_text
from bfpo.core.locks import exclusive_folder
from bfpo.core.terminal import say, timed
from bfpo.errors import RecipeError, Stopped, TrainingError
from bfpo.training.callbacks import MetricsFile, ProgressLine, format_metrics
from bfpo.training.card import model_card
from bfpo.training.checkpoints import StopOnSignal
from bfpo.training.stream_trainer import StreamTrainer

_RECIPE, _RECORDS = "recipe.resolved.yaml", ("run.json", "metrics.jsonl")
_MODEL_FILES = ("config.json", "adapter_config.json", "*.safetensors", "*.bin", "checkpoint-*")


@contextmanager
def exclusive_output(out: Path) -> Iterator[None]:
    """Keep other runs out of an output folder inside a `with` block.

    The main process holds the lock for all processes of a distributed run.

    Args:
        out: Output folder.

    Raises:
        RecipeError: If another run holds the lock.
    """
    if not PartialState().is_main_process:
        yield
        return
    message = f"trainer.output_dir: another run is training in {out}; wait for it, or name another folder"
    with exclusive_folder(out, message):
        yield


def check_output(out: Path, model: str | None) -> None:
    """Check that a run may have this output folder, before anything is read or trained.

    Args:
        out: Output folder.
        model: Folder, file or hub id of the start model; None if it is made from a configuration.

    Raises:
        RecipeError: If it is the start model's folder, or has a model that isn't of an earlier run.
    """
    if model is not None and out.is_dir() and Path(model).is_dir() and out.samefile(model):
        raise RecipeError(f"trainer.output_dir: {out} is the start model, model.path; name another folder")
    if any((out / name).exists() for name in (_RECIPE, *_RECORDS)):
        return
    if (file := next((file for pattern in _MODEL_FILES for file in sorted(out.glob(pattern))), None)) is not None:
        raise RecipeError(
            f"trainer.output_dir: {file} isn't of an earlier run of bfpo, and training would replace it; name "
            "another folder, or move it"
        )


def goes_on(out: Path, resume: str | bool | None, checkpoint: Path | None) -> bool:
    """Return whether a run goes on in its folder, from a checkpoint there or where it ended before its first one.

    Args:
        out: Output folder.
        resume: What the recipe asks to resume from.
        checkpoint: The checkpoint that `find_checkpoint` found for it.
    """
    if checkpoint is not None:
        return checkpoint.resolve().parent == out.resolve()
    return bool(resume) and not (out / _RECORDS[0]).exists()


def prepare_output(out: Path, recipe: Section, *, resuming: bool) -> Path:
    """Create the output folder and write the resolved recipe into it.

    An earlier run in the folder, finished or not, is moved aside unless it is resumed; nothing is deleted. If `out`
    is a link, the folder that it points to is used, and moved aside next to itself; the link stays.

    Args:
        out: Output folder.
        recipe: Recipe of the run.
        resuming: Whether the earlier run in the folder goes on; see `goes_on`.
    """
    # transformers' bars for loading and saving weights would break the run's own lines.
    disable_progress_bar()
    state = PartialState()
    if state.is_main_process:
        has_earlier_run = any((out / name).exists() for name in _RECORDS) or any(out.glob("checkpoint-*"))
        # The folder's own path: a link, or `.`, can't be moved.
        target = out.resolve()
        if has_earlier_run and not resuming:
            new_path = _free_path(target)
            target.rename(new_path)
            say(f"the earlier run in {out} was moved to {new_path}")
        target.mkdir(parents=True, exist_ok=True)
        write_text(out / _RECIPE, dump_recipe(recipe))
    state.wait_for_everyone()
    return out


def rename_on_main_process(folder: Path, target: Path) -> None:
    """Rename a finished folder on the main process, while the others wait."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        folder.rename(target)
    state.wait_for_everyone()


def _free_path(out: Path) -> Path:
    number = 1
    while (path := out.with_name(f"{out.name}.earlier-{number}")).exists():
        number += 1
    return path


class RunRecord:
    """The content of `run.json`, started before training so that it names the revision of the code that trained.

    Args:
        command: Name of the command.
        recipe: Recipe of the run.
        out: Output folder.
        trainer: Trainer; gets the callbacks that write and show metrics and stop on a signal.
        show: Function that returns the metrics of a log as one line.
    """

    def __init__(
        self,
        command: str,
        recipe: Section,
        out: Path,
        trainer: Trainer,
        *,
        show: Callable[[dict[str, Any]], str] = format_metrics,
    ) -> None:
        self._out = out
        self._content: dict[str, Any] = {
            "schema": 1,
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_revision": git_revision(),
            "versions": versions(),
            "hardware": hardware(),
            "recipe": recipe.model_dump(mode="json"),
        }
        eval_tables = trainer.eval_tables.values() if isinstance(trainer, StreamTrainer) else ()
        self._progress = ProgressLine(sum(len(table.ids) for table in eval_tables), show=show)
        self._trainer, self._stop = trainer, StopOnSignal()
        trainer.remove_callback(PrinterCallback)
        for callback in (self._stop, MetricsFile(out / "metrics.jsonl"), self._progress):
            trainer.add_callback(callback)

    def train(self, checkpoint: Path | None) -> TrainOutput:
        """Train. On a full disk or a signal the run ends with a message and keeps its checkpoints.

        Args:
            checkpoint: Folder of the checkpoint to resume from; None to start at step 0.

        Raises:
            TrainingError: If a file couldn't be written.
            Stopped: If the run got SIGTERM; a checkpoint is saved.
        """
        hint = "resume with trainer.resume_from_checkpoint=true"
        try:
            result = self._trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except OSError as error:
            raise TrainingError(f"{error.filename or self._out}: {error.strerror or error}; {hint}") from error
        except (RuntimeError, SafetensorError) as error:
            # torch and safetensors have no class for a failed write, so it is recognized by its message.
            if not any(text in str(error) for text in ("inline_container", "PytorchStreamWriter", "I/O error")):
                raise
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"{self._out}: a checkpoint can't be written, is the disk full? ({reason}); {hint}"
            ) from error
        finally:
            self._progress.close()
        if self._stop.stopped_at is not None:
            raise Stopped(f"stopped by SIGTERM: saved at step {self._stop.stopped_at} in {self._out}; {hint}")
        return result

    def finish(self, sources: list[dict[str, Any]], **results: Any) -> dict[str, Any]:
        """Add the results, write the model card and `run.json`, and return the content of `run.json`.

        Args:
            sources: Reports of the data sources, for the card.
            results: Results to add.
        """
        self._content |= results
        if PartialState().is_main_process:
            write_text(self._out / "README.md", model_card(self._content, sources, self._out))
            write_json(self._out / "run.json", self._content)
        return self._content


def report_layout(trainer: StreamTrainer) -> None:
    """Print how tokens are fed and the result of the packing check; a fallback to padded rows prints its own line."""
    check = trainer.packing_check
    if check is not None:
        say(f"layout: packed rows of up to {trainer.layout_section.max_tokens_per_pack:,} tokens; {check}")


def start_run(
    command: str, recipe: Section, trainer: StreamTrainer, resume: str | bool | None
) -> tuple[RunRecord, Path | None]:
    """Prepare the output folder of a run whose trainer is made; until here a run that is refused leaves it as it is.

    Args:
        command: Name of the command.
        recipe: Recipe of the run.
        trainer: Its trainer, with the micro-batch that it will have.
        resume: What the recipe asks to resume from.

    Returns:
        The record of the run, and the checkpoint to resume from.

    Raises:
        RecipeError: If the checkpoint belongs to a run with other settings.
        TrainingError: If the folder to resume from isn't a complete checkpoint.
    """
    out = Path(str(trainer.args.output_dir))
    checkpoint = trainer.find_checkpoint(resume)
    prepare_output(out, recipe, resuming=goes_on(out, resume, checkpoint))
    return RunRecord(command, recipe, out, trainer), checkpoint


def save_final(trainer: Trainer, out: Path) -> None:
    """Save the final model to a temporary folder, then rename its files into the output folder.

    The output folder never contains an incomplete weight file.
    """
    with timed(f"saving the weights in {out}"):
        _save_final(trainer, out)


def _save_final(trainer: Trainer, out: Path) -> None:
    state = PartialState()
    temporary = out / ".final"
    if state.is_main_process and temporary.exists():
        shutil.rmtree(temporary)
    state.wait_for_everyone()
    if trainer.is_fsdp_enabled:
        # Checkpoints may be sharded, but the final weights must load anywhere.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(temporary))
    state.wait_for_everyone()
    if state.is_main_process:
        for file in sorted(temporary.iterdir()):
            os.replace(file, out / file.name)
        temporary.rmdir()
