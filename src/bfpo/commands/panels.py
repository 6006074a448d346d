"""The sections of `bfpo --help`, in the order in which a user needs them."""

from typing import Any

from typer.core import TyperGroup

START = "Start"
DATA = "Data and labels"
TRAIN = "Train"
EVALUATE = "Evaluate"
DEPLOY = "Deploy"
STUDIES = "Studies"
PANELS = (START, DATA, TRAIN, EVALUATE, DEPLOY, STUDIES)
# Commands that are first in their sections.
_FIRST = ("quickstart", "init", "train")


class PanelGroup(TyperGroup):
    """A command line that lists its commands by section, and in one the first steps first."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return sorted(self.commands, key=self._place)

    def _place(self, name: str) -> tuple[int, bool]:
        panel = getattr(self.commands[name], "rich_help_panel", None)
        return PANELS.index(panel) if panel in PANELS else len(PANELS), name not in _FIRST
