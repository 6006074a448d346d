"""Preference losses, the labeling function that defines their targets, and the theory behind them.

Public names are imported on first use, so that the labeling function can be used without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bfpo.losses.baselines import BSO, DPO, IPO, MODPO, CatDPO, IPOAvg, SafeDPO, SoftLabels
    from bfpo.losses.build import LOSSES, make_loss
    from bfpo.losses.inputs import PairLogps
    from bfpo.losses.label_errors import LabelErrors
    from bfpo.losses.labeling import LabelingFunction
    from bfpo.losses.pairwise import BFPO, Additive, BFPOSoft, PairLoss, bfpo_loss
    from bfpo.losses.token_level import TDPO

__all__ = [
    "BFPO",
    "BSO",
    "DPO",
    "IPO",
    "LOSSES",
    "MODPO",
    "TDPO",
    "Additive",
    "BFPOSoft",
    "CatDPO",
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

_MODULES = {
    **dict.fromkeys(("BSO", "DPO", "IPO", "MODPO", "CatDPO", "IPOAvg", "SafeDPO", "SoftLabels"), "baselines"),
    **dict.fromkeys(("LOSSES", "make_loss"), "build"),
    "LabelErrors": "label_errors",
    "LabelingFunction": "labeling",
    "PairLogps": "inputs",
    "TDPO": "token_level",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"bfpo.losses.{_MODULES.get(name, 'pairwise')}"), name)
    raise AttributeError(f"module 'bfpo.losses' has no attribute '{name}'")
