"""What an online run needs before its model and judges are loaded: arguments, prompts, tokenizer; and its plan."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from trl import RLOOConfig  # type: ignore[attr-defined]

from bfpo.config.combine import LagrangianSection
from bfpo.config.recipes import TextSection
from bfpo.core.samples import Prompt, Sampling
from bfpo.core.terminal import say
from bfpo.errors import RecipeError
from bfpo.losses.combine import Combiner, make_combiner, read_solved_multiplier
from bfpo.model.load import empty_model
from bfpo.model.lora import add_adapter, lora_config
from bfpo.online.arguments import online_arguments
from bfpo.online.prompts import longest_prompt, read_online_prompts, show_prompts
from bfpo.online.recipe import OnlineRecipe
from bfpo.training.estimate import Arithmetic, footprint
from bfpo.training.processes import check_devices
from bfpo.training.start import check_vocabulary, load_start_tokenizer


class OnlineInputs(NamedTuple):
    """Everything a run needs before its model and judges are loaded.

    Args:
        recipe: Recipe of the run, with the number of a solved multiplier.
        args: TRL's arguments.
        resume: Folder of a checkpoint to resume from, or True for the newest complete one.
        combiner: Combiner at the start of the run.
        prompts: Prompts.
        sources: Metadata of their sources.
        tokenizer: Tokenizer of the start model.
        sampling: How the policy is sampled.
    """

    recipe: OnlineRecipe
    args: RLOOConfig
    resume: str | bool | None
    combiner: Combiner
    prompts: list[Prompt]
    sources: list[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling


def check_online(recipe: OnlineRecipe) -> tuple[OnlineRecipe, RLOOConfig, str | bool | None]:
    """Return the recipe with the number of a solved multiplier, TRL's arguments, and what to resume from.

    The record of a run with the number repeats it without the file.

    Raises:
        RecipeError: If an argument is unknown, refused or wrong, or a multiplier belongs to another run.
    """
    options = dict(recipe.trainer)
    resume = options.pop("resume_from_checkpoint", None)
    loading: dict[str, Any] = {}
    if recipe.lora is None:
        # With an adapter the reference is the policy without it.
        loading = {"revision": recipe.model.revision} if recipe.model.revision is not None else {}
        loading |= {"trust_remote_code": True} if recipe.model.trust_remote_code else {}
    args = online_arguments(options, loading=loading)
    check_devices(args)
    section = recipe.combine
    if not isinstance(section, LagrangianSection) or section.multiplier is None:
        return recipe, args, resume
    solved = read_solved_multiplier(section.multiplier, measure=section.measure, beta=args.beta)
    say(f"λ is {solved:.4g}, from {section.multiplier}")
    fixed = {"start": solved, "min": solved, "max": solved, "rate": 0.0, "normalize": False, "multiplier": None}
    return recipe.model_copy(update={"combine": section.model_copy(update=fixed)}), args, resume


def prepare_inputs(recipe: OnlineRecipe, args: RLOOConfig, resume: str | bool | None) -> OnlineInputs:
    """Read and check prompts and tokenizer, and show them with the plan and the memory that a run needs.

    Raises:
        RecipeError: If there are fewer prompts than a step has.
        DataError: If prompts can't be read, or don't fit the model.
        ModelError: If the tokenizer can't be loaded, or the model has none of the target modules of `lora`.
    """
    combiner = make_combiner(recipe.combine.model_dump(exclude_none=True))
    sampling = Sampling(
        samples=args.num_generations or 0,
        temperature=args.temperature,
        max_new_tokens=args.max_completion_length or 0,
        seed=args.seed,
    )
    prompts, sources = read_online_prompts(recipe.prompts)
    tokenizer = load_start_tokenizer(recipe.model, TextSection(), lambda: ())
    check_vocabulary(recipe.model, tokenizer)
    shape = empty_model(recipe.model)
    if recipe.lora is not None:
        add_adapter(shape, lora_config(recipe.lora), seed=0)
    positions = getattr(shape.config.get_text_config(), "max_position_embeddings", None)
    max_tokens = None if positions is None else int(positions) - sampling.max_new_tokens
    longest = longest_prompt(prompts, tokenizer, max_tokens=max_tokens)
    show_prompts(prompts)
    _show_plan(args, prompts, sampling, num_scorers=1 if recipe.cost == recipe.reward else 2)
    memory = footprint(
        recipe.model,
        tokenizer,
        train_only=None,
        lora=recipe.lora,
        reference="shared" if recipe.lora is None else "adapter",
        arithmetic=Arithmetic.of(args),
    )
    if memory:
        tokens = args.per_device_train_batch_size * (longest + sampling.max_new_tokens)
        say(f"{memory.estimate(tokens)}; judges come in addition")
    return OnlineInputs(recipe, args, resume, combiner, prompts, sources, tokenizer, sampling)


def _show_plan(args: RLOOConfig, prompts: Sequence[Prompt], sampling: Sampling, *, num_scorers: int) -> None:
    """Print samples and scorer calls of the run."""
    samples = args.generation_batch_size or 0
    per_step = samples // sampling.samples
    if len(prompts) < per_step:
        raise RecipeError(
            f"prompts: {len(prompts)}, and a step has {per_step} ({samples} samples, trainer.num_generations "
            f"{sampling.samples}); lower trainer.per_device_train_batch_size, or add prompts"
        )
    steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * (len(prompts) // per_step))
    say(
        f"{steps:,} steps of {per_step} prompts with {sampling.samples} samples: {steps * samples:,} samples of "
        f"up to {sampling.max_new_tokens} tokens, {steps * samples * num_scorers:,} verdicts of the scorers"
    )
