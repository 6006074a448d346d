"""Keys of `bfpo score train` with `per_token: true`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from bfpo.config.recipes import Count, ModelSection, Section

Layer = Annotated[int, Field(ge=-1)]


class PerTokenRecipe(Section):
    """`bfpo score train`, per token: a cost head on a model's own states, for its guards."""

    model: ModelSection
    """The model, which isn't changed: a folder or hub id in `path`."""
    per_token: Literal[True]
    """Marks this recipe."""
    completions: str
    """File of answers of this model, sampled as its guard will sample, to harmful and benign prompts."""
    verdicts: str
    """File of one judge's verdicts on them. The verdict on an answer is the target at each of its tokens."""
    out: str
    """Output folder: the head in `cost-head.safetensors`, its quality in `run.json`."""
    layers: Annotated[list[Layer], Field(min_length=1)] | None = None
    """Layers whose hidden states the head reads side by side: 1 to the number of layers, or -1, the last after its
    norm. Default the middle one and the last. The guard `project` needs a single one."""
    units: Annotated[int, Field(ge=0)] = 256
    """Number of units of the hidden layer; 0 for a linear head, which the guard `project` needs."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the prompts that the head isn't fitted on: half of them calibrate it, on the others it is measured."""
    max_prefixes: Count = 300_000
    """Maximum number of tokens whose states are kept in memory, a seeded sample."""
    steps: Count = 4000
    """Number of steps of 1,024 tokens; the head is that of the step with the least loss on held-out prompts."""
    seed: int = 0
    """Seed of the held-out prompts, the first weights and the batches."""

    @field_validator("model")
    @classmethod
    def _has_answers(cls, model: ModelSection) -> ModelSection:
        if model.path is None or model.load_in_4bit:
            raise ValueError("expected the path of the model whose answers are guarded, without load_in_4bit")
        return model

    @field_validator("layers")
    @classmethod
    def _are_states(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and (0 in layers or len({*layers}) < len(layers)):
            raise ValueError(f"got {layers}; expected different layers from 1, or -1 for the last")
        return layers
