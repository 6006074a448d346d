"""`multiplier.json`: what an online run knows besides weights, optimizer and random numbers. TRL doesn't save it."""

from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bfpo.core.file_rows import FiniteFloat
from bfpo.core.files import parse_json, write_json
from bfpo.errors import TrainingError
from bfpo.losses.combine import Combiner
from bfpo.online.watch import WatchedBatch

FILE_NAME = "multiplier.json"


@dataclass
class RunState:
    """State of a run after a step.

    Args:
        combiner: Values of the combiner's fields that change, such as `multiplier`; None where none is known yet.
        samples: Number of samples so far.
        scorer_calls: Number of verdicts of the scorers so far.
        missing: Number of samples that were left out, by reason.
        watched: Batches that the held-out judge read.
    """

    combiner: dict[str, FiniteFloat | None] = field(default_factory=dict)
    samples: int = 0
    scorer_calls: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    watched: list[WatchedBatch] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write `multiplier.json` into the folder of a checkpoint."""
        content = asdict(self) | {"watched": [batch._asdict() for batch in self.watched]}
        write_json(folder / FILE_NAME, content)

    def keep(self, combiner: Combiner) -> None:
        """Note the fields of a combiner that change."""
        self.combiner = {name: getattr(combiner, name) for name in combiner.state}

    def restore(self, combiner: Combiner) -> Combiner:
        """Return a combiner with the noted fields."""
        return replace(combiner, **self.combiner)


@cache
def _adapter() -> TypeAdapter[RunState]:
    return TypeAdapter(RunState)


def read_state(folder: Path) -> RunState:
    """Read the state in the folder of a checkpoint.

    Raises:
        TrainingError: If it is missing or malformed.
    """
    path = folder / FILE_NAME
    try:
        return _adapter().validate_python(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValidationError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise TrainingError(
            f"{path} can't be read ({reason}); delete the checkpoint to resume from the previous one"
        ) from None
