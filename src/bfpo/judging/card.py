"""The card of a `linear` judge: what it was fitted on, and how often it is right there and elsewhere."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bfpo.core.files import file_hash
from bfpo.core.samples import Verdict
from bfpo.judging.evaluate import agreement_by_model, compute_agreement
from bfpo.judging.fit import FOLDS, Transfer
from bfpo.judging.labeled import LabeledAnswer, count_labelers, labeled_files
from bfpo.judging.likeness import is_unlike
from bfpo.judging.linear import LinearJudge

_SCHEMA = 1


def make_card(
    judge: LinearJudge,
    sources: dict[str, list[LabeledAnswer]],
    transfers: Sequence[Transfer],
    quality: dict[str, list[Verdict] | None],
) -> dict[str, Any]:
    """Return the card of a judge.

    Args:
        judge: The judge.
        sources: Labeled answers that it was fitted on, by source.
        transfers: Verdicts on each source of a judge fitted on the others; empty if there is one source.
        quality: Verdicts on all answers, as `cross_validate` returns them.
    """
    from bfpo.core.environment import installed_version, versions

    answers = [answer for source in sources.values() for answer in source]
    return {
        "schema": _SCHEMA,
        "judge": judge.name,
        "revision": judge.revision,
        "fitted_on": {
            "labeled": ", ".join(sources),
            "files": _file_hashes(sources),
            **_describe(answers, judge.heads),
            "sources": {name: _describe(source, judge.heads) for name, source in sources.items()},
        },
        "transfer_is": "each source is judged by a judge fitted on the others, without the prompts that they share; "
        "false_yes of `safe` is the false-safe rate",
        "transfer": {
            name: transfer_results(source, answers, transfer)
            for (name, source), transfer in zip(sources.items(), transfers, strict=False)
        },
        "undecided_band": list(judge.band),
        "unlike": None
        if judge.likeness is None
        else {
            "min_similarity_of_answers": judge.likeness.min_similarity,
            "max_new_words_of_prompts": judge.likeness.max_unknown,
            "undecided_band_of_unlike_prompts": list(judge.likeness.band),
            "references": judge.likeness.references.shape[0],
        },
        "quality_is": f"{FOLDS} folds grouped by prompt: each answer is judged by heads fitted on other prompts",
        "quality": {
            name: None if verdicts is None else agreement_by_model(name, answers, verdicts)
            for name, verdicts in quality.items()
        },
        "versions": versions() | {"scikit-learn": installed_version("scikit-learn")},
    }


def transfer_results(
    source: Sequence[LabeledAnswer], answers: Sequence[LabeledAnswer], transfer: Transfer
) -> dict[str, Any]:
    """Return the agreement on one source of a judge fitted on the others, by question.

    Args:
        source: Answers of the source.
        answers: Answers of all sources.
        transfer: Verdicts on the source.
    """
    results: dict[str, Any] = {"answers": len(source)}
    for question, verdicts in transfer.verdicts.items():
        if verdicts is None:
            results[question] = {"reason": transfer.reasons[question]}
            continue
        labeled = [answers[row] for row in transfer.rows[question]]
        results[question] = compute_agreement(question, labeled, verdicts)
        if question == "safe":
            results["unlike"] = sum(map(is_unlike, verdicts))
    return results


def card_file(judge: Path) -> Path:
    """Return the path of the card of a judge's file."""
    return judge.with_suffix(".card.json")


def _describe(answers: Sequence[LabeledAnswer], heads: Iterable[str]) -> dict[str, Any]:
    return {
        "answers": len(answers),
        "prompts": len({answer.prompt_key for answer in answers}),
        "models": dict(sorted(Counter(answer.completion.model for answer in answers).items())),
        "labels": {
            name: dict(
                Counter(str(label).lower() for answer in answers if (label := getattr(answer, name)) is not None)
            )
            for name in heads
        },
        "labelers": [
            {"name": labeler.name, "kind": labeler.kind, "answers": count}
            for labeler, count in count_labelers(answers).items()
        ],
    }


def _file_hashes(sources: Iterable[str]) -> dict[str, str]:
    """Return the hashes of all files, by name, or by path if two files have the same name."""
    files = [file for source in sources for file in labeled_files(source)]
    names = Counter(file.name for file in files)
    return {file.name if names[file.name] == 1 else str(file): file_hash(file) for file in files}
