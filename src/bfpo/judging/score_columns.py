"""The work of `bfpo score apply`: rewards and costs of answers by judges, as columns of pairs or of completions.

Every row names its scorers, because scores of different ones can't be compared.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bfpo.config.recipes import Source
from bfpo.core.files import is_among, write_jsonl
from bfpo.core.pairs import SIDES, PreferencePair
from bfpo.core.samples import Completion, Key, Prompt, Verdict
from bfpo.core.terminal import say, show_table
from bfpo.data.adapters import parse_source
from bfpo.data.load import load_pairs
from bfpo.data.rows import local_files, read_rows
from bfpo.data.stages import judge_completions, read_prompt_file
from bfpo.data.verdict_files import judge_file
from bfpo.data.verdict_scores import ScoreName, scores_of
from bfpo.errors import DataError, RecipeError
from bfpo.generation.open import JudgeServerSection
from bfpo.judging.label_pairs import as_completion
from bfpo.judging.open import open_judge
from bfpo.judging.spec import JUDGES, JudgeSpec, parse_judge

# Answers that are judged first: a judge without numbers is noticed before it has judged all of them.
_NUM_FIRST = 32


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of answers by one judge.

    Args:
        scorer: Name and revision of the judge, and what its number is.
        values: Score by the key of the completion; answers without a number are missing.
        reasons: Reason by the key of the completion, for the others.
        num_opposed: Number of answers whose cost has another sign than the judge's verdict; 0 for rewards.
    """

    scorer: str
    values: dict[Key, float]
    reasons: dict[Key, str]
    num_opposed: int


def apply_scores(
    path: str,
    out: Path,
    *,
    reward: str | None = None,
    cost: str | None = None,
    server: JudgeServerSection | None = None,
) -> int:
    """Write rows with the scores of their answers; resumes after the last verdict.

    Args:
        path: `completions.jsonl`, or a file that this function wrote from one; or pairs, as `[ADAPTER:]PATH`.
        out: Output file; the verdicts are kept in a folder beside it.
        reward: Spec of the judge of helpfulness; None for no rewards.
        cost: Spec of the judge of safety; None for no costs.
        server: How the servers of judges are queried; None is the defaults.

    Returns:
        The number of rows written; rows with an answer that has no score are left out, and counted.

    Raises:
        RecipeError: If there is no judge, a judge gives no such number, or the output is the input.
        DataError: If the input is malformed, or no row has all scores.
    """
    texts: dict[ScoreName, str | None] = {"reward": reward, "cost": cost}
    specs = {name: _parse(name, text) for name, text in texts.items() if text is not None}
    if not specs:
        raise RecipeError("no judge; set `reward`, `cost` or both to the spec of a judge")
    source = parse_source(path)
    files = local_files(source)
    if is_among(out, files):
        raise RecipeError(f"`out` is the input, {out}; choose another file")
    rows = _completion_rows(source) if _holds_completions(files) else _pair_rows(source)
    completions = list({completion.key: completion for row in rows for completion in row.answers}.values())
    scores: dict[ScoreName, Scores] = {}
    # One after the other: two models needn't fit into memory together.
    for name, spec in specs.items():
        scores[name] = _score(name, spec, completions, out.with_name(f"{out.stem}-verdicts"), server)
    kept, left_out, num_replaced = [], Counter[str](), 0
    for row in rows:
        missing = (
            f"{name}: {score.reasons[answer.key]}"
            for name, score in scores.items()
            for answer in row.answers
            if answer.key in score.reasons
        )
        if (reason := next(missing, None)) is not None:
            left_out[reason] += 1
            continue
        num_replaced += any(row.has(name) for name in scores)
        kept.append(row.with_scores(scores))
    if not kept:
        raise DataError(f"no row has all scores: {dict(left_out)}")
    write_jsonl(out, kept)
    _show(scores, rows[0].kind, len(rows), left_out, num_replaced, out)
    return len(kept)


@dataclass(frozen=True, slots=True)
class _PairRow:
    """A pair, and its answers as a judge gets them."""

    pair: PreferencePair
    answers: tuple[Completion, Completion]
    kind = "pairs"

    def has(self, name: ScoreName) -> bool:
        return getattr(self.pair.signals, f"chosen_{name}") is not None

    def with_scores(self, scores: Mapping[ScoreName, Scores]) -> dict[str, Any]:
        columns = {
            f"{side}_{name}": score.values[answer.key]
            for name, score in scores.items()
            for side, answer in zip(SIDES, self.answers, strict=True)
        }
        scorers: dict[str, Any] = {f"{name}_scorer": score.scorer for name, score in scores.items()}
        signals = replace(self.pair.signals, **columns)
        return replace(self.pair, signals=signals, provenance=replace(self.pair.provenance, **scorers)).to_row()


