"""Work of `bfpo certify`: opening a head with its model."""

from pathlib import Path

import torch

from bfpo.certificates.paraphrases import read_paraphrases
from bfpo.certificates.recipe import CertifyRecipe, StatesModelSection
from bfpo.certificates.run import run_certify
from bfpo.certificates.states import HeadedModel
from bfpo.config.recipes import ModelSection
from bfpo.core.certificate import Certificate
from bfpo.core.environment import installed_version, versions
from bfpo.core.samples import Completion, Sampling
from bfpo.errors import DataError, RecipeError
from bfpo.generation.in_process import load_engine
from bfpo.generation.model_inputs import TemplateRefusal
from bfpo.judging.guarded_engine import load_head
from bfpo.judging.scorers import load_scorer
from bfpo.model.cost_head import CostHead


def certify(recipe: CertifyRecipe) -> Certificate:
    """Certify the head of a recipe; see `run_certify`.

    Raises:
        RecipeError: If keys of the recipe don't fit together.
        DataError: If the head or the paraphrases can't be read, or the head isn't for the model.
        ModelError: If the model can't be loaded.
    """
    groups = read_paraphrases(recipe.paraphrases, recipe.holdout)
    headed = _open_cost_model(recipe) if Path(recipe.head).is_dir() else _open_cost_head(recipe)
    return run_certify(recipe, groups, headed, versions=versions() | {"scipy": installed_version("scipy")})


def _open_cost_head(recipe: CertifyRecipe) -> HeadedModel:
    """Open a head of guards with its model."""
    if recipe.model is None:
        raise RecipeError(f"model: missing; head is {recipe.head}, a file: name the model whose states it reads")
    section: StatesModelSection = recipe.model
    engine = load_engine(section.path, Sampling(), dtype=section.dtype, revision=section.revision)
    head = load_head(recipe.head, engine, key="head")

    def encode(completion: Completion) -> tuple[list[int], list[int]]:
        try:
            return engine.tokens_of(completion)
        except TemplateRefusal as refusal:
            raise DataError(f"prompt '{completion.prompt_id}': {refusal}") from None

    identity = f"{engine.identity}:{section.dtype}"
    return HeadedModel(head, recipe.head, engine.model, section.path, identity, encode)


def _open_cost_model(recipe: CertifyRecipe) -> HeadedModel:
    """Open a cost model of `bfpo score train`, whose linear head reads the last token of a whole answer."""
    if recipe.model is not None:
        raise RecipeError(f"model: leave it out; head is {recipe.head}, a folder, and a cost model is its own model")
    if not recipe.answer:
        raise RecipeError(f"answer: missing; head is {recipe.head}, a folder, and a cost model reads whole answers")
    if recipe.repair is not None:
        raise RecipeError("repair: only heads of guards are repaired; train the cost model on more pairs instead")
    judge = load_scorer("cost", ModelSection(path=recipe.head))
    score = getattr(judge.model, "score", None)
    if not isinstance(score, torch.nn.Linear):
        raise DataError(
            f"head: {recipe.head} has no linear head on its last hidden state; train one with bfpo score train"
        )
    bias = torch.zeros(1) if score.bias is None else score.bias.detach()
    head = CostHead((-1,), score.weight.detach(), bias)

    def encode(completion: Completion) -> tuple[list[int], list[int]]:
        try:
            text = judge.render(completion)[0]
        except TemplateRefusal as refusal:
            raise DataError(f"prompt '{completion.prompt_id}': {refusal}") from None
        ids: list[int] = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [], ids

    return HeadedModel(head, recipe.head, judge.model, recipe.head, judge.identity, encode)
