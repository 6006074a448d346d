"""The labeling function: the label of each of the four combinations of safe and unsafe answers.

BFPO regresses the log-ratio margin of a pair onto `label / beta`. The label depends only on the two safety labels, so
the labeling function is a 2×2 table with one number per cell. The paper's parametrization is one way to fill it in:

    label(s_chosen, s_rejected) = b3 · (b1 · s_chosen - s_rejected + b2) - alpha

The first letter of a cell is the safety of the chosen answer: `su` is safe chosen, unsafe rejected. `chosen` means
more helpful, not safer.
"""

from dataclasses import dataclass, replace
from typing import Any

from bfpo.core.pairs import CELLS
from bfpo.errors import RecipeError
from bfpo.losses.label_errors import LabelErrors


@dataclass(frozen=True, slots=True)
class LabelingFunction:
    """2×2 table of labels.

    Args:
        ss: Label if both answers are safe.
        su: Label if the chosen answer is safe and the rejected one is unsafe.
        us: Label if the chosen answer is unsafe and the rejected one is safe.
        uu: Label if both answers are unsafe.

    Raises:
        RecipeError: If a number is not finite.

    Source:
        Paper, labeling function g_I and shift alpha; official `src/alignment/trainer/bfpo.py` @a1febab.

    Examples:
        >>> g = LabelingFunction.from_parameters()
        >>> g(True, True), g(True, False), g(False, True), g(False, False)
        (0.5, 1.0, -1.0, -0.5)
    """

    ss: float
    su: float
    us: float
    uu: float

    def __post_init__(self) -> None:
        for cell in CELLS:
            value = getattr(self, cell)
            # Labels are divided by beta and squared, which must not overflow; NaN fails the comparison, too.
            if not abs(value) <= 1e9:
                raise RecipeError(f"labeling table: {cell} is {value}; expected a finite number of at most 1e9")

    @classmethod
    def from_parameters(
        cls, b1: float = 3.0, b2: float = 0.0, alpha: float = 0.5, *, b3: float | None = None
    ) -> "LabelingFunction":
        """Return the table that the paper's constants define.

        Args:
            b1: Weight of the chosen answer's safety relative to the rejected one's; above 1.
            b2: Constant inside the bracket; adds 2·b2/(b1-1) to the safety offset A1 of the RL objective.
            alpha: Shift, subtracted from every label; replaces A1 = E_s by E_s - 2·alpha (see docs/method.md).
            b3: Scale; default 1/(b1-1), which makes the helpfulness offset A2 = 1/(b1-1).

        Raises:
            RecipeError: If b1 ≤ 1 (the scale would be infinite or change every sign), or a number is not finite.
        """
        for name, value in (("b1", b1), ("b2", b2), ("alpha", alpha), ("b3", b3 if b3 is not None else 0.0)):
            if not abs(value) <= 1e9:
                raise RecipeError(f"labeling function: {name} is {value}; expected a finite number of at most 1e9")
        if b1 <= 1:
            raise RecipeError(f"labeling function: b1 is {b1}; expected a number above 1 (the paper uses 3)")
        scale = 1 / (b1 - 1) if b3 is None else b3
        return cls(
            ss=scale * (b1 - 1 + b2) - alpha,
            su=scale * (b1 + b2) - alpha,
            us=scale * (-1 + b2) - alpha,
            uu=scale * b2 - alpha,
        )

    def with_safety_weight(self, weight: float) -> "LabelingFunction":
        """Return the table of label + weight·(s_chosen - s_rejected); the table itself for a weight of 0.

        The weight is the multiplier λ of a constraint on P(unsafe): the policy that minimizes the loss becomes
        π_BFPO·exp(weight·safe / beta) / Z (see docs/method.md).

        Raises:
            RecipeError: If the weight is negative or not finite.
        """
        if not 0 <= weight <= 1e9:
            raise RecipeError(f"safety_weight is {weight}; expected a number from 0 to 1e9")
        return self if weight == 0 else replace(self, su=self.su + weight, us=self.us - weight)

    def corrected(self, errors: LabelErrors) -> "LabelingFunction":
        """Return the table whose label of a judge's verdicts has the label of the true ones as its mean.

        The mean is over errors that are independent for the two answers of a pair (see docs/method.md).
        """
        unsafe, safe = errors.estimate(0.0), errors.estimate(1.0)
        return LabelingFunction(
            ss=self(safe, safe), su=self(safe, unsafe), us=self(unsafe, safe), uu=self(unsafe, unsafe)
        )

    def __call__(self, chosen_safe: Any, rejected_safe: Any) -> Any:
        """Return the label of a pair, by bilinear interpolation between the four cells.

        Args:
            chosen_safe: Whether the chosen answer is safe, or the probability in [0, 1] that it is; a number, or an
                array or tensor of shape (B,).
            rejected_safe: Same for the rejected answer.

        Returns:
            The label, in the shape of the arguments; for 0 and 1 exactly the number of the cell.
        """
        chosen, rejected = 1.0 * chosen_safe, 1.0 * rejected_safe
        return (
            self.ss * chosen * rejected
            + self.su * chosen * (1 - rejected)
            + self.us * (1 - chosen) * rejected
            + self.uu * (1 - chosen) * (1 - rejected)
        )

    def __str__(self) -> str:
        return (
            "                  rejected safe  rejected unsafe\n"
            f"chosen safe       {self.ss:+13.4g}  {self.su:+15.4g}\n"
            f"chosen unsafe     {self.us:+13.4g}  {self.uu:+15.4g}"
        )


TABLES = {"helpful_ties": LabelingFunction(ss=0.5, su=1.0, us=-0.5, uu=0.5)}
"""Named alternatives to the paper's table. `helpful_ties`: of two equally safe answers the more helpful one is
preferred, also if both are unsafe, and a helpful unsafe answer is pushed half as far below a safe one.
docs/testbed.md has its results."""
