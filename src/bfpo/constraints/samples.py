"""Scored samples of a base model, from completions with verdicts of judges or from a table of rewards and costs."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bfpo.config.recipes import Source
from bfpo.core.files import file_hash, parse_json
from bfpo.core.read_messages import as_messages
from bfpo.core.samples import Completion, Prompt, Verdict, prompt_id
from bfpo.data.readings import part_in_name
from bfpo.data.rows import SourceRow, read_rows, refuse_lone_surrogates
from bfpo.data.stages import read_completions, read_prompt_file, verdicts_by_judge, verdicts_on
from bfpo.data.verdict_files import judge_files
from bfpo.data.verdict_scores import cost_field, reward_field
from bfpo.errors import DataError

Array: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

# Columns of a table for PeCAN: log-probabilities of the answer under three models, summed over its tokens, in nats.
LOGP_COLUMNS = ("base_logp", "helpful_logp", "safe_logp")
_LOGPS = ", ".join(LOGP_COLUMNS)
# Larger scores overflow when they are divided by a small beta.
_LARGEST = 1e9
_SCORER_COLUMNS = ("reward_scorer", "cost_scorer", "model")


class SampleScores(NamedTuple):
    """Scores of one sample.

    Args:
        prompt_id: Identifier of the prompt.
        sample: Number of the sample.
        reward: Reward; higher is more helpful.
        cost: Cost; above 0 is unsafe. NaN if its judge gave none.
        is_unsafe: Whether it counts as unsafe; an undecided verdict does.
    """

    prompt_id: str
    sample: int
    reward: float
    cost: float
    is_unsafe: bool


@dataclass(frozen=True, slots=True, eq=False)
class ScoredSamples:
    """Scored samples of X prompts, at most N of each. Arrays are (X, N).

    Args:
        prompt_ids: Identifiers of the prompts.
        kinds: Kinds of the prompts; None if unknown.
        exists: Whether there is such a sample; prompts may have different numbers of samples.
        reward: Rewards; higher is more helpful.
        cost: Costs; above 0 is unsafe.
        is_unsafe: Whether a sample counts as unsafe.
        model: The base model; "" if unknown.
        reward_scorer: Who gave the rewards.
        cost_scorer: Who gave the costs.
        files: SHA-256 of the files, by path.
        temperature: Temperature of the sampling; None if unknown.
    """

    prompt_ids: tuple[str, ...]
    kinds: tuple[str | None, ...]
    exists: Mask
    reward: Array
    cost: Array
    is_unsafe: Mask
    model: str
    reward_scorer: str
    cost_scorer: str
    files: dict[str, str]
    temperature: float | None = None

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of samples of each prompt, (X,)."""
        return np.asarray(self.exists.sum(axis=1))


def read_scored_samples(
    path: Path, *, reward_judge: str | None = None, cost_judge: str | None = None, log_ratio_beta: float | None = None
) -> ScoredSamples:
    """Read scored samples.

    Args:
        path: A folder with `completions.jsonl` and files of verdicts, or a run with such a folder `evaluation`; or a
            table (`.jsonl`, `.csv`, ...) with the columns `prompt_id` (or `prompt`), `reward` and `cost` and, if
            there are any, `sample`, `safe`, `kind`, `reward_scorer`, `cost_scorer` and `model`.
        reward_judge: Judge whose verdicts are the rewards, `NAME` or `NAME@REVISION`; None if only one rates
            helpfulness.
        cost_judge: Judge whose verdicts are the costs; None if only one judges safety.
        log_ratio_beta: Beta by which log-ratios of a helpful and a safe model to the base model are multiplied; the
            table then has the columns of `LOGP_COLUMNS` in place of reward and cost.

    Raises:
        DataError: If a file is missing or malformed, scores are missing or not finite, all are equal, several scorers
            are mixed, or a prompt has a single sample.
    """
    if path.is_dir():
        if log_ratio_beta is not None:
            raise DataError(f"{path} is a folder; log-ratios of three models are read from a table with {_LOGPS}")
        samples = _read_folder(path, reward_judge, cost_judge)
    else:
        if reward_judge or cost_judge:
            raise DataError(f"{path} is a table, which has no verdicts of judges to choose from")
        samples = _read_table(path, log_ratio_beta)
    _check_scores(samples, path)
    return samples


