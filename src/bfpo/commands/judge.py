"""Work of `bfpo judge run`, `fit` and `agreement`; `bfpo judge eval` calls `bfpo.judging.evaluate`."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bfpo.core.files import write_json
from bfpo.core.samples import Verdict
from bfpo.core.terminal import say
from bfpo.data.stages import judge_completions, read_completions
from bfpo.errors import DataError, RecipeError
from bfpo.generation.open import JudgeServerSection
from bfpo.judging.annotations import read_annotations
from bfpo.judging.card import card_file, make_card
from bfpo.judging.evaluate import show_agreement, show_annotators, show_labelers, show_transfer, show_unlike
from bfpo.judging.fit import FittingSet, cross_validate, measure_transfer
from bfpo.judging.labeled import label_files, read_labeled
from bfpo.judging.languages import measured_languages
from bfpo.judging.linear import ABSTAIN_THRESHOLD, save_judge
from bfpo.judging.open import open_judge

_MAX_REASONS = 5


def run_judge(
    completions: Path, spec: str, out: Path, *, threshold: float | None, server: JudgeServerSection | None = None
) -> None:
    """Judge a file of completions into a file of verdicts; resumable.

    Args:
        completions: File of completions.
        spec: Spec of the judge.
        out: Output file of verdicts.
        threshold: Probability from which an answer counts as safe; see `open_judge`.
        server: How the servers of judges are queried; None is the defaults.
    """
    judge = open_judge(spec, threshold=threshold, server=server)
    verdicts = judge_completions(judge, read_completions(completions), out)
    safe = [verdict.safe for verdict in verdicts]
    refusals = sum(verdict.refusal is True for verdict in verdicts)
    say(
        f"{len(safe)} verdicts in {out}: {safe.count(True)} safe, {safe.count(False)} unsafe, "
        f"{safe.count(None)} undecided; {refusals} refusals"
    )
    show_unlike(spec, verdicts)
    _show_reasons(verdicts)


def _show_reasons(verdicts: Sequence[Verdict]) -> None:
    """Print the most frequent reasons of undecided verdicts."""
    # Reasons that differ in a number only are counted together.
    reasons = Counter(
        re.sub(r"\d+(\.\d+)?", "N", verdict.reason or "") for verdict in verdicts if verdict.safe is None
    )
    most_common = reasons.most_common(_MAX_REASONS)
    for reason, count in most_common:
        say(f"  undecided {count}: {reason}")
    if rest := reasons.total() - sum(count for _, count in most_common):
        say(f"  undecided {rest}: other reasons, see the file")


def fit_judge(labeled: str | Sequence[str], out: Path, *, abstain_threshold: float = ABSTAIN_THRESHOLD) -> None:
    """Fit the `linear` judge on labeled answers, and write its file and card.

    Args:
        labeled: File of labeled answers, or several; each is a source.
        out: Output file of the judge; its card is `NAME.card.json` beside it.
        abstain_threshold: Probability of an error above which the judge is undecided; see `save_judge`.

    Raises:
        DataError: If there are too few answers, or too few with one of the labels.
        RecipeError: If `abstain_threshold` is out of its range, or a file of labels is named twice.
    """
    if not 0 < abstain_threshold <= 0.5:
        raise RecipeError(f"`doubt` is {abstain_threshold}; expected more than 0 and at most 0.5")
    names = [labeled] if isinstance(labeled, str) else list(labeled)
    # A source on the hub has no local files.
    files = [str(file.resolve()) for name in names for file in label_files(name) or [Path(name)]]
    counts = Counter(files)
    if repeated := [file for file, count in counts.items() if count > 1]:
        raise RecipeError(f"{repeated[0]} is named twice, and its answers would count twice: {', '.join(names)}")
    sources = {name: read_labeled(name) for name in names}
    everything = FittingSet([answer for answers in sources.values() for answer in answers], ", ".join(names))
    show_labelers(everything.answers)
    languages = measured_languages(everything.answers)
    fitted = everything.fit(everything.rows)
    judge = save_judge(
        fitted.heads,
        out,
        abstain_threshold=abstain_threshold,
        likeness=fitted.likeness,
        fitted_prompts={answer.prompt_key for answer in everything.answers},
        languages=languages,
    )
    count = len(everything.answers)
    say(f"{out}: linear@{judge.revision} with heads {' and '.join(judge.heads)}, from {count:,} answers")
    if languages:
        say(f"measured on answers in {', '.join(languages)}, and undecided on answers in other languages")
    else:
        say(
            "note: the languages of the answers are unknown, so the judge decides on answers in any; add a column "
            "'language', or pip install 'bfpo[languages]'"
        )
    ends = np.cumsum([len(answers) for answers in sources.values()])
    rows = np.split(everything.rows, ends[:-1])
    transfers = measure_transfer(everything, rows, judge.band) if len(sources) > 1 else []
    quality = cross_validate(everything, judge.band)
    card = make_card(judge, sources, transfers, quality) | {"languages": list(languages)}
    write_json(card_file(out), card)
    show_transfer(card["transfer"])
    if not transfers:
        say("transfer isn't measured with one source: on other data this judge errs more often than shown here")
    for question, results in card["quality"].items():
        if results is None:
            say(f"{question}: too few answers to evaluate the judge on held-out prompts")
        else:
            show_agreement(f"{question}, on held-out prompts", results)
    say(f"card in {card_file(out)}")


def show_annotator_agreement(labels: Sequence[str], out: Path | None) -> None:
    """Print the agreement of annotators, and write it to a file.

    Args:
        labels: Files of annotations.
        out: Output file; None writes none.

    Raises:
        DataError: If a file is malformed, or no answer has labels of two annotators.
    """
    annotations = [annotation for path in labels for annotation in read_annotations(path)]
    if len({annotation.labeler for annotation in annotations}) < 2:
        raise DataError(f"{', '.join(labels)}: labels of one annotator; expected those of at least two")
    results = show_annotators(annotations)
    if out is not None:
        write_json(out, {"labels": list(labels), "annotators": results})
        say(f"results in {out}")
