"""The output folder of a run: begun without deleting anything, ended with one rename per file."""

import os
import shutil
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
from bfpo.core.files import write_json, write_text
from bfpo.core.terminal import say
from bfpo.errors import Stopped, TrainingError
from bfpo.training.callbacks import LiveLine, MetricsFile
from bfpo.training.card import model_card
from bfpo.training.checkpoints import StopOnSignal
from bfpo.training.manifest import git_revision, hardware, versions
from bfpo.training.stream_trainer import StreamTrainer


def begin_output(out: Path, recipe: Section, *, resuming: bool) -> Path:
    """Make the output folder and write the resolved recipe into it.

    A finished or half-finished run that stands there is moved aside unless it is resumed: nothing is deleted.
    """
    # Its bars for loading and saving weights would break the run's own lines.
    disable_progress_bar()
    state = PartialState()
    if state.is_main_process:
        earlier = (out / "run.json").exists() or (out / "metrics.jsonl").exists()
        if earlier and not resuming:
            aside = _free_name(out)
            out.rename(aside)
            say(f"the earlier run in {out} was moved to {aside}")
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "recipe.resolved.yaml", dump_recipe(recipe))
    state.wait_for_everyone()
    return out


def main_process_renames(folder: Path, name: Path) -> None:
    """Give a finished folder its final name, once, while every process waits."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        folder.rename(name)
    state.wait_for_everyone()


def _free_name(out: Path) -> Path:
    number = 1
    while (aside := out.with_name(f"{out.name}.earlier-{number}")).exists():
        number += 1
    return aside


class RunRecord:
    """What `run.json` will hold, begun before training so that the code's revision is the one that trained.

    Args:
        command: The command's name.
        recipe: What was asked for.
        out: The output folder.
        trainer: Given the callbacks that write and show metrics and that end it on a signal.
    """

    def __init__(self, command: str, recipe: Section, out: Path, trainer: Trainer) -> None:
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
        self._trainer, self._signal = trainer, StopOnSignal()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self._signal)
        trainer.add_callback(MetricsFile(out / "metrics.jsonl"))
        self._line = LiveLine()
        trainer.add_callback(self._line)

    def train(self, resume: str | bool | None) -> TrainOutput:
        """Train; a full disk or a signal ends the run with a message, and leaves its checkpoints.

        Raises:
            TrainingError: If something couldn't be written.
            Stopped: If the run was told to stop; it has saved.
        """
        hint = "go on with trainer.resume_from_checkpoint=true"
        try:
            result = self._trainer.train(resume_from_checkpoint=resume)
        except OSError as error:
            raise TrainingError(f"{error.filename or self._out}: {error.strerror or error}; {hint}") from error
        except (RuntimeError, SafetensorError) as error:
            # torch and safetensors have no class of their own for a failed write; these are their words for one.
            if not any(word in str(error) for word in ("inline_container", "PytorchStreamWriter", "I/O error")):
                raise
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"{self._out}: a checkpoint can't be written, is the disk full? ({reason}); {hint}"
            ) from error
        finally:
            self._line.close()
        if self._signal.stopped_at is not None:
            raise Stopped(f"told to stop: saved at step {self._signal.stopped_at} in {self._out}; {hint}")
        return result

    def finish(self, sources: list[dict[str, Any]], **results: Any) -> dict[str, Any]:
        """Add the results, write the model card and `run.json`, and return what the latter holds.

        Args:
            sources: Reports of the data's sources, for the card.
            results: What to add.
        """
        self._content |= results
        if PartialState().is_main_process:
            write_text(self._out / "README.md", model_card(self._content, sources, self._out))
            write_json(self._out / "run.json", self._content)
        return self._content


def say_layout(trainer: StreamTrainer) -> None:
    """Tell how tokens are fed, and how that was checked."""
    # Asked first: it settles the layout, and tells of a fallback itself.
    check = trainer.packing_check
    if check is not None:
        say(f"layout: packed rows of up to {trainer.layout.max_tokens_per_pack:,} tokens; {check}")


def save_final(trainer: Trainer, out: Path) -> None:
    """Save the final model aside, then rename its files into the output folder.

    A reader of the folder never sees a half-written weight file.
    """
    state = PartialState()
    aside = out / ".final"
    if state.is_main_process and aside.exists():
        shutil.rmtree(aside)
    state.wait_for_everyone()
    if trainer.is_fsdp_enabled:
        # Sharded checkpoints are fine, but the final weights are for any program to load.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(aside))
    state.wait_for_everyone()
    if state.is_main_process:
        for file in sorted(aside.iterdir()):
            os.replace(file, out / file.name)
        aside.rmdir()
