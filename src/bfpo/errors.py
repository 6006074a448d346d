"""Errors that users can expect and fix.

Each message says where (file, row, key), what was got, what is allowed and what to do. Each class also subclasses the
built-in error that it corresponds to, so that `except ValueError` keeps working. The command line prints the message
without a traceback and exits with the class's `exit_code`.
"""

from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar

# Reasons that the message of `Unanswered` lists; those of a server may differ for every prompt.
_MAX_REASONS = 5


class BfpoError(Exception):
    """Base class of all expected errors."""

    exit_code: ClassVar[int] = 1


class RecipeError(BfpoError, ValueError):
    """A recipe, an option or a hyperparameter is wrong."""

    exit_code = 2


class DataError(BfpoError, ValueError):
    """Input data are missing, malformed or contradictory."""

    exit_code = 2


class ModelError(BfpoError, ValueError):
    """A model or tokenizer can't be loaded, or can't be trained as the recipe requires."""

    exit_code = 2


class TrainingError(BfpoError, RuntimeError):
    """A run failed after it had started."""

    exit_code = 1


class DeploymentError(BfpoError, RuntimeError):
    """A server or an upload failed after it had started."""

    exit_code = 1


class Stopped(BfpoError):
    """A run received a signal to stop, and saved its state first."""

    # 128 + SIGTERM, as a shell reports a process that was ended by this signal.
    exit_code = 143


class GateViolated(BfpoError):
    """The whole confidence interval of a metric is beyond its bound."""

    exit_code = 3


class ExportMismatch(BfpoError):
    """An exported file was written, and doesn't say what its source says."""

    exit_code = 1


class Unanswered(BfpoError):
    """An engine couldn't answer some requests; all other completions were returned.

    Args:
        failed: Reason of each failure, by prompt id and sample number.
        num_requested: Number of completions that were requested.
        refused: Keys of `failed` that would fail again, such as a prompt too long for the model.
        not_requested: Keys of `failed` that the engine gave up without a try.
    """

    def __init__(
        self,
        failed: dict[tuple[str, int], str],
        num_requested: int,
        *,
        refused: Iterable[tuple[str, int]] = (),
        not_requested: Iterable[tuple[str, int]] = (),
    ) -> None:
        counts = Counter(failed.values()).most_common()
        reasons = ", ".join(f"{reason} ({count})" for reason, count in counts[:_MAX_REASONS])
        if rest := sum(count for _, count in counts[_MAX_REASONS:]):
            reasons += f", other reasons ({rest})"
        super().__init__(
            f"{len(failed)} of {num_requested} completions are missing: {reasons}; the first is of prompt "
            f"'{next(iter(failed))[0]}'. The others are saved: run the same command again to request only those that "
            "are missing"
        )
        self.failed, self.refused, self.not_requested = failed, frozenset(refused), frozenset(not_requested)


class MissingExtra(BfpoError, ImportError):
    """A feature needs a package that the core installation doesn't include."""

    exit_code = 2

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs {package}; pip install 'bfpo[{extra}]'")


def did_you_mean(name: str, allowed: list[str]) -> str:
    """Return a hint for the end of an error about an unknown name.

    Args:
        name: The unknown name.
        allowed: The names that are allowed.

    Returns:
        `did you mean 'x'? ` if one of the allowed names is similar, followed by all allowed names.
    """
    similar = get_close_matches(name, allowed, n=1, cutoff=0.6)
    guess = f"did you mean '{similar[0]}'? " if similar else ""
    return f"{guess}known: {', '.join(sorted(allowed))}"
