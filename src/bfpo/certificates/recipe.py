"""Schema of a recipe of `bfpo certify`."""

from typing import Literal

from pydantic import Field, model_validator

from bfpo.config.recipes import Count, Section

Precision = Literal["float32", "bfloat16", "int8"]


class StatesModelSection(Section):
    """Model whose hidden states the head reads."""

    path: str
    """Folder or hub id."""
    revision: str | None = None
    """Hub revision."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights."""


class BoxesSection(Section):
    """Boxes of hidden states, for each group of paraphrases one of every kind."""

    hull: bool = True
    """Whether to certify the hull of the states of the paraphrases that aren't held out."""
    radius: float | None = Field(None, gt=0)
    """Half the width of a box around the state of the first paraphrase, in standard deviations of each coordinate
    over the paraphrases of a request."""
    precisions: list[Precision] = Field(default=[])
    """Precisions of the model, at least two: the hull of the states of the first paraphrase in all of them. int8
    stands for linear layers whose weights are rounded to 255 levels for each output."""

    @model_validator(mode="after")
    def _check(self) -> "BoxesSection":
        if self.precisions and len(set(self.precisions)) < 2:
            raise ValueError(f"precisions is {self.precisions}; a hull needs at least two different ones")
        if not (self.hull or self.radius or self.precisions):
            raise ValueError("no boxes; set hull, radius or precisions")
        return self


class RepairSection(Section):
    """Retraining of the head on counter-examples."""

    completions: str
    """Completions of the model, such as those that the head was fitted on: the clean data."""
    verdicts: str
    """Verdicts on them."""
    clean_weight: float = Field(1.0, gt=0)
    """Weight of the loss on the clean data beside that on the counter-examples."""
    keep_accuracy: float = Field(0.99, gt=0, le=1)
    """Smallest accuracy on held-out clean data, as a share of the accuracy before the repair; a round below it is
    rolled back and ends the repair."""
    rounds: Count = 10
    """Maximum number of rounds."""
    unseen: float = Field(0.2, ge=0, lt=1)
    """Share of the groups whose counter-examples the repair doesn't see; their boxes are counted apart."""
    seed: int = 0
    """Seed of the batches."""


class CertifyRecipe(Section):
    """`bfpo certify`: bounds of a head's score over boxes of hidden states."""

    out: str
    """Output folder; an earlier run in it is resumed."""
    head: str
    """File of a cost head, as guards use it; or the folder of a cost model of `bfpo score train`."""
    model: StatesModelSection | None = None
    """Model of the cost head; left out for a cost model, which is its own."""
    paraphrases: str
    """File of prompts with the columns `group` (at least three prompts for each request) and `kind`: the head should
    call states of harmful ones unsafe, and those of others safe."""
    holdout: float = Field(0.25, gt=0, lt=1)
    """Share of the paraphrases of each group, at least one, that make no box: how many of them are in the box says
    what it means."""
    answer: str = ""
    """Text with which the answer begins: the state after it is certified, by default the one after the prompt. A cost
    model reads a whole answer."""
    threshold: float = Field(0.5, gt=0, lt=1)
    """Probability above which the head calls a state unsafe; `at_most` of the guard `project`."""
    boxes: BoxesSection = BoxesSection()
    """Boxes to certify."""
    time_limit: float = Field(10.0, gt=0)
    """Maximum time of the exact bound of a box, in seconds; a box that needs more stays undecided."""
    repair: RepairSection | None = None
    """Retraining on counter-examples; default none."""
