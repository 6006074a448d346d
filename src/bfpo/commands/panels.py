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


class PanelGroup(TyperGroup):
    """A command line that lists its commands by section; within one, in the order in which they are registered."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return sorted(self.commands, key=lambda name: _place(getattr(self.commands[name], "rich_help_panel", None)))


def _place(panel: object) -> int:
    return PANELS.index(panel) if panel in PANELS else len(PANELS)
