"""TRL's telemetry: its trainers report trainer, architecture and device to the hub when they are made.

TRL 1.16 calls `huggingface_hub.utils.send_telemetry` in the constructor of every trainer. That function sends nothing
if `huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY` is true, which is read from the environment once, at import.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

from bfpo.core.terminal import say

VARIABLE = "HF_HUB_DISABLE_TELEMETRY"


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Switch off TRL's telemetry inside a `with` block, unless the user has set the environment variable."""
    if VARIABLE in os.environ:
        yield
        return
    previous = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    say(f"TRL's telemetry is off for this run; set {VARIABLE}=0 to send it")
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = previous
