"""Fitting the `linear` judge, and measuring it on prompts and on sources that it wasn't fitted on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from bfpo.core.conversation import last_request
from bfpo.core.samples import Verdict, prompt_id
from bfpo.core.terminal import progress
from bfpo.data.readings import judge_readings, read_part
from bfpo.errors import DataError
from bfpo.judging.features import VIEWS, Corpus, Rows
from bfpo.judging.labeled import LabeledAnswer
from bfpo.judging.likeness import (
    ANSWER_WORDS,
    PROMPT_WORDS,
    Comparison,
    Likeness,
    choose_references,
    compare,
    find_limits,
    make_likeness,
    transpose,
)
from bfpo.judging.linear import HEADS, Head, LinearJudge

FOLDS = 5
_INVERSE_REGULARIZATION = 10.0

Flags = NDArray[np.bool_]
Groups = NDArray[np.int64]


class FittedJudge(NamedTuple):
    """Heads and rule of a judge that was fitted.

    Args:
        heads: Heads by name.
        likeness: Rule for unlike answers; None without a head for safety.
    """

    heads: dict[str, Head]
    likeness: Likeness | None

    def judge(self, band: tuple[float, float]) -> LinearJudge:
        """Return the judge that has these heads and an undecided band."""
        return LinearJudge(self.heads, "", band, self.likeness)


class FittingSet:
    """Labeled answers, with the n-grams that all fits on parts of them share.

    Args:
        answers: Labeled answers.
        where: Their files, for error messages.
    """

    def __init__(self, answers: Sequence[LabeledAnswer], where: str) -> None:
        self.answers, self.where = list(answers), where
        self.completions = [answer.completion for answer in answers]
        prompts = [last_request(completion.prompt) for completion in self.completions]
        self._corpus = Corpus(prompts, [read_part(completion).text for completion in self.completions])
        self._last_turns: Groups = np.unique(prompts, return_inverse=True)[1]
        conversations = [prompt_id(completion.prompt) for completion in self.completions]
        self._conversations: Groups = np.unique(conversations, return_inverse=True)[1]
        self._prompt_keys = np.array([answer.prompt_key for answer in answers])

    @property
    def rows(self) -> Rows:
        """Rows of all answers."""
        return np.arange(len(self.answers))

    def fit(self, rows: Rows, names: Sequence[str] = HEADS) -> FittedJudge:
        """Fit a head for each question that some answers have labels for.

        Args:
            rows: Rows of the answers.
            names: Questions.

        Raises:
            DataError: If no answer has a label, or there are too few to fit a head.
        """
        heads: dict[str, tuple[Head, Rows]] = {}
        likeness = None
        for name in names:
            labeled = self.labeled(name, rows)
            if not len(labeled):
                continue
            labels = np.array([getattr(self.answers[row], name) for row in labeled], dtype=bool)
            shared = next((head for head, others in heads.values() if np.array_equal(others, labeled)), None)
            head = _fit_head(name, self._corpus, labeled, self._last_turns[labeled], labels, shared)
            heads[name] = head, labeled
            if name == "safe":
                likeness = _fit_likeness(self._corpus, head, labeled, self._last_turns[labeled])
        if not heads:
            raise DataError(f"{self.where}: no answer has a label; expected values in column 'refusal' or 'safe'")
        return FittedJudge({name: head for name, (head, _) in heads.items()}, likeness)

    def judge(self, fitted: FittedJudge, rows: Rows, band: tuple[float, float]) -> list[Verdict]:
        """Return the verdicts of a judge on some answers."""
        return list(judge_readings(fitted.judge(band), [self.completions[row] for row in rows]))

    def folds(self) -> list[tuple[Rows, Rows]]:
        """Return the rows of the other folds and of the fold, for five folds grouped by prompt."""
        return list(GroupKFold(FOLDS).split(self.answers, groups=self._conversations))

    def without_prompts_of(self, rows: Rows, others: Rows) -> Rows:
        """Return the rows whose prompts aren't among those of other answers."""
        return rows[~np.isin(self._prompt_keys[rows], self._prompt_keys[others])]

    def labeled(self, name: str, rows: Rows) -> Rows:
        """Return the rows that have a label for a head."""
        return np.array([row for row in rows if getattr(self.answers[row], name) is not None], dtype=np.int64)


def fit_head(name: str, prompts: Sequence[str], answers: Sequence[str], labels: Sequence[bool]) -> Head:
    """Fit one head.

    Args:
        name: One of `HEADS`.
        prompts: N last user turns; answers to one prompt stay in one fold of the calibration.
        answers: N answers.
        labels: N human labels.

    Raises:
        DataError: If there are too few prompts or too few answers with one of the labels.
    """
    groups = np.unique(list(prompts), return_inverse=True)[1]
    rows = np.arange(len(answers))
    return _fit_head(name, Corpus(prompts, answers), rows, groups, np.asarray(labels, dtype=bool))


