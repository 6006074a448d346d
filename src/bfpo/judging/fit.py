"""Fitting the `linear` judge, and its card: what it was fitted on, and how good it is on what it wasn't."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sklearn.model_selection import GroupKFold

from bfpo.config.recipes import Source
from bfpo.core.files import file_hash
from bfpo.core.samples import Verdict
from bfpo.core.terminal import progress
from bfpo.data.rows import local_files
from bfpo.errors import DataError
from bfpo.judging.evaluate import rows
from bfpo.judging.labeled import LabeledAnswer
from bfpo.judging.linear import HEADS, Head, LinearJudge, fit_head

FOLDS = 5
_SCHEMA = 1


def fit_heads(answers: Sequence[LabeledAnswer], where: str) -> dict[str, Head]:
    """Fit a head for each question that people answered.

    Raises:
        DataError: If there is none, or too few answers to fit one.
    """
    heads = {name: _fit(name, told) for name in HEADS if (told := _told(name, answers))}
    if not heads:
        raise DataError(f"{where}: no answer has a label")
    return heads


def cross_validated(answers: Sequence[LabeledAnswer], band: tuple[float, float]) -> dict[str, list[Verdict] | None]:
    """Return verdicts on every answer by judges fitted without its prompt, by question; None where too few allow it.

    Args:
        answers: What the judge is fitted on.
        band: Of the judge.
    """
    groups = [one.completion.prompt_id for one in answers]
    asked = [name for name in HEADS if _told(name, answers)]
    found: dict[str, list[Verdict] | None] = {}
    with progress("cross-validating", FOLDS * len(asked)) as advance:
        for name in asked:
            verdicts: dict[int, Verdict] = {}
            try:
                for others, fold in GroupKFold(FOLDS).split(answers, groups=groups):
                    head = _fit(name, _told(name, [answers[index] for index in others]))
                    judged = LinearJudge({name: head}, "", band).judge([answers[index].completion for index in fold])
                    verdicts |= zip(map(int, fold), judged, strict=True)
                    advance(1)
                found[name] = [verdicts[index] for index in range(len(answers))]
            except DataError:
                # Enough for one judge, but not without a fold.
                found[name] = None
    return found


def card_of(
    judge: LinearJudge, labeled: str, answers: Sequence[LabeledAnswer], quality: dict[str, list[Verdict] | None]
) -> dict[str, Any]:
    """Return what stands in a judge's card."""
    from bfpo.training.manifest import installed_version, versions

    return {
        "schema": _SCHEMA,
        "judge": judge.name,
        "revision": judge.revision,
        "fitted_on": {
            "labeled": labeled,
            "files": {file.name: file_hash(file) for file in local_files(Source(path=labeled))},
            "answers": len(answers),
            "prompts": len({one.completion.prompt_id for one in answers}),
            "models": dict(sorted(Counter(one.completion.model for one in answers).items())),
            "labels": {
                name: dict(Counter(str(getattr(one, name)).lower() for one in _told(name, answers)))
                for name in judge.heads
            },
        },
        "undecided_band": list(judge.band),
        "quality_is": f"{FOLDS} folds grouped by prompt: each answer is judged by heads fitted on other prompts",
        "quality": {
            name: None if verdicts is None else rows(name, answers, verdicts) for name, verdicts in quality.items()
        },
        "versions": versions() | {"scikit-learn": installed_version("scikit-learn")},
    }


def card_file(judge: Path) -> Path:
    """Return where the card of a judge's file stands."""
    return judge.with_suffix(".card.json")


def _told(name: str, answers: Sequence[LabeledAnswer]) -> list[LabeledAnswer]:
    return [one for one in answers if getattr(one, name) is not None]


def _fit(name: str, told: Sequence[LabeledAnswer]) -> Head:
    prompts = [one.completion.prompt[-1].content for one in told]
    return fit_head(name, prompts, [one.completion.text for one in told], [getattr(one, name) for one in told])
