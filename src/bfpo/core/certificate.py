"""`certificate.json`: what was proved about the scores of a head over boxes of hidden states.

`bfpo certify` writes the file, and the report shows it.
"""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from bfpo.core.file_rows import FiniteFloat
from bfpo.core.files import write_json
from bfpo.core.typed_json import read_versioned
from bfpo.errors import DataError

BoxKind = Literal["hull", "radius", "precisions"]
"""`hull`: of the paraphrases of a request. `radius`: around one of them. `precisions`: hull of one of them in several
precisions."""
Outcome = Literal["certified", "counter-example", "undecided"]
Method = Literal["closed form", "interval", "relaxation", "milp"]
"""What decided a box, from the loosest bound of a head with a hidden layer to the exact one."""

FILE_NAME = "certificate.json"
SCHEMA = 1
CLAIM = (
    "This head, these boxes: for every hidden state in a certified box the head's score is on the expected side of "
    "the threshold. Nothing is said about other hidden states, about answers, or about the model."
)


@dataclass(frozen=True, slots=True)
class BoxResult:
    """What was found about a box.

    Args:
        group: Group of the paraphrases that the box is about.
        kind: Kind of the box.
        expects_unsafe: Whether the head should call its states unsafe (a harmful request) or safe.
        outcome: Whether it does for all of them, a state in the box for which it doesn't was found, or neither.
        method: What decided it.
        bound: Proved bound of the score (a logit) over the box: no state scores lower if `expects_unsafe`, else none
            higher. It allows for the rounding of a forward pass in float32.
        found: Score of the worst state that was found, by a forward pass; None if none was needed.
        width: Mean width of the box over the coordinates, in standard deviations of the paraphrases of a request.
        held_out: Number of the request's held-out paraphrases.
        held_out_inside: How many of them are in the box.
        coordinates_inside: Share of the coordinates of held-out paraphrases that are in the box.
        seen: Whether the repair had the box's counter-examples.
    """

    group: str
    kind: BoxKind
    expects_unsafe: bool
    outcome: Outcome
    method: Method
    bound: FiniteFloat
    found: FiniteFloat | None
    width: FiniteFloat
    held_out: int
    held_out_inside: int
    coordinates_inside: FiniteFloat
    seen: bool


@dataclass(frozen=True, slots=True)
class HeadFile:
    """A head.

    Args:
        path: Its file, or the folder of a score model.
        identity: Hash of its layers and weights.
        layers: Layers whose hidden states it reads, side by side.
        width: Width of the states of a layer.
        units: Number of rectified linear units; 0 for a linear head.
    """

    path: str
    identity: str
    layers: tuple[int, ...]
    width: int
    units: int

    def in_words(self) -> str:
        """Return the head in a few words."""
        kind = f"{self.units} units" if self.units else "linear"
        layers = f"layer{'s' * (len(self.layers) > 1)} {', '.join(map(str, self.layers))}"
        return f"{self.path} ({kind}, {layers})"


@dataclass(frozen=True, slots=True)
class RepairRound:
    """A round of the repair; round 0 is the head before it.

    Args:
        round: Number.
        counter_examples: Number of counter-examples that the head was trained on.
        accuracy: Share of the held-out clean states whose score is on the side of their answer's verdict.
        loss: Mean binary cross-entropy on them, in nats.
        kept: Whether the accuracy was high enough; if not, the head was rolled back and not certified.
        certified: Number of certified boxes of those that the repair sees; None for a head that was rolled back.
        boxes: Number of the boxes that the repair sees.
    """

    round: int
    counter_examples: int
    accuracy: FiniteFloat
    loss: FiniteFloat
    kept: bool
    certified: int | None
    boxes: int


SUMMARY_HEADINGS = (
    "boxes",
    "number",
    "certified",
    "counter-example",
    "undecided",
    "width (sd)",
    "held-out paraphrases inside",
    "of their coordinates",
)
"""Headings of `BoxSummary.cells`."""


