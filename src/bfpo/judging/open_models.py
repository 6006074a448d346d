"""Judges that are models, by their kind and the place of their weights."""

from collections.abc import Mapping

from bfpo.core.samples import Judge
from bfpo.errors import RecipeError, did_you_mean
from bfpo.judging.formats import GUARDS, GUIDELINES
from bfpo.judging.spec import SCORERS

MODEL_KINDS = (*GUARDS, *SCORERS)


def open_guard(
    kind: str,
    path: str,
    *,
    threshold: float = 0.5,
    revision: str | None = None,
    guidelines: Mapping[str, str] = GUIDELINES,
    behaviors: Mapping[str, str] | None = None,
) -> Judge:
    """Load a model that judges, onto the GPU in bfloat16 if there is one, else in float32.

    Args:
        kind: A guard (`formats.GUARDS`) or a model with a score head (`SCORERS`).
        path: Folder or hub id.
        threshold: An answer is safe from this probability on, in [0, 1].
        revision: Hub revision.
        guidelines: What ShieldGemma is asked about, one call each.
        behaviors: Prompt's id → what HarmBench is asked about; None asks about the prompt itself.

    Raises:
        RecipeError: If the kind is unknown, or an option isn't the kind's.
        ModelError: If the model can't be loaded, or isn't one of the kind.
    """
    if kind not in MODEL_KINDS:
        raise RecipeError(f"judge '{kind}' is no model's kind; {did_you_mean(kind, list(MODEL_KINDS))}")
    if behaviors is not None and kind != "harmbench":
        raise RecipeError(f"judge '{kind}': behaviors are for harmbench")
    if not guidelines or (guidelines is not GUIDELINES and kind != "shieldgemma"):
        raise RecipeError(f"judge '{kind}': guidelines are for shieldgemma, and at least one")

    import torch

    from bfpo.config.recipes import ModelSection
    from bfpo.generation.in_process import checkpoint_identity
    from bfpo.model.load import load_model, load_tokenizer

    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    section: ModelSection = ModelSection.model_validate({"path": path, "dtype": dtype, "revision": revision})
    if kind in GUARDS:
        from bfpo.judging.guards import GuardJudge

        model = load_model(section).eval()
        torch.nn.Module.to(model, device)
        return GuardJudge(
            kind,
            model,
            load_tokenizer(section),
            path,
            threshold,
            identity=checkpoint_identity(path, revision),
            guidelines=guidelines,
            behaviors=behaviors,
        )
    from bfpo.judging.scorers import load_scorer

    return load_scorer(kind, section, device=device, threshold=threshold)
