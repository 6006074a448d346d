"""Preference losses, the labeling function that defines their targets, and the theory behind them.

Public names are imported on first use, so that the labeling function can be used without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bfpo.losses.build import make_loss
    from bfpo.losses.label_errors import LabelErrors
    from bfpo.losses.labeling import LabelingFunction
    from bfpo.losses.pairwise import (
        BFPO,
        DPO,
        IPO,
        LOSSES,
        MODPO,
        TDPO,
        Additive,
        BFPOSoft,
        IPOAvg,
        PairLogps,
        PairLoss,
        SafeDPO,
        SoftLabels,
        bfpo_loss,
    )

__all__ = [
    "BFPO",
    "DPO",
    "IPO",
    "LOSSES",
    "MODPO",
    "TDPO",
    "Additive",
    "BFPOSoft",
    "IPOAvg",
    "LabelErrors",
    "LabelingFunction",
    "PairLogps",
    "PairLoss",
    "SafeDPO",
    "SoftLabels",
    "bfpo_loss",
    "make_loss",
]

_MODULES = {"LabelErrors": "label_errors", "LabelingFunction": "labeling", "make_loss": "build"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"bfpo.losses.{_MODULES.get(name, 'pairwise')}"), name)
    raise AttributeError(f"module 'bfpo.losses' has no attribute '{name}'")
