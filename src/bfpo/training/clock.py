"""The clock of chat templates that write the date into prompts: a resumed run sees the date of its first start."""

import json
from datetime import datetime
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from bfpo.core.files import write_json
from bfpo.core.terminal import say
from bfpo.errors import TrainingError

FILE = "template_clock.json"


def template_clock(template: object, out: Path, resume: str | bool | None) -> datetime | None:
    """Return the time that a run's chat template sees, the same for all processes; None if it uses no clock.

    Args:
        template: Chat template.
        out: Output folder of the run.
        resume: Checkpoint to resume from, or True for the newest one in `out`.

    Raises:
        TrainingError: If the recorded time can't be read.
    """
    if "strftime_now" not in str(template):
        return None
    clock = [_recorded(Path(resume).parent if isinstance(resume, str) else out) if resume else None]
    clock = [clock[0] or datetime.now().replace(microsecond=0)]
    if PartialState().num_processes > 1:
        broadcast_object_list(clock)
    return clock[0]


def record_clock(clock: datetime | None, out: Path) -> None:
    """Record the time in the output folder."""
    if clock is not None and PartialState().is_main_process:
        write_json(out / FILE, {"strftime_now": clock.isoformat()})


def _recorded(folder: Path) -> datetime | None:
    file = folder / FILE
    try:
        clock = datetime.fromisoformat(json.loads(file.read_text(encoding="utf-8"))["strftime_now"])
    except FileNotFoundError:
        say(
            f"note: the chat template writes the current date into prompts, and {folder} doesn't record the date of "
            "its first start: if that was another one, the data differ, and the run can't be resumed"
        )
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{file} can't be read ({error}); write the time of the first start into it") from None
    say(f"the chat template sees the date of the first start: {clock}")
    return clock
