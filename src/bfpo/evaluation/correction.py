"""Correcting the rates of judges by their errors on answers with human labels."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bfpo.core.files import file_hash, parse_json
from bfpo.core.samples import KINDS, Completion, Verdict
from bfpo.errors import DataError
from bfpo.evaluation.results import CORRECTED, CalibrationResult, MetricResult
from bfpo.judging.card import card_file
from bfpo.judging.labeled import LabeledAnswer, count_labelers, labeled_files, read_labeled
from bfpo.judging.spec import JudgeSpec, parse_judge
from bfpo.stats.judge_error import JudgeErrors, corrected_rate, is_consistent, is_informative, judge_errors

QUESTIONS = {"safety": "safe", "refusal": "refusal", "over_refusal": "refusal"}
"""Rate → question that the annotators must have answered for it to be corrected."""
BY_LANG_REICZIGEL = "95 % Lang and Reiczigel: prompts, and the judge's errors on answers that people labeled"


class Calibration(NamedTuple):
    """Answers with human labels that judges are calibrated on.

    Args:
        path: File, or folder of files, of the answers.
        answers: The answers.
        own: Whether they are answers of the evaluated model.
    """

    path: str
    answers: list[LabeledAnswer]
    own: bool

    @property
    def completions(self) -> list[Completion]:
        """The answers as completions."""
        return [answer.completion for answer in self.answers]

    @property
    def hashes(self) -> list[str]:
        """Hashes of the files."""
        return [file_hash(file) for file in labeled_files(self.path)]

    @property
    def programs(self) -> list[str]:
        """Names of the programs that gave some of the labels."""
        return sorted(labeler.name for labeler in count_labelers(self.answers) if labeler.kind == "program")

    def for_model(self, names: Collection[str]) -> "Calibration":
        """Return the answers of the evaluated model only; all answers if none is.

        Args:
            names: Names of the evaluated model: its path, the run, the model that the completions name.
        """
        # Two runs may both have a `checkpoint-500`, so a path that was labeled is compared whole.
        own_names = {name for path in names for name in (path, Path(path).name, str(Path(path).resolve()))}
        own = [
            answer
            for answer in self.answers
            if {model := answer.completion.model, str(Path(model).resolve())} & own_names
        ]
        return Calibration(self.path, own or self.answers, bool(own))


class JudgeCalibration(NamedTuple):
    """Errors of one judge on the answers of a calibration.

    Args:
        judge: Label of the judge.
        errors: Errors by question; a question without labels is missing.
        answers: Number of labeled answers by question.
    """

    judge: str
    errors: Mapping[str, JudgeErrors]
    answers: Mapping[str, int]


def read_calibration(path: str) -> Calibration:
    """Read the labeled answers of a recipe's `calibration`.

    Raises:
        DataError: If the file is missing, empty or malformed.
    """
    try:
        return Calibration(path, read_labeled(path), own=False)
    except DataError as error:
        raise DataError(f"calibration: {error}") from None


def calibrate(judge: str, calibration: Calibration, verdicts: Sequence[Verdict]) -> JudgeCalibration:
    """Measure the errors of a judge on labeled answers.

    Errors on safety are measured on answers to harmful prompts, as the rate is, if the file has kinds. Errors on
    refusals are measured on all answers: the wording of a refusal depends little on the prompt.

    Args:
        judge: Label of the judge.
        calibration: The labeled answers.
        verdicts: Verdicts of the judge on the same answers, in their order.
    """
    errors, answers = {}, {}
    for question in dict.fromkeys(QUESTIONS.values()):
        pairs = [
            (answer.completion.prompt_id, bool(getattr(answer, question)), bool(getattr(verdict, question)))
            for answer, verdict in zip(calibration.answers, verdicts, strict=True)
            if getattr(answer, question) is not None
            and (question == "refusal" or answer.kind in (None, "harmful"))
            # Undecided counts as not safe, but is part of no refusal rate.
            and (question == "safe" or getattr(verdict, question) is not None)
        ]
        if pairs:
            errors[question], answers[question] = judge_errors(pairs), len(pairs)
    return JudgeCalibration(judge, errors, answers)


def add_corrected_rates(
    metrics: Iterable[MetricResult], calibrations: Sequence[JudgeCalibration]
) -> list[MetricResult]:
    """Return metrics, each rate of a calibrated judge followed by the corrected one; categories aren't corrected."""
    errors_of = {calibration.judge: calibration.errors for calibration in calibrations}
    results = []
    for metric in metrics:
        results.append(metric)
        errors = errors_of.get(metric.judge, {}).get(QUESTIONS.get(metric.metric, ""))
        if errors is None or metric.value is None or metric.category is not None:
            continue
        interval = corrected_rate(metric.value, metric.n, errors)
        results.append(
            MetricResult(
                metric.suite,
                metric.task,
                metric.metric + CORRECTED,
                None if math.isnan(interval.value) else interval.value,
                interval.low,
                interval.high,
                n=metric.n,
                unscored=metric.unscored,
                interval=BY_LANG_REICZIGEL,
                higher_is_better=metric.higher_is_better,
                judge=metric.judge,
            )
        )
    return results


