"""Training in rounds until the trained policy meets a constraint: the outer loop of C-DPO (arXiv 2403.02475).

`bfpo dual` predicts the multiplier from samples of the base model. A round trains on it, samples the trained policy
and measures the constraint, so what the prediction doesn't know (few samples, new prompts, the error of training)
moves the next multiplier. Every round starts from the base model, which is also the reference, so what a multiplier
gives doesn't depend on the ones before.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from bfpo.config.loading import dump_recipe, holds_recipe
from bfpo.config.losses import BFPOSection
from bfpo.config.recipes import OuterSection, ScoreLabelsSection, TrainRecipe
from bfpo.constraints.measure import constrained_values, measure_interval
from bfpo.constraints.rounds import OuterResult, Round, format_measure, read_round, show_rounds
from bfpo.constraints.search import Tried, next_multiplier
from bfpo.core.files import file_hash, parse_json, write_json, write_jsonl, write_text
from bfpo.core.samples import Completion, Prompt, Sampling, Verdict
from bfpo.core.terminal import say
from bfpo.data.rows import local_files
from bfpo.data.stages import generate_completions, judge_completions, read_prompt_file
from bfpo.data.verdict_files import judge_file
from bfpo.data.verdict_scores import scores_of
from bfpo.errors import DataError, RecipeError, TrainingError
from bfpo.generation.in_process import likeliest_answers
from bfpo.generation.open import EngineSection, open_engine
from bfpo.judging.open import open_judge
from bfpo.judging.refusal_rule import kinds_of
from bfpo.judging.spec import parse_judge
from bfpo.losses.dual import FILE_NAME as DUAL_NAME
from bfpo.losses.dual import Constraint, Dual, read_dual
from bfpo.stats.intervals import LEVEL, MIN_PROMPTS, Interval, mean_interval, score_interval
from bfpo.training.arguments import output_folder, without_resume
from bfpo.training.loss_files import read_score_labels, resolve_loss_files
from bfpo.training.output import exclusive_output
from bfpo.training.run import run_training

FILE_NAME = "outer.json"
_ROUNDS = "rounds"
_DATA = "data.json"


def run_outer(recipe: TrainRecipe, *, limit: int | None = None, allow_unmet: bool = False) -> OuterResult:
    """Train in rounds until the policy meets the constraint; a second start resumes.

    The output folder gets the policy of the chosen round, `outer.json`, and `rounds/` with every checkpoint, answer
    and verdict.

    Args:
        recipe: Recipe of a training with `outer`.
        limit: Maximum number of pairs of each source.
        allow_unmet: Whether that no round meets the constraint is a result in place of an error.

    Raises:
        RecipeError: If the multiplier, the judge or the prompts can't be used, or the folder has another run.
        DataError: If the prompts or the files of an earlier start are malformed.
        TrainingError: If no round meets the constraint; the files are written then, too.
    """
    loop = _OuterLoop.of(recipe, limit)
    with exclusive_output(loop.out):
        loop.claim_output()
        rounds: list[Round] = []
        while len(rounds) < loop.section.rounds and not (rounds and rounds[-1].settles(loop.threshold)):
            rounds.append(loop.run_round(len(rounds), rounds))
        result = loop.finish(rounds)
    if not result.holds and not allow_unmet:
        raise TrainingError(
            f"no round of {len(rounds)} meets the constraint; {loop.out} has the policy with the lowest measure. "
            "Allow more, give more `rounds` and another output folder, or check whether pairs have safe answers"
        )
    return result


def check_outer(recipe: TrainRecipe, *, limit: int | None = None) -> None:
    """Check everything that `run_outer` does before it trains, and what its first training does (`--dry-run`)."""
    loop = _OuterLoop.of(recipe, limit)
    loop.check_output()
    run_training(loop.round_recipe(0), dry_run=True, limit=limit)


@dataclass(frozen=True, slots=True)
class _OuterLoop:
    """The loop of a recipe.

    Args:
        recipe: The recipe.
        section: Its `outer`.
        out: Its output folder.
        dual: The constraint, and the multiplier of the first round.
        prompts: Prompts that are answered in each round, those that the constraint counts first.
        num_counted: Number of prompts that it counts.
        limit: Maximum number of pairs of each source.
    """

    recipe: TrainRecipe
    section: OuterSection
    out: Path
    dual: Dual
    prompts: list[Prompt]
    num_counted: int
    limit: int | None

    @classmethod
    def of(cls, recipe: TrainRecipe, limit: int | None) -> "_OuterLoop":
        section = recipe.outer
        assert section is not None
        if PartialState().num_processes > 1:
            raise RecipeError("outer samples and judges in one process; start it without a launcher")
        # Rounds resume whatever the recipe says, and a recipe that says so is the same one.
        recipe = recipe.model_copy(update={"trainer": without_resume(recipe.trainer)})
        out = output_folder(recipe.trainer)
        # A multiplier that doesn't fit is refused before anything is trained.
        resolve_loss_files(recipe)
        read_score_labels(recipe)
        dual = read_dual(_multiplier_file(recipe))
        _check_judges(section, dual)
        prompts = read_prompt_file(section.prompts)
        kind = dual.constraint.kind
        counted = [prompt for prompt in prompts if kind is None or prompt.kind == kind]
        if not counted:
            raise RecipeError(
                f"outer.prompts: {section.prompts} has no prompt of the kind '{kind}', which the constraint of "
                "dual.json counts; add the key kind to its prompts"
            )
        # Without a judge of helpfulness nothing reads the answers to the others.
        others = [prompt for prompt in prompts if prompt not in counted] if section.reward is not None else []
        loop = cls(recipe, section, out, dual, [*counted, *others], len(counted), limit)
        loop.check_reachable()
        return loop

    @property
    def constraint(self) -> Constraint:
        return self.dual.constraint

    @property
    def threshold(self) -> float:
        return self.constraint.threshold

    @property
    def level(self) -> float:
        """Level of the intervals of single rounds: all of them hold at `LEVEL` together (Bonferroni)."""
        return 1 - (1 - LEVEL) / self.section.rounds

    def check_reachable(self) -> None:
        """Refuse prompts so few that no policy could be shown to meet the constraint."""
        count, samples = self.num_counted, self.section.samples
        if self.constraint.measure != "unsafe":
            if count < MIN_PROMPTS:
                raise RecipeError(
                    f"outer.prompts: {count} prompts are counted; a bound on {self.constraint.measure} needs "
                    f"{MIN_PROMPTS}"
                )
            return
        best = score_interval(np.zeros(count), most=count * samples, level=self.level).high
        if best > self.threshold:
            raise RecipeError(
                f"outer.prompts: with {count} prompts the interval of a policy without any unsafe answer ends at "
                f"{100 * best:.3g} %, above the threshold of {100 * self.threshold:.3g} %; give more prompts, or "
                "fewer `rounds`"
            )

    def check_output(self) -> bool:
        """Return whether the output folder has rounds of this recipe and these data; it must be new otherwise."""
        if not self.out.exists() or not any(self.out.iterdir()):
            return False
        reason = "of another recipe"
        if holds_recipe(self.out / _ROUNDS / "recipe.yaml", self.recipe):
            data = self.out / _ROUNDS / _DATA
            # Earlier versions left no such file.
            if not data.exists() or parse_json(data.read_text(encoding="utf-8")) == self._data():
                return True
            reason = "on other pairs, or with another --limit"
        raise RecipeError(f"trainer.output_dir: {self.out} has a run {reason}; name another folder, or remove it")

    def claim_output(self) -> None:
        """Write the recipe into the output folder, which must be new or of the same recipe and data."""
        if not self.check_output():
            write_json(self.out / _ROUNDS / _DATA, self._data())
            write_text(self.out / _ROUNDS / "recipe.yaml", dump_recipe(self.recipe))

    def _data(self) -> dict[str, Any]:
        """Return what decides which pairs are read: the limit, and the hashes of local files."""
        sources = (*self.recipe.data, *self.recipe.buffer, *self.recipe.eval)
        files = {str(file) for source in sources for file in local_files(source)}
        return {"limit": self.limit, "files": {file: file_hash(Path(file)) for file in sorted(files)}}

    def model(self, index: int) -> Path:
        """Return the folder of a round's checkpoint; caches beside it are shared."""
        return self.out / _ROUNDS / f"round-{index + 1}"

    def samples(self, index: int) -> Path:
        """Return the folder of a round's multiplier, answers and verdicts."""
        return self.out / _ROUNDS / f"round-{index + 1}-samples"

    def round_recipe(self, index: int) -> TrainRecipe:
        """Return the recipe of a round's training; that of the first one of a dry run has the recipe's own file."""
        file = self.samples(index)
        changes: dict[str, Any] = {
            "outer": None,
            "trainer": {"resume_from_checkpoint": True, **self.recipe.trainer, "output_dir": str(self.model(index))},
        }
        if file.exists():
            for name in ("labels", "loss"):
                section = getattr(self.recipe, name)
                if getattr(section, "multiplier", None) is not None:
                    changes[name] = section.model_copy(update={"multiplier": str(file)})
        return self.recipe.model_copy(update=changes)

    def run_round(self, index: int, earlier: Sequence[Round]) -> Round:
        """Return a round, of which what an earlier start has finished is reused."""
        assert self.dual.multiplier is not None
        multiplier = next_multiplier(
            [Tried(done.multiplier, done.achieved.high - self.threshold) for done in earlier],
            start=self.dual.multiplier,
            step=self.dual.beta,
        )
        self._claim_round(index, multiplier)
        done = read_round(self.samples(index))
        if done is None:
            say(f"\nround {index + 1} of at most {self.section.rounds}: multiplier {multiplier:.4g}")
            # A finished training has its record.
            if not (self.model(index) / "run.json").exists():
                run_training(self.round_recipe(index), limit=self.limit, answers=likeliest_answers)
            done = self.measure(index, multiplier)
            done.write(self.samples(index))
        say(f"round {index + 1}: {self.constraint.measure} {format_measure(self.constraint, *done.achieved)}")
        return done

    def _claim_round(self, index: int, multiplier: float) -> None:
        """Write the multiplier of a round, which an earlier start may have done."""
        file = self.samples(index) / DUAL_NAME
        if not file.exists():
            _with_multiplier(self.dual, multiplier).write(self.samples(index))
        elif (earlier := read_dual(file).multiplier) != multiplier:
            raise DataError(
                f"{file} has the multiplier {earlier}, and that of the round is {multiplier}: the file of the "
                "recipe's multiplier has changed since; name another output folder"
            )

    def measure(self, index: int, multiplier: float) -> Round:
        """Sample the policy of a round and judge its answers."""
        folder, section = self.samples(index), self.section
        write_jsonl(folder / Prompt.file_name, (prompt.to_row() for prompt in self.prompts))
        sampling = Sampling(
            section.samples,
            self.dual.temperature,
            max_new_tokens=section.max_new_tokens,
            seed=section.seed + index,
        )
        engine = open_engine(EngineSection(path=str(self.model(index)), dtype=self.recipe.model.dtype), sampling)
        completions = generate_completions(
            engine, self.prompts, folder / Completion.file_name, samples=section.samples
        )
        counted = completions[: self.num_counted * section.samples]
        verdicts = self._judge(section.judge, counted, folder)
        values = constrained_values(self.constraint, verdicts, section.samples)
        helpfulness, num_calls = None, len(verdicts)
        if section.reward is not None:
            ratings = self._judge(section.reward, completions, folder)
            helpfulness = _helpfulness(ratings, section)
            num_calls = len(ratings) + (0 if section.reward == section.judge else num_calls)
        achieved = measure_interval(self.constraint, values, level=self.level)
        return Round(multiplier, achieved, helpfulness, len(completions), num_calls)

    def _judge(self, spec: str, completions: Sequence[Completion], folder: Path) -> list[Verdict]:
        judge = open_judge(spec, kinds=kinds_of(self.prompts))
        return judge_completions(judge, completions, judge_file(folder, "verdicts", judge.name, judge.revision))

    def finish(self, rounds: list[Round]) -> OuterResult:
        """Put the chosen policy into the output folder, and write and show the rounds."""
        result = OuterResult(rounds, self.threshold)
        _link(self.model(result.chosen), self.out)
        write_json(
            self.out / FILE_NAME,
            {
                "schema": 1,
                "constraint": asdict(self.constraint),
                "judge": self.section.judge,
                "reward": self.section.reward,
                "level": self.level,
                "state": "met" if result.holds else "not met",
                "chosen": result.chosen + 1,
                "rounds": [
                    {"round": index + 1, "holds": done.holds(self.threshold), **done.to_json()}
                    for index, done in enumerate(rounds)
                ],
            },
        )
        show_rounds(result, self.constraint, level=self.level)
        say(f"the policy of round {result.chosen + 1} is in {self.out}")
        return result


