"""The labeling function: what margin each of the four safe/unsafe cases should get.

BFPO regresses the log-ratio margin of a pair onto `label / beta`, and the label depends on nothing but the
two safety bits. So the labeling function is a 2×2 table, one number per cell. The paper's parametrization

    label(s_chosen, s_rejected) = b3 · (b1 · s_chosen - s_rejected + b2) - alpha

is one way to fill it in. Cells are named by the safety of the chosen answer first: `su` is safe chosen, unsafe
rejected. `chosen` means more helpful, not safer.
"""

import math
from dataclasses import dataclass
from typing import Any

from bfpo.core.pairs import CELLS
from bfpo.errors import RecipeError


@dataclass(frozen=True, slots=True)
class LabelingFunction:
    """A 2×2 table of labels.

    Args:
        ss: Label when both answers are safe.
        su: Label when the chosen answer is safe and the rejected one is unsafe.
        us: Label when the chosen answer is unsafe and the rejected one is safe.
        uu: Label when both answers are unsafe.

    Raises:
        RecipeError: If a number is not finite.

    Source:
        Paper, labeling function g_I and shift alpha; official `src/alignment/trainer/bfpo.py` @a1febab.

    Example:
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
            if not math.isfinite(value):
                raise RecipeError(f"labeling table: {cell} is {value}; expected a finite number")

    @classmethod
    def from_parameters(
        cls, b1: float = 3.0, b2: float = 0.0, alpha: float = 0.5, *, b3: float | None = None
    ) -> "LabelingFunction":
        """Fill the table in from the paper's constants.

        Args:
            b1: Weight of the chosen answer's safety against the rejected one's; above 1.
            b2: Constant inside the bracket; adds 2·b2/(b1-1) to the safety offset A1 of the RL objective.
            alpha: Subtracted from every label; replaces A1 = E_s by E_s - 2·alpha (see docs/method.md).
            b3: Scale. Default 1/(b1-1), which makes the helpfulness offset A2 = 1/(b1-1).

        Raises:
            RecipeError: If b1 ≤ 1 (the scale would be infinite or flip every sign), or a number is not finite.
        """
        for name, value in (("b1", b1), ("b2", b2), ("alpha", alpha), ("b3", b3 if b3 is not None else 0.0)):
            if not math.isfinite(value):
                raise RecipeError(f"labeling function: {name} is {value}; expected a finite number")
        if b1 <= 1:
            raise RecipeError(f"labeling function: b1 is {b1}; expected a number above 1 (the paper uses 3)")
        scale = 1 / (b1 - 1) if b3 is None else b3
        return cls(
            ss=scale * (b1 - 1 + b2) - alpha,
            su=scale * (b1 + b2) - alpha,
            us=scale * (-1 + b2) - alpha,
            uu=scale * b2 - alpha,
        )

    def __call__(self, chosen_safe: Any, rejected_safe: Any) -> Any:
        """Return the label of a pair, by bilinear interpolation between the four cells.

        Args:
            chosen_safe: bool, probability in [0, 1], or an array or tensor of those, shape (B,).
            rejected_safe: The same for the rejected answer.

        Returns:
            The label; with 0 and 1 exactly the cell's number. Shape as the arguments.
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
"""Tables by name, beside the paper's. `helpful_ties`: of two answers of equal safety the more helpful one is
preferred, also where both are unsafe, and a helpful unsafe answer is pushed below a safe one half as far.
docs/testbed.md tells what it was better at, and what it cost."""
