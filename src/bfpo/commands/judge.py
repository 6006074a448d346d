"""Work of `bfpo judge run` and `bfpo judge fit`; `bfpo judge eval` calls `bfpo.judging.evaluate`."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bfpo.core.files import write_json
from bfpo.core.samples import Verdict
from bfpo.core.terminal import say
from bfpo.data.stages import judge_completions, read_completions
from bfpo.generation.open import JudgeServerSection
from bfpo.judging.evaluate import show_agreement
from bfpo.judging.fit import card_file, cross_validate, fit_heads, make_card
from bfpo.judging.labeled import read_labeled
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


def fit_judge(labeled: str, out: Path, *, abstain_threshold: float = ABSTAIN_THRESHOLD) -> None:
    """Fit the `linear` judge on labeled answers, and write its file and card.

    Args:
        labeled: File of labeled answers.
        out: Output file of the judge; its card is `NAME.card.json` beside it.
        abstain_threshold: Probability of an error above which the judge is undecided; see `save_judge`.

    Raises:
        DataError: If there are too few answers, or too few with one of the labels.
        RecipeError: If `abstain_threshold` is out of its range.
    """
    answers = read_labeled(labeled)
    languages = measured_languages(answers)
    judge = save_judge(fit_heads(answers, labeled), out, abstain_threshold=abstain_threshold, languages=languages)
    say(f"{out}: linear@{judge.revision} with heads {' and '.join(judge.heads)}, from {len(answers)} answers")
    if languages:
        say(f"measured on answers in {', '.join(languages)}, and undecided on answers in other languages")
    else:
        say(
            "note: the languages of the answers are unknown, so the judge decides on answers in any; add a column "
            "'language', or pip install 'bfpo[languages]'"
        )
    card = make_card(judge, labeled, answers, cross_validate(answers, judge.band)) | {"languages": list(languages)}
    write_json(card_file(out), card)
    for question, rows in card["quality"].items():
        if rows is None:
            say(f"{question}: too few answers to evaluate the judge on held-out prompts")
        else:
            show_agreement(f"{question}, on held-out prompts", rows)
    say(f"card in {card_file(out)}")
