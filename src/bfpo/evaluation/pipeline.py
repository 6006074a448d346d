"""Evaluation: prompts → completions → verdicts of each judge → results. Files of earlier runs are reused."""

import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from bfpo.config.loading import dump_recipe
from bfpo.core.files import file_name, write_jsonl, write_text
from bfpo.core.locks import exclusive_folder
from bfpo.core.samples import Completion, Engine, Judge, Prompt, Sampling
from bfpo.core.terminal import say
from bfpo.data.guard_summary import describe_guard, summarize_guard
from bfpo.data.readings import read_by
from bfpo.data.stages import (
    generate_completions,
    judge_completions,
    read_completions,
    read_prompt_file,
    show_outcomes,
)
from bfpo.data.unread_answers import describe_missing_answers
from bfpo.data.verdict_files import judge_file
from bfpo.errors import DataError, Unanswered
from bfpo.evaluation.alpaca_eval import LengthControl, write_alpaca_eval
from bfpo.evaluation.attacks import Attacks, attack_model, attack_notes, load_suites, set_attacks
from bfpo.evaluation.baseline import Baseline, compare_with_baseline, read_baseline
from bfpo.evaluation.correction import (
    Calibration,
    add_corrected_rates,
    calibrate,
    calibration_results,
    calibration_warnings,
    fitted_on_warnings,
    read_calibration,
)
from bfpo.evaluation.gate import Bound, check_bounds, enforce_bounds, read_gate
from bfpo.evaluation.indices import compute_indices
from bfpo.evaluation.judge_outputs import JudgeOutput, base_of, compare_parts, compute_agreement, member_names
from bfpo.evaluation.languages import results_by_language
from bfpo.evaluation.lm_eval.suite import (
    compare_lm_eval_tasks,
    find_lm_eval_tasks,
    lm_eval_data,
    lm_eval_metrics,
    run_lm_eval_tasks,
)
from bfpo.evaluation.recipe import EvalRecipe
from bfpo.evaluation.results import Results, answers_hash
from bfpo.evaluation.show import show_evaluation
from bfpo.evaluation.subject import (
    TEMPLATE_POLICY,
    is_guard_judge,
    model_name,
    open_model,
    open_recipe_judge,
    run_name,
    template_policy,
    training_judges,
)
from bfpo.evaluation.suite import Suite, Task, read_tasks, select_prompts
from bfpo.evaluation.suite_scores import compute_suite_metrics, score_suites
from bfpo.evaluation.warnings import collect_warnings
from bfpo.evaluation.win_rates import (
    check_judges,
    collect_references,
    compare_with_references,
    length_controlled_metrics,
    load_length_control,
)
from bfpo.generation.attack_outcomes import judge_attack
from bfpo.generation.attacks import AttackSection
from bfpo.generation.dialogues import AttackRun
from bfpo.judging.people import PeopleJudge
from bfpo.judging.refusal_rule import RefusalRule


class Evaluation(NamedTuple):
    """Results with what they are computed from.

    Args:
        results: The results.
        tasks: Tasks with the prompts that have completions.
        completions: Completions of these prompts.
        outputs: Output of each judge, the primary judge first.
    """

    results: Results
    tasks: list[Task]
    completions: list[Completion]
    outputs: list[JudgeOutput]


def run_eval(recipe: EvalRecipe, *, gate: str | None = None) -> Results:
    """Evaluate the model of a recipe, or saved completions.

    Args:
        recipe: The recipe.
        gate: File of bounds; default the recipe's.

    Raises:
        RecipeError: If a suite, a source, a judge or a bound isn't possible, or another evaluation is running there.
        DataError: If prompts can't be read, or the folder holds another evaluation.
        GateViolated: If a bound is violated with confidence; the results are written before.
    """
    with ExitStack() as stack:
        return _run_eval(recipe, gate, stack)