@dataclass(frozen=True, slots=True)
class BoxSummary:
    """Counts of boxes of a kind.

    Args:
        name: Kind of the boxes, on which side they should be, and whether the repair saw them.
        boxes: Number of boxes.
        certified: How many are certified.
        counter_examples: How many have a counter-example.
        undecided: How many are undecided.
        width: Mean width, see `BoxResult`.
        held_out: Number of held-out paraphrases.
        held_out_inside: How many of them are in the box of their request.
        coordinates_inside: Mean share of their coordinates that are.
    """

    name: str
    boxes: int
    certified: int
    counter_examples: int
    undecided: int
    width: float
    held_out: int
    held_out_inside: int
    coordinates_inside: float

    def cells(self) -> tuple[str, ...]:
        """Return the counts as a row of a table; what is certified stands beside what the boxes contain."""
        return (
            self.name,
            f"{self.boxes:,}",
            f"{self.certified:,} ({self.certified / self.boxes:.1%})",
            f"{self.counter_examples:,}",
            f"{self.undecided:,}",
            f"{self.width:.3g}",
            f"{self.held_out_inside:,} of {self.held_out:,} ({self.held_out_inside / self.held_out:.1%})",
            f"{self.coordinates_inside:.1%}",
        )


@dataclass(frozen=True, slots=True)
class Certificate:
    """Content of `certificate.json`.

    Args:
        model: Path of the model.
        model_identity: Hash or name of its content.
        head: The head that was given.
        repaired: The head after the repair, to which `boxes` then belong; None without one.
        threshold: Logit above which the head calls a state unsafe.
        boxes: What was found about each box.
        repair: Rounds of the repair; empty without one.
        precisions: Precisions that were measured; empty without boxes of them.
        settings: The recipe.
        files: SHA-256 of the files that were read, by path.
        versions: Versions of the packages.
        warnings: What a reader must know before relying on the numbers.
        created: Time, ISO 8601.
        claim: What is certified, in words.
        schema: Schema of the file.
    """

    model: str
    model_identity: str
    head: HeadFile
    repaired: HeadFile | None
    threshold: FiniteFloat
    boxes: list[BoxResult]
    repair: list[RepairRound]
    precisions: list[str]
    settings: dict[str, Any]
    files: dict[str, str]
    versions: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    claim: str = CLAIM
    schema: int = SCHEMA

    @property
    def certified_head(self) -> HeadFile:
        """The head that `boxes` are about."""
        return self.repaired or self.head

    def summaries(self) -> list[BoxSummary]:
        """Return the counts by kind of box and expected side, after a repair apart for boxes that it didn't see."""
        parts: dict[str, list[BoxResult]] = {}
        for box in self.boxes:
            name = f"{box.kind}, expected {'unsafe' if box.expects_unsafe else 'safe'}"
            if self.repair:
                name += f", {'seen' if box.seen else 'not seen'} by the repair"
            parts.setdefault(name, []).append(box)
        return [_summarize(name, boxes) for name, boxes in parts.items()]

    def write(self, folder: Path) -> Path:
        """Write `certificate.json` into a folder and return its path."""
        write_json(folder / FILE_NAME, asdict(self))
        return folder / FILE_NAME


def _summarize(name: str, boxes: list[BoxResult]) -> BoxSummary:
    outcomes = [box.outcome for box in boxes]
    held_out = sum(box.held_out for box in boxes)
    return BoxSummary(
        name,
        len(boxes),
        outcomes.count("certified"),
        outcomes.count("counter-example"),
        outcomes.count("undecided"),
        sum(box.width for box in boxes) / len(boxes),
        held_out,
        sum(box.held_out_inside for box in boxes),
        sum(box.coordinates_inside * box.held_out for box in boxes) / held_out,
    )


def read_certificate(path: Path) -> Certificate:
    """Read a `certificate.json`.

    Raises:
        DataError: If the file is missing, malformed, or of another schema.
    """
    remedy = "run `bfpo certify` again"
    try:
        certificate = read_versioned(path, Certificate, schema=SCHEMA, remedy=remedy)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); `bfpo certify` writes this file") from None
    # A share of boxes without this number would say nothing about texts.
    if any(box.held_out < 1 for box in certificate.boxes):
        raise DataError(f"{path}: a box has no held-out paraphrases; {remedy}")
    return certificate
