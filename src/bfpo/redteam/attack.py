"""Red-teaming with conversations: an attack of several turns, and samples where it got furthest."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bfpo.core.samples import Completion, Engine, Judge, Prompt, Verdict
from bfpo.data.stages import generate_most, judge_completions, show_unanswered
from bfpo.data.verdict_files import judge_file
from bfpo.generation.attack_outcomes import attack_outcomes, describe_attack, judge_attack
from bfpo.generation.attacks import open_attack
from bfpo.generation.dialogues import AttackTurn, by_conversation, run_attack
from bfpo.redteam.recipe import RedteamRecipe


class AttackedSamples(NamedTuple):
    """Samples in the conversations of an attack.

    Args:
        prompts: The conversations, as prompts.
        originals: Id of a conversation → the attacked prompt.
        completions: Samples.
        verdicts: Verdicts of the safety judge on them, as answers to the attacked prompts.
        left_out: Number of prompts without samples by reason.
        summary: Summary of the attack, for `redteam.json`.
    """

    prompts: list[Prompt]
    originals: dict[str, Prompt]
    completions: list[Completion]
    verdicts: list[Verdict]
    left_out: Counter[str]
    summary: dict[str, Any]


def sample_under_attack(
    recipe: RedteamRecipe,
    engine: Engine,
    judge: Judge,
    prompts: Sequence[Prompt],
    single_turn: Sequence[Verdict],
    out: Path,
) -> AttackedSamples:
    """Attack the model on harmful prompts, and sample answers where a reply was unsafe first, or at the last turn.

    Args:
        recipe: The recipe, with `attack`.
        engine: Model under attack.
        judge: Safety judge.
        prompts: Prompts that the model has answered; the harmful ones are attacked.
        single_turn: Verdicts on the answers to the prompts alone.
        out: Folder of the round.

    Raises:
        Unanswered: If more samples than `max_unanswered` allows are missing.
    """
    assert recipe.attack is not None
    harmful = {prompt.prompt_id: prompt for prompt in prompts if prompt.kind == "harmful"}
    run = run_attack(open_attack(recipe.attack), engine, list(harmful.values()), out)
    left_out = Counter(f"attack without a result: {reason}" for reason in run.missing.values())
    conversation_of = {prompt_id: prompt.prompt for prompt_id, prompt in harmful.items()}
    outcomes = attack_outcomes(run.turns, judge_attack(judge, run, conversation_of, single_turn), single_turn)
    first_unsafe = {outcome.prompt_id: outcome.first_unsafe_turn for outcome in outcomes}
    originals, conversations = {}, []
    for (prompt_id, _), turns in by_conversation(run.turns).items():
        completion = _furthest(turns, first_unsafe[prompt_id]).completion
        originals[completion.prompt_id] = harmful[prompt_id]
        conversations.append(replace(harmful[prompt_id], prompt_id=completion.prompt_id, prompt=completion.prompt))
    completions, missing = generate_most(
        engine,
        conversations,
        run.folder / Completion.file_name,
        samples=recipe.samples,
        max_unanswered=recipe.max_unanswered * len(conversations) * recipe.samples,
    )
    show_unanswered(missing)
    left_out.update(f"prompt unanswered: {reason}" for reason in missing.values())
    path = judge_file(run.folder, "sample-verdicts", judge.name, judge.revision)
    sample_verdicts = judge_completions(judge, as_answers(completions, originals), path)
    return AttackedSamples(
        conversations, originals, completions, sample_verdicts, left_out, describe_attack(run, outcomes)
    )


def as_answers(completions: Sequence[Completion], originals: Mapping[str, Prompt]) -> list[Completion]:
    """Return completions as judges read them: those in attacked conversations as answers to the attacked prompts.

    Args:
        completions: The completions.
        originals: Id of a conversation → the attacked prompt.
    """
    return [
        replace(completion, prompt=originals[completion.prompt_id].prompt)
        if completion.prompt_id in originals
        else completion
        for completion in completions
    ]


def _furthest(turns: Sequence[AttackTurn], first_unsafe: int | None) -> AttackTurn:
    """Return the last exchange of the first unsafe turn; without one, of the last turn."""
    number = turns[-1].turn if first_unsafe is None else first_unsafe
    return [turn for turn in turns if turn.turn == number][-1]
