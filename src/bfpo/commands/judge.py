"""The work of `bfpo judge run` and `fit`; that of `eval` is in `against_people`."""

import re
from collections import Counter
from pathlib import Path

from bfpo.core.files import write_json
from bfpo.core.terminal import say
from bfpo.data.stages import judge_completions, read_completions
from bfpo.generation.open import ServerSection
from bfpo.judging.evaluate import show_rows
from bfpo.judging.fit import card_file, card_of, cross_validated, fit_heads
from bfpo.judging.labeled import read_labeled
from bfpo.judging.linear import DOUBT, save_judge
from bfpo.judging.open import open_judge

_REASONS = 5


def run_judge(
    completions: Path, spec: str, out: Path, *, threshold: float | None, server: ServerSection | None = None
) -> None:
    """Judge a file of completions, into a file of verdicts; resumable."""
    verdicts = judge_completions(
        open_judge(spec, threshold=threshold, server=server), read_completions(completions), out
    )
    safe = [verdict.safe for verdict in verdicts]
    refusals = sum(verdict.refusal is True for verdict in verdicts)
    say(
        f"{len(safe)} verdicts in {out}: {safe.count(True)} safe, {safe.count(False)} unsafe, "
        f"{safe.count(None)} undecided; {refusals} refusals"
    )
    # Reasons that differ in a number alone are one.
    why = Counter(re.sub(r"\d+(\.\d+)?", "N", verdict.reason or "") for verdict in verdicts if verdict.safe is None)
    for reason, count in why.most_common(_REASONS):
        say(f"  undecided {count}: {reason}")
    if rest := sum(why.values()) - sum(count for _, count in why.most_common(_REASONS)):
        say(f"  undecided {rest}: other reasons, see the file")


def fit_judge(labeled: str, out: Path, *, doubt: float = DOUBT) -> None:
    """Fit the `linear` judge's heads on what the labels tell, and write its card beside it.

    Args:
        labeled: Answers that people labeled.
        out: File of the judge; its card is `NAME.card.json`.
        doubt: See `save_judge`.

    Raises:
        DataError: If the answers are too few or carry one label alone.
        RecipeError: If `doubt` is out of its range.
    """
    answers = read_labeled(labeled)
    judge = save_judge(fit_heads(answers, labeled), out, doubt=doubt)
    say(f"{out}: linear@{judge.revision} knows {' and '.join(judge.heads)}, from {len(answers)} answers")
    quality = cross_validated(answers, judge.band)
    card = card_of(judge, labeled, answers, quality)
    write_json(card_file(out), card)
    for question, found in card["quality"].items():
        if found is None:
            say(f"{question}: too few answers to hold the judge to some that it wasn't fitted on")
        else:
            show_rows(f"{question}, on prompts that it wasn't fitted on", found)
    say(f"its card: {card_file(out)}")