def _run_eval(recipe: EvalRecipe, gate: str | None, stack: ExitStack) -> Results:
    bounds = _read_bounds(recipe, gate)
    suites, tasks = read_suites(recipe)
    # Everything that can be refused is refused before hours of work.
    lm_eval_tasks = find_lm_eval_tasks(recipe, suites)
    lm_eval_names = {task.full_name: task.spec for task in lm_eval_tasks}
    check_judges(recipe, tasks)
    length_control = load_length_control(recipe, tasks)
    check_bounds(
        bounds,
        tasks,
        lm_eval_names,
        corrected=recipe.calibration is not None,
        length_controlled=length_control is not None,
        with_indices=[name for name, suite in suites.items() if suite.indices],
    )
    calibration = None if recipe.calibration is None else read_calibration(recipe.calibration)
    fitting_warnings = [] if calibration is None else fitted_on_warnings(calibration, recipe.judges)
    policy = template_policy(recipe, suites, tasks)
    baseline = None if recipe.base is None else read_baseline(recipe.base, policy if tasks else None)
    folder = Path(recipe.out)
    message = f"out: another evaluation is running in {folder}; wait for it, or name another folder"
    stack.enter_context(exclusive_folder(folder, message))
    if tasks:
        write_prompts(folder, unique_prompts(tasks))
    lm_eval_results = run_lm_eval_tasks(recipe, lm_eval_tasks, folder)
    release_memory()
    evaluation = evaluate(
        tasks,
        lambda: open_model(recipe),
        (open_recipe_judge(recipe, spec, unique_prompts(tasks)) for spec in recipe.judges),
        folder,
        run=run_name(recipe),
        model=model_name(recipe),
        sampling=recipe.sampling.settings,
        template_policy=policy,
        max_unanswered=recipe.max_unanswered,
        labeled_by={*recipe.labeled_by, *training_judges(recipe)},
        calibration=calibration,
        baseline=baseline,
        length_control=length_control,
    )
    results = evaluation.results
    metrics = results.metrics + lm_eval_metrics(lm_eval_tasks, lm_eval_results)
    comparisons, notes = results.comparisons, results.warnings + fitting_warnings
    if baseline is not None:
        more_comparisons, more_notes = compare_lm_eval_tasks(lm_eval_tasks, lm_eval_results, baseline)
        comparisons, notes = comparisons + more_comparisons, notes + more_notes
    judges = [
        {**judge, "circular": judge["circular"] or is_guard_judge(recipe, spec)}
        for judge, spec in zip(results.judges, recipe.judges, strict=False)
    ]
    results = replace(
        results,
        judges=judges,
        metrics=metrics + compute_indices(suites, metrics),
        comparisons=comparisons,
        data=results.data + lm_eval_data(lm_eval_tasks, lm_eval_results),
    )
    results = replace(results, warnings=collect_warnings(recipe, suites, results, evaluation.outputs) + notes)
    write_text(folder / "recipe.resolved.yaml", dump_recipe(recipe))
    results.write(folder)
    write_alpaca_eval(evaluation.tasks, evaluation.completions, evaluation.outputs, results.run, folder)
    show_evaluation(results)
    say(f"results in {folder / 'results.json'}")
    if bounds:
        enforce_bounds(results, bounds)
    return results


def _read_bounds(recipe: EvalRecipe, gate: str | None) -> list[Bound]:
    source = gate if gate is not None else recipe.gate
    return read_gate(source) if isinstance(source, str) else source or []


def read_suites(recipe: EvalRecipe) -> tuple[dict[str, Suite], list[Task]]:
    """Return the suites of a recipe by name, and their tasks with prompts."""
    suites, attacks = load_suites(recipe.suites)
    tasks = read_tasks(suites, data=recipe.data, leave_out=recipe.leave_out, limit=recipe.limit)
    return suites, set_attacks(tasks, attacks)


def unique_prompts(tasks: Iterable[Task]) -> list[Prompt]:
    """Return the prompts of all tasks, each once."""
    return list({prompt.prompt_id: prompt for task in tasks for prompt in task.prompts}.values())


