"""Fitting the `linear` judge, and its card: training data, and quality on held-out prompts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sklearn.model_selection import GroupKFold

from bfpo.config.recipes import Source
from bfpo.core.conversation import last_request
from bfpo.core.files import file_hash
from bfpo.core.samples import Verdict
from bfpo.core.terminal import progress
from bfpo.data.readings import judge_readings, read_part
from bfpo.data.rows import local_files
from bfpo.errors import DataError
from bfpo.judging.evaluate import agreement_by_model
from bfpo.judging.labeled import LabeledAnswer
from bfpo.judging.linear import HEADS, Head, LinearJudge, fit_head

FOLDS = 5
_SCHEMA = 1


def fit_heads(answers: Sequence[LabeledAnswer], where: str) -> dict[str, Head]:
    """Fit a head for each question that has labels.

    Args:
        answers: Labeled answers.
        where: File of the answers, for the error message.

    Raises:
        DataError: If no answer has a label, or there are too few to fit a head.
    """
    heads = {name: _fit(name, labeled) for name in HEADS if (labeled := _with_label(name, answers))}
    if not heads:
        raise DataError(f"{where}: no answer has a label; expected values in the column 'refusal' or 'safe'")
    return heads


def cross_validate(answers: Sequence[LabeledAnswer], band: tuple[float, float]) -> dict[str, list[Verdict] | None]:
    """Return verdicts on all answers, by question, of judges fitted without the answer's prompt.

    Args:
        answers: Labeled answers.
        band: Undecided band of the judge.

    Returns:
        Question → verdicts; None where there are too few answers to fit a judge without a fold.
    """
    groups = [answer.completion.prompt_id for answer in answers]
    names = [name for name in HEADS if _with_label(name, answers)]
    result: dict[str, list[Verdict] | None] = {}
    with progress("cross-validating", FOLDS * len(names)) as advance:
        for name in names:
            verdicts: dict[int, Verdict] = {}
            try:
                for train, test in GroupKFold(FOLDS).split(answers, groups=groups):
                    head = _fit(name, _with_label(name, [answers[index] for index in train]))
                    judge = LinearJudge({name: head}, "", band)
                    judged = judge_readings(judge, [answers[index].completion for index in test])
                    verdicts |= zip(map(int, test), judged, strict=True)
                    advance(1)
                result[name] = [verdicts[index] for index in range(len(answers))]
            except DataError:
                # The answers suffice for the judge itself, but not without a fold.
                result[name] = None
    return result


def make_card(
    judge: LinearJudge, labeled: str, answers: Sequence[LabeledAnswer], quality: dict[str, list[Verdict] | None]
) -> dict[str, Any]:
    """Return the card of a judge.

    Args:
        judge: The judge.
        labeled: File of the labeled answers that it was fitted on.
        answers: These answers.
        quality: Verdicts on them, as `cross_validate` returns them.
    """
    from bfpo.training.manifest import installed_version, versions

    return {
        "schema": _SCHEMA,
        "judge": judge.name,
        "revision": judge.revision,
        "fitted_on": {
            "labeled": labeled,
            "files": {file.name: file_hash(file) for file in local_files(Source(path=labeled))},
            "answers": len(answers),
            "prompts": len({answer.completion.prompt_id for answer in answers}),
            "models": dict(sorted(Counter(answer.completion.model for answer in answers).items())),
            "labels": {
                name: dict(Counter(str(getattr(answer, name)).lower() for answer in _with_label(name, answers)))
                for name in judge.heads
            },
        },
        "undecided_band": list(judge.band),
        "quality_is": f"{FOLDS} folds grouped by prompt: each answer is judged by heads fitted on other prompts",
        "quality": {
            name: None if verdicts is None else agreement_by_model(name, answers, verdicts)
            for name, verdicts in quality.items()
        },
        "versions": versions() | {"scikit-learn": installed_version("scikit-learn")},
    }


def card_file(judge: Path) -> Path:
    """Return the path of the card of a judge's file."""
    return judge.with_suffix(".card.json")


def _with_label(name: str, answers: Sequence[LabeledAnswer]) -> list[LabeledAnswer]:
    return [answer for answer in answers if getattr(answer, name) is not None]


def _fit(name: str, answers: Sequence[LabeledAnswer]) -> Head:
    prompts = [last_request(answer.completion.prompt) for answer in answers]
    texts = [read_part(answer.completion).text for answer in answers]
    return fit_head(name, prompts, texts, [getattr(answer, name) for answer in answers])