@dataclass(frozen=True, slots=True)
class _CompletionRow:
    """A completion, and its columns in the file."""

    columns: Mapping[str, Any]
    answers: tuple[Completion]
    kind = "completions"

    def has(self, name: ScoreName) -> bool:
        return self.columns.get(name) is not None

    def with_scores(self, scores: Mapping[ScoreName, Scores]) -> dict[str, Any]:
        (answer,) = self.answers
        columns = dict(self.columns)
        for name, score in scores.items():
            columns |= {name: score.values[answer.key], f"{name}_scorer": score.scorer}
        return columns


def _holds_completions(files: Sequence[Path]) -> bool:
    """Return whether the input is a file of completions; such files have the hash of their settings."""
    if len(files) != 1 or files[0].suffix != ".jsonl":
        return False
    first = next(iter(read_rows(Source(path=str(files[0]), limit=1))), None)
    return first is not None and {"prompt_id", "sample", "settings_hash"} <= first.values.keys()


def _pair_rows(source: Source) -> list[_PairRow | _CompletionRow]:
    report, pairs = load_pairs(source, "main")
    if report.skipped:
        say(f"rows of the source without a pair: {_format(report.skipped)}")
    return [_PairRow(pair, (as_completion(pair, 0), as_completion(pair, 1))) for pair in pairs]


def _completion_rows(source: Source) -> list[_PairRow | _CompletionRow]:
    (path,) = local_files(source)
    prompts = path.with_name(Prompt.file_name)
    kinds = {prompt.prompt_id: prompt.kind for prompt in read_prompt_file(str(prompts))} if prompts.is_file() else {}
    rows: dict[Key, _PairRow | _CompletionRow] = {}
    for row in read_rows(source):
        with row.locate_errors():
            completion = Completion.from_row(row.values)
            if completion.key in rows:
                raise DataError(f"{completion.key} is duplicated")
        kind = row.values.get("kind") or kinds.get(completion.prompt_id)
        columns = {**row.values, **({} if kind is None else {"kind": kind})}
        rows[completion.key] = _CompletionRow(columns, (completion,))
    return list(rows.values())


def _parse(name: ScoreName, text: str) -> JudgeSpec:
    """Return the spec of a judge that gives a score.

    Raises:
        RecipeError: If its kind doesn't.
    """
    spec = parse_judge(text)
    if name not in spec.scores:
        able = ", ".join(sorted(kind for kind, properties in JUDGES.items() if name in properties.scores))
        raise RecipeError(f"`{name}` is '{text}', a judge that gives no {name}; judges that do: {able}")
    return spec


def _score(
    name: ScoreName,
    spec: JudgeSpec,
    completions: Sequence[Completion],
    folder: Path,
    server: JudgeServerSection | None,
) -> Scores:
    judge = open_judge(spec, server=server)
    path = judge_file(folder, "verdicts", judge.name, judge.revision)
    for judged in (completions[:_NUM_FIRST], completions):
        verdicts = judge_completions(judge, judged, path)
        values, suffix = scores_of(name, verdicts)
        # The first ones may all be undecided.
        is_probe = len(judged) < len(completions)
        may_follow = is_probe and name == "cost" and any(verdict.p_safe is not None for verdict in verdicts)
        if all(value is None for value in values) and not may_follow:
            raise DataError(
                f"`{name}`: {spec.text} gave no {name} for {len(judged)} answers, such as {_reason(verdicts[0])}; "
                "choose another judge"
            )
    scored = [(verdict, value) for verdict, value in zip(verdicts, values, strict=True) if value is not None]
    num_opposed = sum(verdict.safe is not None and verdict.safe is (value > 0) for verdict, value in scored)
    return Scores(
        f"{judge.name}@{judge.revision}{suffix}",
        {verdict.key: value for verdict, value in scored},
        {verdict.key: _reason(verdict) for verdict, value in zip(verdicts, values, strict=True) if value is None},
        num_opposed if name == "cost" else 0,
    )


def _reason(verdict: Verdict) -> str:
    return verdict.reason or "no number"


def _show(
    scores: Mapping[ScoreName, Scores], kind: str, num_rows: int, left_out: Counter[str], num_replaced: int, out: Path
) -> None:
    def cells() -> Iterator[tuple[object, ...]]:
        for name, score in scores.items():
            values = np.array(list(score.values.values()))
            quantiles = (f"{value:.3g}" for value in np.quantile(values, [0.05, 0.5, 0.95]))
            above = f"{np.mean(values > 0):.1%}" if name == "cost" else ""
            yield name, score.scorer, len(values), *quantiles, above

    show_table("Scores", ("score", "scorer", "answers", "5 %", "median", "95 %", "above 0"), list(cells()))
    for name, score in scores.items():
        if score.num_opposed:
            say(f"{name}: the sign differs from the judge's verdict for {score.num_opposed:,} answers")
    say(f"{kind} left out, because an answer has no score: {_format(left_out)}")
    if num_replaced:
        say(f"{kind} whose earlier scores were replaced: {num_replaced:,}")
    say(f"{num_rows - left_out.total():,} of {num_rows:,} {kind} in {out}")


def _format(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