def evaluate(
    tasks: Sequence[Task],
    open_engine: Callable[[], Engine] | None,
    judges: Iterable[Judge],
    folder: Path,
    *,
    run: str,
    model: str,
    sampling: Sampling,
    template_policy: str = TEMPLATE_POLICY,
    max_unanswered: float = 0.0,
    labeled_by: AbstractSet[str] = frozenset(),
    by_category: bool = True,
    calibration: Calibration | None = None,
    baseline: Baseline | None = None,
    length_control: LengthControl | None = None,
) -> Evaluation:
    """Generate, judge and score completions, and compare the scores with a baseline.

    One model is in memory at a time: the evaluated one, then one judge after the other. The folder gets all files but
    `results.json`, which the caller writes.

    Args:
        tasks: Tasks with their prompts.
        open_engine: Opens the engine; None if the folder holds all completions.
        judges: Judges, the primary one first; a generator opens each when its turn comes.
        folder: Output folder; files of an earlier run in it are reused.
        run: Short name of the run.
        model: Name of the model.
        sampling: Sampling settings of the engine.
        template_policy: How prompts are given to the model.
        max_unanswered: Maximum share of prompts without a completion, in [0, 1).
        labeled_by: Names of the judges that labeled the model's training data.
        by_category: Whether each category of a task's prompts has metrics too.
        calibration: Labeled answers that correct the judges' rates.
        baseline: Evaluation to compare with.
        length_control: Data of AlpacaEval's length-controlled win rate.

    Raises:
        DataError: If the folder holds files of another model or prompt set.
        Unanswered: If more prompts than `max_unanswered` have no completion.
    """
    completions, outputs, notes = list[Completion](), list[JudgeOutput](), list[str]()
    attacks: dict[AttackSection, AttackRun] = {}
    if prompts := unique_prompts(tasks):
        references = collect_references(tasks)
        write_prompts(folder, prompts)
        path = folder / Completion.file_name
        completions, attacks, notes = _generate(
            open_engine, tasks, path, samples=sampling.samples, max_unanswered=max_unanswered
        )
        tasks = select_prompts(tasks, {completion.prompt_id for completion in completions})
        tasks = [_with_attack_in_data(task, attacks) for task in tasks]
        if calibration is not None:
            calibration = calibration.for_model({run, model, *(completion.model for completion in completions[:1])})
        labeled = [] if calibration is None else calibration.completions
        outputs = judge_all(
            judges, completions, folder, labeled=labeled, references=references, attacks=list(attacks.values())
        )
    suites = score_suites(tasks, completions, outputs, by_category=by_category, attacks=attacks)
    metrics = compute_suite_metrics(suites)
    by_language, language_notes = results_by_language(tasks, completions, outputs, attacks)
    notes += language_notes
    calibrated = []
    if calibration is not None:
        judged = [output for output in outputs if output.on_labeled]
        calibrated = [calibrate(output.label, calibration, output.on_labeled) for output in judged]
        metrics = add_corrected_rates(metrics, calibrated)
    length_controlled, warnings = length_controlled_metrics(tasks, completions, outputs, length_control)
    metrics += length_controlled
    notes += warnings
    results = Results(
        run=run,
        model=model,
        template_policy=template_policy,
        judges=[
            {
                "name": output.label,
                "revision": output.revision,
                "circular": not labeled_by.isdisjoint(output.members),
            }
            | ({} if output.reads == "answer" else {"reads": output.reads})
            for output in outputs
        ],
        sampling=asdict(sampling),
        metrics=metrics,
        answers=answers_hash(completions) if completions else "",
        agreement=compute_agreement(tasks, outputs),
        reasoning=compare_parts(completions, outputs),
        data=[task.data for task in tasks if task.data is not None],
        languages=by_language,
        guard=summarize_guard(completions),
    )
    if calibration is not None and calibrated:
        results = replace(results, calibration=calibration_results(calibration, calibrated))
        notes += calibration_warnings(calibration, calibrated, metrics)
    if baseline is not None and tasks:
        comparisons, model_comparisons, more_notes = compare_with_baseline(
            baseline, results, tasks, suites, outputs, attacks
        )
        results = replace(results, comparisons=comparisons, model_comparisons=model_comparisons)
        notes += more_notes
    return Evaluation(replace(results, warnings=notes), list(tasks), completions, outputs)