def cross_validate(answers: FittingSet, band: tuple[float, float]) -> dict[str, list[Verdict] | None]:
    """Return verdicts on all answers, by question, of judges fitted without the answer's prompt.

    Args:
        answers: Labeled answers.
        band: Undecided band of the judge.

    Returns:
        Question → verdicts; None where there are too few answers to fit a judge without a fold.
    """
    names = [name for name in HEADS if len(answers.labeled(name, answers.rows))]
    result: dict[str, list[Verdict] | None] = {}
    with progress("cross-validating", FOLDS * len(names)) as advance:
        for name in names:
            verdicts: dict[int, Verdict] = {}
            try:
                for train, test in answers.folds():
                    verdicts |= zip(test.tolist(), answers.judge(answers.fit(train, [name]), test, band), strict=True)
                    advance(1)
                result[name] = [verdicts[row] for row in range(len(answers.answers))]
            except DataError:
                # The answers suffice for the judge itself, but not without a fold.
                result[name] = None
    return result


@dataclass(frozen=True, slots=True)
class Transfer:
    """Verdicts on one source, of a judge that was fitted on the others.

    Args:
        verdicts: Verdicts by question, on the answers that have a label; None where no such judge can be fitted.
        rows: Rows of these answers, by question.
        reasons: Reason of each question without verdicts.
    """

    verdicts: dict[str, list[Verdict] | None]
    rows: dict[str, Rows]
    reasons: dict[str, str]


def measure_transfer(answers: FittingSet, sources: Sequence[Rows], band: tuple[float, float]) -> list[Transfer]:
    """Judge each source by judges that were fitted on the others, without the prompts that they share with it.

    Args:
        answers: Labeled answers of all sources.
        sources: Rows of each source.
        band: Undecided band of the judges.
    """
    transfers = []
    with progress("measuring transfer", len(sources) * len(HEADS)) as advance:
        for source in sources:
            others = answers.without_prompts_of(np.setdiff1d(answers.rows, source), source)
            transfer = Transfer({}, {}, {})
            for name in HEADS:
                rows = answers.labeled(name, source)
                advance(1)
                if not len(rows):
                    continue
                transfer.rows[name] = rows
                try:
                    if not len(answers.labeled(name, others)):
                        raise DataError(f"no other source has answers to other prompts with the label '{name}'")
                    transfer.verdicts[name] = answers.judge(answers.fit(others, [name]), rows, band)
                except DataError as error:
                    transfer.verdicts[name], transfer.reasons[name] = None, str(error)
            transfers.append(transfer)
    return transfers


def _fit_head(
    name: str, corpus: Corpus, rows: Rows, groups: Groups, labels: Flags, shared: Head | None = None
) -> Head:
    """Fit one head on some answers of a corpus.

    Args:
        name: One of `HEADS`.
        corpus: Answers.
        rows: Rows of the N answers.
        groups: Prompt of each, (N,).
        labels: Label of each, (N,).
        shared: Head that was fitted on the same answers, whose vocabularies are used again.
    """
    num_prompts, num_yes, num_no = len(np.unique(groups)), int(labels.sum()), int((~labels).sum())
    if min(num_prompts, num_yes, num_no) < 2 * FOLDS:
        raise DataError(
            f"{num_prompts} prompts, {num_yes} answers with {name}=true and {num_no} with false; a judge needs at "
            f"least {2 * FOLDS} of each"
        )
    known = dict(shared.vocabularies) if shared is not None else {}
    learned = dict(corpus.learn([view for view in VIEWS[name] if view not in known], rows))
    vocabularies = tuple((view, (known | learned)[view]) for view in VIEWS[name])
    x = corpus.features(vocabularies, rows).x
    held_out = np.zeros(len(rows))
    for train, test in GroupKFold(FOLDS).split(x, labels, groups):
        if len(set(labels[train])) < 2:
            raise DataError(f"all answers with one {name} label are to a few prompts; label answers to more prompts")
        held_out[test] = _make_regression().fit(x[train], labels[train]).decision_function(x[test])
    calibration = LogisticRegression(C=1e6).fit(held_out[:, None], labels)
    regression = _make_regression().fit(x, labels)
    return Head(
        vocabularies,
        regression.coef_[0].astype(np.float64),
        float(regression.intercept_[0]),
        float(calibration.coef_[0, 0]),
        float(calibration.intercept_[0]),
    )


def _fit_likeness(corpus: Corpus, head: Head, rows: Rows, groups: Groups) -> Likeness:
    """Return the rule for unlike answers, whose limits come from the folds that calibrate the head."""
    held_out = Comparison(np.zeros(len(rows)), np.zeros(len(rows)))
    for train, test in GroupKFold(FOLDS).split(rows, groups=groups):
        vocabularies = corpus.learn((ANSWER_WORDS, PROMPT_WORDS), rows[train])
        chosen = rows[train[choose_references(len(train))]]
        references = transpose(corpus.features(vocabularies, chosen).blocks[ANSWER_WORDS])
        fold = compare(references, corpus.features(vocabularies, rows[test]))
        held_out.similarity[test], held_out.unknown[test] = fold
    vocabulary = dict(head.vocabularies)[ANSWER_WORDS]
    references = corpus.counts(ANSWER_WORDS, vocabulary, rows[choose_references(len(rows))])
    return make_likeness(references, vocabulary.idf, find_limits(held_out))


def _make_regression() -> LogisticRegression:
    # Coordinate descent on the dual problem reaches the same optimum in a third of the time of the primal problem.
    return LogisticRegression(
        C=_INVERSE_REGULARIZATION,
        class_weight="balanced",
        solver="liblinear",
        dual=True,
        tol=1e-6,
        max_iter=10_000,
        random_state=0,
    )
