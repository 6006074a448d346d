"""Work of `bfpo dual`."""

from pathlib import Path

from bfpo.config.loading import load_recipe
from bfpo.config.recipes import TrainRecipe
from bfpo.constraints.samples import read_scored_samples
from bfpo.constraints.solve import ConstraintRequest, objective_of, solve_constraint
from bfpo.core.terminal import say, show_table, warn
from bfpo.errors import DataError, RecipeError
from bfpo.losses.dual import Dual, Objective
from bfpo.report.dual import describe_constraint, format_harm, training_keys, write_dual_page

DEFAULT_BETA = 0.1


def solve_dual(
    samples: Path,
    out: Path,
    *,
    measure: str,
    max: float | None,
    gain: float | None,
    share: float,
    kind: str | None,
    recipe: Path | None,
    overrides: list[str],
    beta: float | None,
    reward_scale: float,
    temperature: float | None,
    reward_judge: str | None,
    cost_judge: str | None,
    pecan: bool,
    seed: int,
) -> Dual:
    """Solve a constraint on scored samples and write `dual.json`, `dual.html` and `frontier.svg`.

    Args:
        samples: Scored samples; see `read_scored_samples`.
        out: Output folder.
        measure: What is bounded.
        max: Largest allowed value.
        gain: How much lower than the base model's value it must be.
        share: Share of the answers in the tail of `cvar`.
        kind: Kind of the prompts that count.
        recipe: Recipe of the training; its loss gives beta and, for BFPO, the objective.
        overrides: Changes of the recipe's keys.
        beta: Beta of the loss, without a recipe.
        reward_scale: Factor for the rewards.
        temperature: Temperature of the samples.
        reward_judge: Judge whose verdicts are the rewards.
        cost_judge: Judge whose verdicts are the costs.
        pecan: Whether the samples have log-probabilities under three models in place of scores.
        seed: Seed of the bootstrap.

    Returns:
        The content of `dual.json`.

    Raises:
        RecipeError: If an option is wrong.
        DataError: If the samples can't be used, or the constraint is infeasible; the files are written then, too.
    """
    objective: Objective = "log_ratios" if pecan else "reward"
    labeling = None
    if recipe is not None:
        if beta is not None:
            raise RecipeError("give either `recipe`, whose loss has a beta, or `beta`")
        beta, labeling = objective_of(load_recipe(recipe, TrainRecipe, overrides))
        if labeling is not None and pecan:
            raise RecipeError("`pecan` needs a recipe with another loss: BFPO has an objective of its own")
        objective = "bfpo" if labeling is not None else objective
    elif overrides:
        raise RecipeError(f"'{overrides[0]}' changes a key of a recipe; give one with `recipe`")
    request = ConstraintRequest(
        measure=measure,  # type: ignore[arg-type]
        max=max,
        gain=gain,
        share=share,
        kind=kind,
        beta=DEFAULT_BETA if beta is None else beta,
        objective=objective,
        labeling=labeling,
        reward_scale=reward_scale,
        temperature=temperature,
        seed=seed,
    )
    scored = read_scored_samples(
        samples,
        reward_judge=reward_judge,
        cost_judge=cost_judge,
        log_ratio_beta=request.beta if pecan else None,
    )
    dual = solve_constraint(scored, request)
    # The page comes first: it refuses to replace files that aren't its own.
    page = write_dual_page(out, dual)
    path = dual.write(out)
    _show(dual)
    if dual.multiplier is None:
        raise DataError(
            f"no policy over these samples reaches {format_harm(dual, dual.constraint.threshold)}: the lowest "
            f"reachable value is {format_harm(dual, dual.achieved)}, in the limit of an infinite multiplier. Allow "
            f"more than that, generate more samples of each prompt, or add safe answers to the model first; {page} "
            "shows what is reachable"
        )
    say("use in a recipe for training:")
    for line in training_keys(dual, path):
        say(f"  {line}")
    say(f"\n{page}")
    return dual


def _show(dual: Dual) -> None:
    rows = [("base model", "", dual.base), ("no constraint", "0", dual.frontier[0])]
    if dual.predicted is not None and dual.state == "active":
        bounds = (
            f"[{dual.multiplier_low:.3g}, {'∞' if dual.multiplier_high is None else f'{dual.multiplier_high:.3g}'}]"
        )
        rows.append(("constraint met", f"{dual.multiplier:.4g} {bounds}", dual.predicted))
    show_table(
        f"{describe_constraint(dual)}: {dual.state}",
        ("policy", "multiplier", "harm", "helpfulness", "KL (nats)", "effective samples"),
        [
            (
                name,
                multiplier,
                format_harm(dual, point.harm),
                f"{point.helpfulness:.3f}",
                f"{point.kl:.2f}",
                f"{point.effective_samples:.1f}",
            )
            for name, multiplier, point in rows
        ],
    )
    say(
        f"predicted over {dual.constrained_prompts} prompts: {format_harm(dual, dual.achieved)} "
        f"[{format_harm(dual, dual.achieved_low)}, {format_harm(dual, dual.achieved_high)}]"
    )
    for warning in dual.warnings:
        warn(warning)
