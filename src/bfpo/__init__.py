"""Bi-Factorial Preference Optimization: align language models for safety and helpfulness.

Public names are loaded on first use, so `import bfpo` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from bfpo.core.pairs import PreferencePair, SafetyLabels
    from bfpo.losses.labeling import LabelingFunction
    from bfpo.losses.pairwise import bfpo_loss
    from bfpo.training.sft import SFTTrainer
    from bfpo.training.trainer import BFPOTrainer

_HOME = {
    "BFPOTrainer": "bfpo.training.trainer",
    "LabelingFunction": "bfpo.losses.labeling",
    "PreferencePair": "bfpo.core.pairs",
    "SFTTrainer": "bfpo.training.sft",
    "SafetyLabels": "bfpo.core.pairs",
    "bfpo_loss": "bfpo.losses.pairwise",
}

__all__ = [
    "BFPOTrainer",
    "LabelingFunction",
    "PreferencePair",
    "SFTTrainer",
    "SafetyLabels",
    "__version__",
    "bfpo_loss",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("bfpo")
        except PackageNotFoundError:
            # The source is on the path and not installed.
            return "0+unknown"
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'bfpo' has no attribute '{name}'")
