"""Bi-Factorial Preference Optimization: align language models for safety and helpfulness.

Public names are loaded on first use, so `import bfpo` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# A release drops ".dev0" and gets the tag v0.1.0; CONTRIBUTING.md says how.
__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
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
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'bfpo' has no attribute '{name}'")