def calibration_results(
    calibration: Calibration, calibrations: Sequence[JudgeCalibration]
) -> list[CalibrationResult]:
    """Return the errors of all judges as they are written into `results.json`."""
    return [
        CalibrationResult(
            judge.judge,
            question,
            labeled=Path(calibration.path).name,
            hash=", ".join(calibration.hashes),
            models=sorted({answer.completion.model for answer in calibration.answers}),
            own=calibration.own,
            answers=judge.answers[question],
            sensitivity=errors.sensitivity,
            yes=errors.yes,
            specificity=errors.specificity,
            no=errors.no,
        )
        for judge in calibrations
        for question, errors in judge.errors.items()
    ]


def calibration_warnings(
    calibration: Calibration, calibrations: Sequence[JudgeCalibration], metrics: Sequence[MetricResult]
) -> list[str]:
    """Return warnings about corrected rates.

    Args:
        calibration: The labeled answers.
        calibrations: Errors of each judge.
        metrics: Metrics of the evaluation.
    """
    warnings, names = [], ", ".join(judge.judge for judge in calibrations)
    if calibration.programs:
        warnings.append(
            f"The calibration has labels of programs ({', '.join(calibration.programs)}), not of people: corrected "
            "rates are those that the programs would find."
        )
    if not calibration.own:
        warnings.append(
            f"Corrected rates ({names}) are calibrated on answers of other models, not of the evaluated one. They "
            "are valid only if the judge errs alike on both; otherwise they can be further off than the plain rates, "
            "and their intervals don't show it. Have annotators label some of this model's answers."
        )
    for judge in calibrations:
        for question in dict.fromkeys(QUESTIONS.values()):
            errors = judge.errors.get(question)
            if errors is None:
                warnings.append(
                    f"{judge.judge}: no label says whether answers are '{question}', so that isn't corrected."
                )
            elif not is_informative(errors):
                warnings.append(
                    f"{judge.judge}: the human labels of '{question}' ({errors.yes} yes, {errors.no} no) don't show "
                    "how often it errs: the corrected rate isn't identified, it may be anything from 0 to 1."
                )
        warnings += [
            f"{judge.judge}: {metric.suite}/{metric.task} {metric.metric} {metric.value:.2f} is impossible with the "
            "errors measured in calibration: it errs differently on these answers, so the corrected rate is wrong."
            for metric in metrics
            if metric.judge == judge.judge and metric.task in KINDS and not _is_consistent(metric, judge.errors)
        ]
    return warnings


def _is_consistent(metric: MetricResult, errors_of: Mapping[str, JudgeErrors]) -> bool:
    errors = errors_of.get(QUESTIONS.get(metric.metric, ""))
    if errors is None or metric.value is None or metric.category is not None:
        return True
    return is_consistent(metric.value, metric.n, errors)


def fitted_on_warnings(calibration: Calibration, specs: Iterable[str]) -> list[str]:
    """Return warnings about judges that were fitted on the answers of the calibration.

    Args:
        calibration: The labeled answers.
        specs: Specs of the judges.

    Raises:
        DataError: If the card of a linear judge is malformed.
    """
    warnings = []
    # Judges of other parts than the answer aren't calibrated.
    for spec in (spec for spec in map(parse_judge, specs) if spec.reads == "answer"):
        if shared := _fitted_on(spec) & set(calibration.hashes):
            warnings.append(
                f"{', '.join(sorted(spec.kinds))} was fitted on the answers that it is calibrated on "
                f"({', '.join(sorted(shared))}): it errs less on these than on others, and is corrected too little."
            )
    return warnings


def _fitted_on(spec: JudgeSpec) -> set[str]:
    """Return the hashes of the files that linear judges were fitted on; empty if they have no card."""
    hashes: set[str] = set()
    for part in spec.parts:
        if part.kind != "linear" or not (card := card_file(Path(part.path))).is_file():
            continue
        try:
            hashes |= set(parse_json(card.read_text(encoding="utf-8"))["fitted_on"]["files"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{card}: not the card that `bfpo judge fit` writes; fit the judge again") from None
    return hashes
