"""The errors that `bfpo` raises on purpose.

Each message says where (file, row, key), what was got, what is allowed and what to do. Each class also
subclasses the built-in error it stands for, so that `except ValueError` keeps working. The command line
prints the message without a traceback and exits with the class's `exit_code`.
"""

from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class BfpoError(Exception):
    """Root of all errors raised on purpose."""

    exit_code: ClassVar[int] = 1


class RecipeError(BfpoError, ValueError):
    """A recipe, an option or a hyper-parameter is wrong."""

    exit_code = 2


class DataError(BfpoError, ValueError):
    """Input data are missing, malformed or contradictory."""

    exit_code = 2


class ModelError(BfpoError, ValueError):
    """A model or tokenizer can't be loaded or can't be trained as asked."""

    exit_code = 2


class TrainingError(BfpoError, RuntimeError):
    """A run failed after it had started."""

    exit_code = 1


class Stopped(BfpoError):
    """A run was told to stop, and did so in good order."""

    # 128 + SIGTERM, what a shell reports for a process ended by it
    exit_code = 143


class GateViolated(BfpoError):
    """A number of an evaluation is beyond a bound that was set for it, with confidence."""

    exit_code = 3


class Unanswered(BfpoError):
    """An engine left some completions unanswered; those it gave are kept.

    Args:
        failed: (prompt's id, sample's number) → why.
        asked: Completions asked for.
        refused: Those of `failed` that would fail again, such as a prompt too long for the model.
    """

    def __init__(
        self, failed: dict[tuple[str, int], str], asked: int, *, refused: Iterable[tuple[str, int]] = ()
    ) -> None:
        reasons = ", ".join(f"{count} of {why}" for why, count in Counter(failed.values()).most_common())
        super().__init__(
            f"{len(failed)} of {asked} completions were not had: {reasons}; the first is of prompt "
            f"'{next(iter(failed))[0]}'. The others are kept: the same command asks for the missing ones alone"
        )
        self.failed, self.refused = failed, frozenset(refused)


class MissingExtra(BfpoError, ImportError):
    """A feature needs a package that the core installation doesn't bring."""

    exit_code = 2

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs {package}; pip install 'bfpo[{extra}]'")


def did_you_mean(word: str, known: list[str]) -> str:
    """Return a hint that ends an error about an unknown word.

    Args:
        word: What was got.
        known: The words that are allowed.

    Returns:
        `did you mean 'x'? ` when something is close (else nothing), followed by all the known words.
    """
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    guess = f"did you mean '{close[0]}'? " if close else ""
    return f"{guess}known: {', '.join(sorted(known))}"
