"""The `combine:` section of an online recipe: one section for each combiner, chosen by `name`.

The sections repeat the fields, defaults and ranges of the classes in `bfpo.losses.combine`;
tests/config/test_combine.py compares the two.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from bfpo.config.losses import Number
from bfpo.config.section import Section
from bfpo.errors import did_you_mean

_CUSTOM = "module:Class"


class LagrangianSection(Section):
    """(reward - λ·cost) / (1 + λ), with λ such that the mean cost meets a bound."""

    name: Literal["lagrangian"] = "lagrangian"
    """Safe RLHF's objective."""
    cost_at_most: Number = 0.0
    """Largest allowed mean cost, in the units of `measure`."""
    measure: Literal["cost", "unsafe"] = "cost"
    """`cost`: the scorer's number, above 0 for unsafe answers. `unsafe`: 1 for an unsafe answer, else 0, so that 0.02
    means at most 2 % unsafe."""
    rate: Annotated[Number, Field(ge=0)] = 0.1
    """After every step log λ grows by rate·(mean cost - cost_at_most); 0 keeps λ."""
    start: Annotated[Number, Field(ge=0)] = 1.0
    """First λ."""
    min: Annotated[Number, Field(ge=0)] = 0.01
    """Smallest λ, from which it can grow again; 0 only with `rate: 0`."""
    max: Annotated[Number, Field(ge=0)] = 5.0
    """Largest λ."""
    normalize: bool = True
    """Whether to divide by 1 + λ, which keeps the scale of the values. The KL penalty is then beta·(1 + λ) in terms
    of rewards."""
    multiplier: str | None = None
    """`dual.json` of `bfpo dual`, or its folder: λ is fixed at its number, and `normalize` is false."""

    @model_validator(mode="after")
    def _check_bounds(self) -> "LagrangianSection":
        if not self.min <= self.start <= self.max:
            raise ValueError(f"start is {self.start:g}; expected a number from min {self.min:g} to max {self.max:g}")
        if self.min == 0 and self.rate > 0:
            raise ValueError("min is 0, from which λ can't grow again; expected more than 0, or rate: 0")
        if self.multiplier is not None and self.model_fields_set & {"cost_at_most", "rate", "start", "min", "max"}:
            raise ValueError("multiplier is a file with a fixed λ; leave out cost_at_most, rate, start, min and max")
        return self


class BilinearSection(Section):
    """(p(safe) + a1)·(helpfulness + a2)."""

    name: Literal["bilinear"] = "bilinear"
    """BFPO's own objective."""
    a1: Annotated[Number, Field(ge=0)] | None = None
    """Offset of safety; default E_s, the mean safety of the first batch of samples."""
    a2: Number = 0.5
    """Offset of helpfulness."""


class MultiplicativeSection(Section):
    """(helpfulness - floor)·(1 - p(unsafe))."""

    name: Literal["multiplicative"] = "multiplicative"
    """Multiplicative value: an unsafe answer is worth as much as the worst safe one."""
    floor: Annotated[Number, Field(le=0)] = 0.0
    """Helpfulness at which a safe answer is worth as much as an unsafe one."""


class TailSection(Section):
    """Mean of reward - λ·cost over the worst share (CVaR)."""

    name: Literal["tail"] = "tail"
    """Only the worst answers or prompts count."""
    share: Annotated[Number, Field(gt=0, le=1)] = 0.2
    """Share in the tail."""
    over: Literal["answers", "prompts"] = "answers"
    """Whether the tail consists of answers, or of prompts by the mean of their answers."""
    multiplier: Annotated[Number, Field(ge=0)] = 1.0
    """λ, which doesn't change."""
    measure: Literal["cost", "unsafe"] = "cost"
    """As in `lagrangian`."""
    rate: Annotated[Number, Field(gt=0, le=1)] = 0.1
    """Weight of a new batch in the running quantile."""


class CustomCombinerSection(Section):
    """Custom combiner; its fields are checked when it is imported."""

    model_config = ConfigDict(extra="allow")

    name: str
    """Import path, `package.module:Class`, of a subclass of `bfpo.losses.combine.Combiner`."""


COMBINE_SECTIONS: dict[str, type[Section]] = {
    "lagrangian": LagrangianSection,
    "bilinear": BilinearSection,
    "multiplicative": MultiplicativeSection,
    "tail": TailSection,
}


def _check_name(value: object) -> object:
    if isinstance(value, Section):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a section such as {{name: lagrangian, cost_at_most: 0}}; got {value!r}")
    name = value.get("name", "lagrangian")
    if not isinstance(name, str) or (name not in COMBINE_SECTIONS and ":" not in name):
        raise ValueError(f"name is {name!r}; {did_you_mean(str(name), list(COMBINE_SECTIONS))}, or '{_CUSTOM}'")
    return value


def _tag(value: Any) -> str:
    name: str = value.get("name", "lagrangian") if isinstance(value, Mapping) else value.name
    return _CUSTOM if ":" in name else name


CombineSection = Annotated[
    Annotated[LagrangianSection, Tag("lagrangian")]
    | Annotated[BilinearSection, Tag("bilinear")]
    | Annotated[MultiplicativeSection, Tag("multiplicative")]
    | Annotated[TailSection, Tag("tail")]
    | Annotated[CustomCombinerSection, Tag(_CUSTOM)],
    Discriminator(_tag),
    BeforeValidator(_check_name),
]
