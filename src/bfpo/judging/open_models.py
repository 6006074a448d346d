"""Loading judges that are models, by their kind and the path of their weights."""

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
    """Load a model as a judge: onto the GPU in bfloat16 if there is one, else in float32.

    Args:
        kind: A guard (`formats.GUARDS`) or a model with a score head (`SCORERS`).
        path: Folder or hub id.
        threshold: Probability from which an answer counts as safe, in [0, 1].
        revision: Hub revision.
        guidelines: Name → text of ShieldGemma's guidelines; the model is run once for each.
        behaviors: Prompt id → behavior that HarmBench asks about; None asks about the prompt itself.

    Raises:
        RecipeError: If the kind is unknown, or an option doesn't belong to the kind.
        ModelError: If the model can't be loaded, or isn't of this kind.
    """
    if kind not in MODEL_KINDS:
        raise RecipeError(f"judge '{kind}' is not a kind of model; {did_you_mean(kind, list(MODEL_KINDS))}")
    if behaviors is not None and kind != "harmbench":
        raise RecipeError(f"judge '{kind}': behaviors are an option of harmbench only")
    if guidelines is not GUIDELINES and kind != "shieldgemma":
        raise RecipeError(f"judge '{kind}': guidelines are an option of shieldgemma only")
    if not guidelines:
        raise RecipeError(f"judge '{kind}': guidelines is empty; expected at least one guideline")

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