def _read_table(path: Path, log_ratio_beta: float | None) -> ScoredSamples:
    rows: list[SampleScores] = []
    kinds: dict[str, str | None] = {}
    scorers: dict[str, set[str]] = {name: set() for name in _SCORER_COLUMNS}
    counts: dict[str, int] = defaultdict(int)
    for row in read_rows(Source(path=str(path))):
        with row.locate_errors():
            refuse_lone_surrogates(row)
            name = _prompt_id(row)
            if log_ratio_beta is None:
                reward, cost = _finite(row, "reward"), _finite(row, "cost")
            else:
                base, helpful, safe = (_finite(row, column) for column in LOGP_COLUMNS)
                reward, cost = log_ratio_beta * (helpful - base), -log_ratio_beta * (safe - base)
            is_unsafe = not row.label("safe") if row.values.get("safe") is not None else cost > 0
            sample = row.values.get("sample", counts[name])
            if isinstance(sample, bool) or not str(sample).isdecimal():
                raise DataError(f"column 'sample' is {sample!r}; expected a whole number of at least 0")
            counts[name] += 1
            rows.append(SampleScores(name, int(sample), reward, cost, is_unsafe))
            kind = row.values.get("kind")
            if not isinstance(kind, str | None) or kinds.setdefault(name, kind) != kind:
                raise DataError(f"column 'kind' is {kind!r}, and {kinds.get(name)!r} in another row of this prompt")
            for column in _SCORER_COLUMNS:
                scorers[column].add(str(row.values.get(column) or ""))
    for column, values in scorers.items():
        if len(values) > 1:
            raise DataError(
                f"{path}: column '{column}' has {len(values)} values ({', '.join(sorted(map(repr, values))[:3])}); "
                "scores of different scorers or models can't be compared: score all samples with one"
            )
    reward_scorer, cost_scorer, model = ("".join(scorers[column]) for column in _SCORER_COLUMNS)
    return _collect(
        rows,
        kinds,
        path=path,
        model=model,
        reward_scorer=reward_scorer,
        cost_scorer=cost_scorer,
        files={str(path): file_hash(path)},
    )


def _prompt_id(row: SourceRow) -> str:
    if row.values.get("prompt_id") is not None:
        return str(row.value("prompt_id"))
    if "prompt" in row.values:
        return prompt_id(as_messages(row.value("prompt")))
    return str(row.value("prompt_id"))


def _finite(row: SourceRow, column: str) -> float:
    """Return a column that must be a finite number; unlike an optional column, NaN is refused."""
    value = row.value(column)
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not np.isfinite(number):
        raise DataError(f"column '{column}' is {value!r}; expected a finite number: score this sample, or remove it")
    return number


def _read_folder(folder: Path, reward_judge: str | None, cost_judge: str | None) -> ScoredSamples:
    inner = folder / "evaluation"
    folder = inner if (inner / Completion.file_name).is_file() else folder
    path = folder / Completion.file_name
    if not path.is_file():
        raise DataError(f"{folder} has no {Completion.file_name}; generate completions first, several of each prompt")
    completions = read_completions(path)
    _check_one_model(completions, path)
    rewards, costs = {}, {}
    for judge, verdicts in verdicts_by_judge(folder).items():
        # An unsafe thought isn't an unsafe answer.
        if part_in_name(judge[0]) == "reasoning":
            continue
        if reward_field(verdicts) is not None:
            rewards[judge] = verdicts
        if any(verdict.safe is not None for verdict in verdicts):
            costs[judge] = verdicts
    reward_name, reward_verdicts = _choose(rewards, reward_judge, folder, "rates helpfulness", "reward_judge")
    cost_name, cost_verdicts = _choose(costs, cost_judge, folder, "judges safety", "cost_judge")
    field, grade = str(reward_field(reward_verdicts)), cost_field(cost_verdicts)
    rewarded = verdicts_on(completions, reward_verdicts, f"{folder}: {reward_name}")
    judged = verdicts_on(completions, cost_verdicts, f"{folder}: {cost_name}")
    rows = []
    for completion, rating, verdict in zip(completions, rewarded, judged, strict=True):
        reward = getattr(rating, field)
        if reward is None:
            raise DataError(f"{folder}: {reward_name} gave no helpfulness for {completion.key}; judge it again")
        cost = getattr(verdict, grade) if grade in ("score", "severity") else float(verdict.safe is not True)
        rows.append(SampleScores(*completion.key, reward, np.nan if cost is None else cost, verdict.safe is not True))
    files = [path, *judge_files(folder, "verdicts")]
    prompts_file = folder / Prompt.file_name
    kinds: dict[str, str | None] = {}
    if prompts_file.is_file():
        kinds = {prompt.prompt_id: prompt.kind for prompt in read_prompt_file(str(prompts_file))}
        files.append(prompts_file)
    return _collect(
        rows,
        kinds,
        path=path,
        model=completions[0].model,
        reward_scorer=reward_name,
        cost_scorer=cost_name,
        files={str(file): file_hash(file) for file in files},
        temperature=_temperature(folder),
    )


