"""A recipe in the making, and what became of every key of the old file."""

from typing import Any, Literal, NamedTuple

Fate = Literal["renamed", "computed", "not needed", "unsupported"]


class DraftLine(NamedTuple):
    """What became of one key.

    Args:
        fate: In one word.
        key: Of the old file; "" for what the recipe needs and the old file left to a default.
        value: It had, or what is written where there was no key; a secret is not shown.
        place: In the recipe; "" for nowhere.
        why: In a few words.
    """

    fate: Fate
    key: str
    value: Any
    place: str
    why: str


class Draft:
    """What is left of an old file, and what the recipe holds so far.

    Args:
        content: The old file's keys.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.left = dict(content)
        self.recipe: dict[str, Any] = {}
        self.lines: list[DraftLine] = []

    def take(self, key: str) -> Any:
        """Return a key's value and take it off what is left; None if it isn't there."""
        return self.left.pop(key, None)

    def put(self, place: str, value: Any) -> None:
        """Write a value at a dotted place of the recipe."""
        *sections, last = place.split(".")
        home = self.recipe
        for section in sections:
            home = home.setdefault(section, {})
        home[last] = value

    def rename(self, key: str, place: str) -> None:
        """Move a key to another place, as it is."""
        value = self.take(key)
        self.put(place, value)
        self.lines.append(DraftLine("renamed", key, value, place, ""))

    def compute(self, key: str, place: str, value: Any, why: str) -> None:
        """Write what follows from a key, or from its absence."""
        if key in self.left:
            self.lines.append(DraftLine("computed", key, self.take(key), place, why))
        else:
            self.lines.append(DraftLine("computed", "", value, place, why))
        self.put(place, value)

    def told(self, fate: Fate, key: str, place: str, why: str) -> None:
        """Say what became of a key without writing anything."""
        self.lines.append(DraftLine(fate, key, self.take(key), place, why))