def _multiplier_file(recipe: TrainRecipe) -> str:
    if isinstance(recipe.labels, ScoreLabelsSection):
        return recipe.labels.multiplier
    assert isinstance(recipe.loss, BFPOSection)
    assert recipe.loss.multiplier is not None
    return recipe.loss.multiplier


def _check_judges(section: OuterSection, dual: Dual) -> None:
    if dual.objective == "log_ratios":
        raise RecipeError(
            "outer needs a constraint that a judge can measure; that of PeCAN is on log-ratios of models"
        )
    spec = parse_judge(section.judge)
    if dual.constraint.measure == "unsafe":
        if "safe" not in spec.findings:
            raise RecipeError(f"outer.judge: '{spec.text}' doesn't judge safety, which the constraint bounds")
    elif "cost" not in spec.scores:
        raise RecipeError(f"outer.judge: '{spec.text}' gives no cost, which the constraint bounds")
    if section.reward is not None and "reward" not in parse_judge(section.reward).scores:
        raise RecipeError(
            f"outer.reward: '{section.reward}' gives no reward; leave it out, or name a judge that does"
        )


def _with_multiplier(dual: Dual, multiplier: float) -> Dual:
    """Return the constraint with another multiplier, without what was predicted for the first one."""
    if multiplier == dual.multiplier:
        return dual
    return replace(
        dual,
        multiplier=multiplier,
        multiplier_low=None,
        multiplier_high=None,
        predicted=None,
        achieved_with_half=None,
        warnings=[f"`outer` moved the multiplier from {dual.multiplier:.6g}, for which the other numbers are"],
    )


def _helpfulness(verdicts: Sequence[Verdict], section: OuterSection) -> Interval:
    """Return the mean reward over prompts."""
    rewards, _ = scores_of("reward", verdicts)
    if missing := sum(reward is None for reward in rewards):
        raise DataError(f"outer.reward: {section.reward} gave no reward for {missing} of {len(rewards)} answers")
    return mean_interval(np.array(rewards, dtype=np.float64).reshape(-1, section.samples).mean(axis=1))


def _link(model: Path, out: Path) -> None:
    """Put the files of a checkpoint into another folder, without using the disk twice where that is possible."""

    def link(source: str, target: str) -> None:
        Path(target).unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    shutil.copytree(model, out, ignore=shutil.ignore_patterns("checkpoint-*"), copy_function=link, dirs_exist_ok=True)
