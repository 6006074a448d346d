"""Preference losses, the labeling function that defines their targets, and the theory behind them.

Public names are imported on first use, so that the labeling function can be used without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bfpo.losses.baselines import BSO, DPO, IPO, MODPO, CatDPO, IPOAvg, SafeDPO, SoftLabels
    from bfpo.losses.build import LOSSES, make_loss
    from bfpo.losses.labeling import LabelingFunction
    from bfpo.losses.pairwise import BFPO, Additive, BFPOSoft, PairLogps, PairLoss, bfpo_loss

__all__ = [
    "BFPO",
    "BSO",
    "DPO",
    "IPO",
    "LOSSES",
    "MODPO",
    "Additive",
    "BFPOSoft",
    "CatDPO",
    "IPOAvg",
    "LabelingFunction",
    "PairLogps",
    "PairLoss",
    "SafeDPO",
    "SoftLabels",
    "bfpo_loss",
    "make_loss",
]

_MODULES = {
    "LabelingFunction": "labeling",
    **dict.fromkeys(("LOSSES", "make_loss"), "build"),
    **dict.fromkeys(("BSO", "DPO", "IPO", "MODPO", "CatDPO", "IPOAvg", "SafeDPO", "SoftLabels"), "baselines"),
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"bfpo.losses.{_MODULES.get(name, 'pairwise')}"), name)
    raise AttributeError(f"module 'bfpo.losses' has no attribute '{name}'")