def write_prompts(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Write `prompts.jsonl` into a folder, unless it holds other prompts.

    Raises:
        DataError: If it does. A superset or a subset of the same prompts is allowed, also with other kinds.
    """
    path = folder / Prompt.file_name
    if path.exists():
        # Only the texts are compared: the license of a prompt, say, may have been corrected since.
        before = read_prompt_file(str(path))
        existing = {prompt.prompt_id: prompt.prompt for prompt in before}
        new = {prompt.prompt_id: prompt.prompt for prompt in prompts}
        differing = next((key for key, prompt in new.items() if existing.get(key, prompt) != prompt), None)
        if differing is not None or not (existing.keys() <= new.keys() or new.keys() <= existing.keys()):
            reason = (
                f"'{differing}' isn't the prompt of that id" if differing else f"{len(existing)} of another choice"
            )
            raise DataError(f"{path} holds other prompts ({reason}); choose another folder, or remove this one")
        kinds = {prompt.prompt_id: prompt.kind for prompt in before}
        if any(kinds.get(prompt.prompt_id, prompt.kind) != prompt.kind for prompt in prompts):
            # Its verdicts depend on the kinds, which aren't part of its revision.
            for file in folder.rglob(f"*{file_name(RefusalRule.name)}*@*.jsonl*"):
                file.unlink()
    write_jsonl(path, (prompt.to_row() for prompt in prompts))


def _with_attack_in_data(task: Task, attacks: Attacks) -> Task:
    if task.attack is None or task.data is None:
        return task
    return replace(task, data=replace(task.data, attack=attacks[task.attack].name))


def _generate(
    open_engine: Callable[[], Engine] | None,
    tasks: Sequence[Task],
    path: Path,
    *,
    samples: int,
    max_unanswered: float,
) -> tuple[list[Completion], dict[AttackSection, AttackRun], list[str]]:
    """Return the completions of all prompts that have them, the runs of attacks, and notes for the reader."""
    if open_engine is None:
        completions = read_completions(path)
        return completions, {}, _notes_on_unread(completions)
    engine, prompts, notes = open_engine(), unique_prompts(tasks), list[str]()
    try:
        completions = generate_completions(engine, prompts, path, samples=samples)
    except Unanswered as error:
        missing = {prompt_id for prompt_id, _ in error.failed}
        if len(missing) > max_unanswered * len(prompts):
            say(f"max_unanswered is {max_unanswered:g}; a larger share leaves these prompts out")
            raise
        answered = [prompt for prompt in prompts if prompt.prompt_id not in missing]
        completions = generate_completions(engine, answered, path, samples=samples)
        notes.append(f"{len(missing):,} of {len(prompts):,} prompts have no answer and take no part.")
    if getattr(engine, "counts_tokens", True) is False:
        notes.append("Lengths are in words: the saved answers don't say how many tokens they have.")
    answered_tasks = select_prompts(tasks, {completion.prompt_id for completion in completions})
    attacks = attack_model(engine, answered_tasks, path.parent, samples=samples, max_unanswered=max_unanswered)
    del engine
    release_memory()
    return completions, attacks, notes + _notes_on_unread(completions) + attack_notes(attacks)


def _notes_on_unread(completions: Sequence[Completion]) -> list[str]:
    show_outcomes(completions)
    notes = [
        f"{clause[0].upper()}{clause[1:]}. These answers are undecided and count as not safe."
        for clause in describe_missing_answers(completions)
    ]
    blocked = [completion for completion in completions if completion.is_blocked]
    if num_blocked := sum(completion.finish_reason != "guarded" for completion in blocked):
        notes.append(
            f"A server blocked {num_blocked:,} of {len(completions):,} answers; they count as safe refusals."
        )
    if (guard := summarize_guard(completions)) is not None:
        notes.append(f"{describe_guard(guard)} The guard's refusals count as safe refusals of 0 tokens.")
    return notes


def judge_all(
    judges: Iterable[Judge],
    completions: Sequence[Completion],
    folder: Path,
    *,
    labeled: Sequence[Completion] = (),
    references: Mapping[str, Completion] | None = None,
    attacks: Sequence[AttackRun] = (),
) -> list[JudgeOutput]:
    """Return the output of each judge.

    Args:
        judges: Judges, the primary one first.
        completions: Completions of the evaluated model.
        folder: Folder of the evaluation.
        labeled: Answers with human labels, which all judges but the annotators themselves read too.
        references: Prompt id → output that the completion is compared with.
        attacks: Attacks, whose replies are judged as answers to the attacked prompts.

    Raises:
        DataError: If a judge is listed twice.
    """
    prompts = {completion.prompt_id: completion.prompt for completion in completions}
    outputs: list[JudgeOutput] = []
    for judge in judges:
        name, revision = judge.name, judge.revision
        if any((name, revision) == (output.name, output.revision) for output in outputs):
            raise DataError(f"judges: {name}@{revision} is already listed")
        label = name if name not in {output.label for output in outputs} else f"{name}@{revision[:8]}"
        verdicts = judge_completions(judge, completions, judge_file(folder, "verdicts", name, revision))
        on_labeled, reads = [], read_by(judge)
        # Annotators labeled answers.
        if labeled and name not in PeopleJudge.names and reads == "answer":
            on_labeled = judge_completions(judge, labeled, judge_file(folder, "calibration", name, revision))
        on_turns = []
        if reads != "reasoning":
            on_turns = [verdict for attack in attacks for verdict in judge_attack(judge, attack, prompts, verdicts)]
        output = JudgeOutput(
            label,
            name,
            revision,
            member_names(judge),
            verdicts,
            on_labeled,
            reads=reads,
            base=base_of(judge),
            on_turns=on_turns,
        )
        if references and reads == "answer":
            output = compare_with_references(judge, output, completions, references, folder)
        outputs.append(output)
        del judge
        release_memory()
    return outputs


def release_memory() -> None:
    """Return the unused memory of the accelerator."""
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
