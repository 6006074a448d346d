"""A recipe under construction, and the outcome of every key of the old file."""

from typing import Any, Literal, NamedTuple

Outcome = Literal["renamed", "computed", "not needed", "unsupported"]


class KeyOutcome(NamedTuple):
    """Outcome of one key.

    Args:
        outcome: What happened to the key.
        key: Key of the old file; "" for a recipe key without a counterpart in the file.
        value: Value in the old file, or in the recipe if the file has no such key; secrets are masked.
        recipe_key: Dotted key of the recipe; "" for none.
        reason: Short explanation; may be empty.
    """

    outcome: Outcome
    key: str
    value: Any
    recipe_key: str
    reason: str


class Draft:
    """The remaining keys of an old file, and the recipe so far.

    Args:
        content: Keys and values of the old file.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.old = content
        self.remaining = dict(content)
        self.recipe: dict[str, Any] = {}
        self.outcomes: list[KeyOutcome] = []

    def take(self, key: str) -> Any:
        """Remove a key from the remaining ones and return its value; None if it is missing."""
        return self.remaining.pop(key, None)

    def has(self, recipe_key: str) -> bool:
        """Return whether a dotted key of the recipe is set."""
        section: Any = self.recipe
        for name in recipe_key.split("."):
            if not isinstance(section, dict) or name not in section:
                return False
            section = section[name]
        return True

    def put(self, recipe_key: str, value: Any) -> None:
        """Set a dotted key of the recipe."""
        *sections, last = recipe_key.split(".")
        section = self.recipe
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value

    def rename(self, key: str, recipe_key: str) -> None:
        """Move a key, with its value unchanged."""
        value = self.take(key)
        self.put(recipe_key, value)
        self.outcomes.append(KeyOutcome("renamed", key, value, recipe_key, ""))

    def compute(self, key: str, recipe_key: str, value: Any, reason: str = "") -> None:
        """Set a recipe key to what follows from a key, or from its absence."""
        if key in self.remaining:
            self.outcomes.append(KeyOutcome("computed", key, self.take(key), recipe_key, reason))
        else:
            self.outcomes.append(KeyOutcome("computed", "", value, recipe_key, reason))
        self.put(recipe_key, value)

    def note(self, outcome: Outcome, key: str, reason: str = "", *, recipe_key: str = "") -> None:
        """Record the outcome of a key without changing the recipe."""
        self.outcomes.append(KeyOutcome(outcome, key, self.take(key), recipe_key, reason))
