"""`bfpo generate`: completions of a checkpoint or of a model on a server, in a file."""

from collections.abc import Sequence
from pathlib import Path

from bfpo.core.samples import Sampling
from bfpo.core.terminal import say
from bfpo.data.stages import generate_most, read_prompt_file, show_faults, show_outcomes, show_unanswered
from bfpo.generation.open import EngineSection, open_engine
from bfpo.judging.guarded_engine import Guard, guard_engine


def generate_to_file(
    section: EngineSection,
    sampling: Sampling,
    prompts: str,
    out: Path,
    *,
    max_unanswered: float,
    guard: Guard | None = None,
    ignore_columns: Sequence[str] = (),
    ignore_message_keys: Sequence[str] = (),
) -> None:
    """Generate completions of the prompts of a file; resumable.

    Args:
        section: Model that answers.
        sampling: How completions are sampled.
        prompts: File of prompts.
        out: File of completions.
        max_unanswered: Share of completions that may be missing, in [0, 1].
        guard: Guard in front of the model.
        ignore_columns: Columns of the file of prompts that are left out.
        ignore_message_keys: Keys of its messages that are left out.

    Raises:
        RecipeError: If the guard isn't possible with this sampling.
        DataError: If prompts are malformed, or the file has completions of another model or other settings.
        ModelError: If the model can't be loaded.
        Unanswered: If more completions are missing than allowed.
    """
    requests = read_prompt_file(prompts, ignore_columns=ignore_columns, ignore_message_keys=ignore_message_keys)
    engine = guard_engine(open_engine(section, sampling), sampling, guard)
    samples = sampling.samples
    try:
        completions, missing = generate_most(
            engine, requests, out, samples=samples, max_unanswered=max_unanswered * len(requests) * samples
        )
    finally:
        show_faults(engine.faults)
    show_unanswered(missing)
    show_outcomes(completions)
    truncated = sum(completion.finish_reason == "length" for completion in completions)
    say(
        f"{len(completions)} completions of {len(requests)} prompts in {out}; {truncated} truncated at "
        f"{sampling.max_new_tokens} tokens"
    )