def _check_one_model(completions: Sequence[Completion], path: Path) -> None:
    origins = {(completion.model, completion.settings_hash) for completion in completions}
    if len(origins) > 1:
        raise DataError(
            f"{path} has completions of {len(origins)} models or settings ({sorted(origins)[:2]}); the base model is "
            "one: write a file for each"
        )


def _choose(
    candidates: dict[tuple[str, str], list[Verdict]], name: str | None, folder: Path, does: str, parameter: str
) -> tuple[str, list[Verdict]]:
    """Return the name and the verdicts of the judge that gives a score."""
    names = {f"{judge}@{revision}": verdicts for (judge, revision), verdicts in candidates.items()}
    if not names:
        raise DataError(
            f"{folder}: no judge with verdicts here {does}; judge the completions with one that does, or give a "
            "table with the columns prompt_id, reward and cost"
        )
    chosen = {
        full: verdicts for full, verdicts in names.items() if name is None or name in (full, full.rpartition("@")[0])
    }
    if len(chosen) != 1:
        problem = f"several judges: {', '.join(names)}" if name is None else f"`{parameter}` is '{name}'"
        raise DataError(f"{folder}: {problem}; set `{parameter}` to one that {does}: {', '.join(sorted(names))}")
    return next(iter(chosen.items()))


def _temperature(folder: Path) -> float | None:
    """Return the temperature of an evaluation; None if it isn't recorded."""
    try:
        temperature = parse_json((folder / "results.json").read_text(encoding="utf-8"))["sampling"]["temperature"]
        return float(temperature)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _collect(
    rows: Sequence[SampleScores], kinds: dict[str, str | None], *, path: Path, **metadata: Any
) -> ScoredSamples:
    """Return rows as arrays, prompt by prompt in their first order."""
    by_prompt: dict[str, dict[int, SampleScores]] = {}
    for row in rows:
        samples = by_prompt.setdefault(row.prompt_id, {})
        if row.sample in samples:
            raise DataError(f"{path}: sample {row.sample} of prompt '{row.prompt_id}' is duplicated")
        samples[row.sample] = row
    shape = len(by_prompt), max(map(len, by_prompt.values()))
    exists, is_unsafe = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    reward, cost = np.zeros(shape), np.zeros(shape)
    for x, samples in enumerate(by_prompt.values()):
        for n, (_, row) in enumerate(sorted(samples.items())):
            exists[x, n], is_unsafe[x, n] = True, row.is_unsafe
            reward[x, n], cost[x, n] = row.reward, row.cost
    names = tuple(by_prompt)
    return ScoredSamples(names, tuple(kinds.get(name) for name in names), exists, reward, cost, is_unsafe, **metadata)


def _check_scores(samples: ScoredSamples, path: Path) -> None:
    """Refuse samples from which no multiplier follows."""
    single = [name for name, count in zip(samples.prompt_ids, samples.counts, strict=True) if count < 2]
    if single:
        raise DataError(
            f"{path}: {len(single)} of {len(samples.prompt_ids)} prompts have a single sample (the first is "
            f"'{single[0]}'); a policy is predicted from how the samples of one prompt differ: generate 32 or more "
            "of each prompt"
        )
    for name, values in (("reward", samples.reward), ("cost", samples.cost)):
        distinct = np.unique(values[samples.exists])
        if (np.abs(distinct[np.isfinite(distinct)]) > _LARGEST).any():
            raise DataError(
                f"{path}: a {name} is {distinct[np.nanargmax(np.abs(distinct))]:g}; expected a size of at most 1e9"
            )
        if len(distinct) == 1 and np.isfinite(distinct[0]):
            raise DataError(
                f"{path}: the {name} of all {samples.exists.sum():,} samples is {distinct[0]:g}; check the scorer, "
                "or generate more varied samples"
            )
