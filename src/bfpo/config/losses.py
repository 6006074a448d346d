"""The `loss:` section of a recipe: one section for each loss, chosen by `name`.

The sections repeat the fields, defaults and ranges of the classes in `bfpo.losses`, so that a wrong loss is
refused without importing torch. tests/config/test_losses.py compares the two.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_serializer,
    model_validator,
)
from pydantic_core.core_schema import SerializerFunctionWrapHandler

from bfpo.config.section import Section
from bfpo.errors import did_you_mean


def _check_size(value: float) -> float:
    # Beyond these, targets and losses overflow in float32.
    if abs(value) > 1e9:
        raise ValueError(f"{value!r} is too large; expected a size of at most 1e9")
    return value


def _check_not_tiny(value: float) -> float:
    if value < 1e-9:
        raise ValueError(f"{value!r} is too small, because targets are divided by it; expected 1e-9 or more")
    return value


Number = Annotated[float, Field(strict=True, allow_inf_nan=False), AfterValidator(_check_size)]
Positive = Annotated[
    float,
    Field(strict=True, allow_inf_nan=False, gt=0),
    AfterValidator(_check_size),
    AfterValidator(_check_not_tiny),
]
Graded = Annotated[bool, Field(strict=True)]
AboveOne = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=1), AfterValidator(_check_size)]
TableName = Literal["helpful_ties"]

_CUSTOM = "module:Class"


class LabelTableSection(Section):
    """The four labels of BFPO, by the safety of the chosen and the rejected answer."""

    ss: Number
    """Both answers are safe."""
    su: Number
    """The chosen answer is safe, the rejected one is unsafe."""
    us: Number
    """The chosen answer is unsafe, the rejected one is safe."""
    uu: Number
    """Both answers are unsafe."""


class LabelErrorsSection(Section):
    """How often the judge that labeled the pairs is right."""

    sensitivity: Annotated[float, Field(strict=True, ge=0, le=1)]
    """Share of the safe answers that it calls safe."""
    specificity: Annotated[float, Field(strict=True, ge=0, le=1)]
    """Share of the unsafe answers that it calls unsafe."""

    @model_validator(mode="after")
    def _check_informative(self) -> "LabelErrorsSection":
        if not self.sensitivity + self.specificity - 1 >= 0.1:
            raise ValueError(
                f"sensitivity and specificity add up to {self.sensitivity + self.specificity:.3g}; expected at least "
                "1.1, because labels of a judge near chance say nothing"
            )
        return self


def _errors_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "file"
    return "rates" if isinstance(value, Mapping | LabelErrorsSection) else None


LabelErrorRates = Annotated[
    Annotated[LabelErrorsSection, Tag("rates")] | Annotated[str, Tag("file")],
    Discriminator(
        _errors_kind,
        custom_error_type="label_errors",
        custom_error_message="expected {sensitivity: .., specificity: ..}, or the path of the results of "
        "`bfpo judge eval`",
    ),
]


class PairLossSection(Section):
    """What all losses have."""

    tail: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Share of the pairs of a step, in each stream, that are trained on: those with the largest losses (CVaR)."""

    @model_serializer(mode="wrap")
    def _dump_used(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = self._unused()
        return {key: value for key, value in dump(self).items() if key not in unused}

    def _unused(self) -> list[str]:
        """Return the keys that a resolved recipe leaves out."""
        return ["tail"] if self.tail == 1 else []


def _table_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "name" if value in get_args(TableName) else None
    if isinstance(value, Mapping):
        return "cells" if set(value) == set(LabelTableSection.model_fields) else None
    return "cells" if isinstance(value, LabelTableSection) else None


LabelTable = Annotated[
    Annotated[LabelTableSection, Tag("cells")] | Annotated[TableName, Tag("name")],
    Discriminator(
        _table_kind,
        custom_error_type="label_table",
        custom_error_message="expected four numbers, {ss: .., su: .., us: .., uu: ..}, or a name "
        f"({', '.join(get_args(TableName))})",
    ),
]


class BFPOSection(PairLossSection):
    """Squared distance of the margin from label / beta."""

    name: Literal["bfpo"] = "bfpo"
    """Bi-factorial preference optimization."""
    beta: Positive = 0.01
    """The paper's tau. At 0.01 targets are ±50 and ±100 nats."""
    b1: AboveOne = 3.0
    """Weight of the chosen answer's safety; the scale b3 is 1/(b1-1)."""
    b2: Number = 0.0
    """Constant in the bracket of the labeling function."""
    alpha: Number = 0.5
    """Shift of all labels; 0.5 makes them antisymmetric in safety."""
    table: LabelTable | None = None
    """The four labels, `{ss: .., su: .., us: .., uu: ..}` or `helpful_ties`, instead of b1, b2 and alpha."""
    safety_weight: Annotated[Number, Field(ge=0)] = 0.0
    """λ: λ·(s_chosen - s_rejected) is added to every label, which lowers P(unsafe)."""
    multiplier: str | None = None
    """`dual.json` of `bfpo dual`, or its folder, with the `safety_weight` that reaches a given P(unsafe)."""
    label_errors: LabelErrorRates | None = None
    """Rates of the judge that labeled the pairs, `{sensitivity: .., specificity: ..}`, or the results of `bfpo judge
    eval` with that judge: labels are corrected for its errors."""
    graded: Graded = False
    """Whether the label of two versions of one answer (`bfpo data degrade`) is multiplied by the difference of their
    degrees; needs the column `degree_difference`."""

    @model_validator(mode="after")
    def _check_weight(self) -> "BFPOSection":
        if self.multiplier is not None and self.safety_weight:
            raise ValueError("'multiplier' is a file with the safety_weight; give either the file or the number")
        return self

    @model_validator(mode="after")
    def _check_table(self) -> "BFPOSection":
        if self.table is not None and (self.b1, self.b2, self.alpha) != (3.0, 0.0, 0.5):
            raise ValueError("'table' replaces b1, b2 and alpha; give either the table or these")
        return self

    def _unused(self) -> list[str]:
        unused = ["table"] if self.table is None else ["b1", "b2", "alpha"]
        options = ("safety_weight", "multiplier", "label_errors", "graded")
        return [*super()._unused(), *unused, *(key for key in options if not getattr(self, key))]


class BFPOSoftSection(PairLossSection):
    """Squared distance of the margin from the difference of the RL rewards / beta."""

    name: Literal["bfpo_soft"] = "bfpo_soft"
    """BFPO on known win rates."""
    beta: Positive = 0.01
    """As in `bfpo`."""
    b1: AboveOne = 3.0
    """Sets the helpfulness offset A2 = 1/(b1-1)."""
    alpha: Number = 0.0
    """Lowers the safety offset: A1 = E_s - 2·alpha. 0 is the paper's objective."""


class IPOSection(PairLossSection):
    """Squared distance of the margin from 1/(2·beta)."""

    name: Literal["ipo"] = "ipo"
    """Identity preference optimization on token sums; ignores safety."""
    beta: Positive = 0.01
    """Strength of the pull towards the reference: the target margin is 1/(2·beta) nats."""
    graded: Graded = False
    """As in `bfpo`, for the target."""


class IPOAvgSection(PairLossSection):
    """Squared distance of the mean margin per token from 1/(2·beta)."""

    name: Literal["ipo_avg"] = "ipo_avg"
    """Identity preference optimization on means over tokens; ignores safety."""
    beta: Positive = 0.1
    """As in `ipo`, for margins in nats per token."""


class DPOSection(PairLossSection):
    """Logistic loss of the margin."""

    name: Literal["dpo"] = "dpo"
    """Direct preference optimization; ignores safety."""
    beta: Positive = 0.1
    """Inverse temperature of the implicit reward."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of flipped preferences (conservative DPO)."""
    graded: Graded = False
    """Whether beta·h of two versions of one answer must exceed the difference of their degrees."""


class TDPOSection(PairLossSection):
    """Logistic loss of the margin less the difference of the answers' divergences from the reference."""

    name: Literal["tdpo"] = "tdpo"
    """Token-level DPO (TDPO2); ignores safety. Not with `reference: cache`."""
    beta: Positive = 0.1
    """As in `dpo`."""
    alpha: Annotated[Number, Field(ge=0)] = 0.5
    """Weight of the divergences."""
    token_tail: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Share of the reference's probability at a position whose tokens count, those that the policy lowered most; 1 is
    the KL divergence."""


class SafeDPOSection(PairLossSection):
    """Logistic loss of the margin of pairs reordered by safety."""

    name: Literal["safe_dpo"] = "safe_dpo"
    """SafeDPO; drops pairs of two unsafe answers."""
    beta: Positive = 0.1
    """As in `dpo`."""
    delta: Annotated[Number, Field(ge=0)] = 10.0
    """Offset added when the preferred answer is safe and the other is not."""


class BSOSection(PairLossSection):
    """Bregman divergence between the density ratios of policy and data, on pairs reordered by safety."""

    name: Literal["bso"] = "bso"
    """Bregman safety optimization with the scaled Basu generator; drops pairs of two unsafe answers."""
    beta: Positive = 0.1
    """As in `dpo`."""
    penalty: Annotated[Number, Field(ge=0)] = 30.0
    """C: offset added when the preferred answer is safe and the other is not."""
    power: Annotated[Number, Field(gt=-1)] = 0.2
    """λ of the generator."""
    scale: Positive = 4.0
    """s of the generator."""
    limit: Positive = 40.0
    """Largest size of the log-ratio; a pair beyond it has no gradient."""


class CatDPOSection(PairLossSection):
    """Logistic loss of the margin less an adaptive margin of the pair's harm category."""

    name: Literal["cat_dpo"] = "cat_dpo"
    """Cat-DPO; needs pairs with `harm_categories`."""
    beta: Positive = 0.1
    """As in `dpo`."""
    rate: Annotated[Number, Field(ge=0)] = 0.05
    """Step size of the margins."""
    tolerance: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    """Mean probability of the wrong order, above which the margin of a category grows."""


class AdditiveSection(PairLossSection):
    """Squared distance of the margin from an additive label / beta."""

    name: Literal["additive"] = "additive"
    """Control for the bilinear label of `bfpo`."""
    beta: Positive = 0.01
    """As in `bfpo`."""
    weight: Number = 1.0
    """Weight of a difference in safety against one in helpfulness."""


class MODPOSection(PairLossSection):
    """Logistic loss of the margin less another reward's margin."""

    name: Literal["modpo"] = "modpo"
    """Multi-objective DPO; needs the column `reward_margin`."""
    beta: Positive = 0.1
    """As in `dpo`."""
    weight: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """Weight of the pair's own order (helpfulness); the other reward gets 1 - weight."""


class CustomLossSection(Section):
    """Custom loss; its fields are checked when it is imported."""

    model_config = ConfigDict(extra="allow")

    name: str
    """Import path, `package.module:Class`, of a subclass of `bfpo.losses.PairLoss`."""


LOSS_SECTIONS: dict[str, type[Section]] = {
    "bfpo": BFPOSection,
    "bfpo_soft": BFPOSoftSection,
    "ipo": IPOSection,
    "ipo_avg": IPOAvgSection,
    "dpo": DPOSection,
    "tdpo": TDPOSection,
    "safe_dpo": SafeDPOSection,
    "bso": BSOSection,
    "cat_dpo": CatDPOSection,
    "additive": AdditiveSection,
    "modpo": MODPOSection,
}


def _check_name(value: object) -> object:
    if isinstance(value, Section):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a section such as {{name: bfpo, beta: 0.01}}; got {value!r}")
    name = value.get("name", "bfpo")
    if not isinstance(name, str):
        raise ValueError(f"name is {name!r}; expected one of {', '.join(LOSS_SECTIONS)}, or '{_CUSTOM}'")
    if name not in LOSS_SECTIONS and ":" not in name:
        raise ValueError(f"name is '{name}'; {did_you_mean(name, list(LOSS_SECTIONS))}, or '{_CUSTOM}'")
    return value


def _tag(value: Any) -> str:
    name: str = value.get("name", "bfpo") if isinstance(value, Mapping) else value.name
    return _CUSTOM if ":" in name else name


LossSection = Annotated[
    Annotated[BFPOSection, Tag("bfpo")]
    | Annotated[BFPOSoftSection, Tag("bfpo_soft")]
    | Annotated[IPOSection, Tag("ipo")]
    | Annotated[IPOAvgSection, Tag("ipo_avg")]
    | Annotated[DPOSection, Tag("dpo")]
    | Annotated[TDPOSection, Tag("tdpo")]
    | Annotated[SafeDPOSection, Tag("safe_dpo")]
    | Annotated[BSOSection, Tag("bso")]
    | Annotated[CatDPOSection, Tag("cat_dpo")]
    | Annotated[AdditiveSection, Tag("additive")]
    | Annotated[MODPOSection, Tag("modpo")]
    | Annotated[CustomLossSection, Tag(_CUSTOM)],
    Discriminator(_tag),
    BeforeValidator(_check_name),
]
