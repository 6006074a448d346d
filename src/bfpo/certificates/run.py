"""The work of `bfpo certify`: from a head and paraphrases to `certificate.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.special import logit

from bfpo.certificates.boxes import Array, GroupStates, RequestBox, make_boxes
from bfpo.certificates.paraphrases import ParaphraseGroup
from bfpo.certificates.recipe import CertifyRecipe, RepairSection
from bfpo.certificates.repair import Repair, clean_states, repair
from bfpo.certificates.states import HeadedModel, StateStore
from bfpo.certificates.verify import Decision, decide_all
from bfpo.core.certificate import SUMMARY_HEADINGS, Certificate, HeadFile
from bfpo.core.files import content_hash, file_hash
from bfpo.core.samples import Completion, Verdict
from bfpo.core.terminal import say, show_table, warn
from bfpo.data.stages import read_completions, read_verdicts
from bfpo.errors import DataError, RecipeError
from bfpo.model.cost_head import CostHead

REPAIRED_HEAD = "repaired-head.safetensors"


def run_certify(
    recipe: CertifyRecipe, groups: Sequence[ParaphraseGroup], headed: HeadedModel, *, versions: Mapping[str, str]
) -> Certificate:
    """Certify a head over boxes of hidden states, perhaps repair it, and write `certificate.json`; resumable.

    Args:
        recipe: Recipe of the run.
        groups: Its groups of paraphrases.
        headed: Its head and model.
        versions: Versions of the packages, for the certificate.

    Returns:
        The content of `certificate.json`.

    Raises:
        RecipeError: If the head is the file that a repair writes.
        DataError: If the data are malformed, or all paraphrases have the same state.
        ModelError: If the model doesn't run in two precisions of the recipe.
    """
    out, head = Path(recipe.out), headed.head
    if Path(headed.head_path).resolve() == (out / REPAIRED_HEAD).resolve():
        raise RecipeError(f"out: {out} has the head that is certified, and a repair would replace it; name another")
    threshold = float(logit(recipe.threshold))
    answers = None if recipe.repair is None else _read_answers(recipe.repair)
    store = StateStore(headed, out / "states")
    states, precisions = _read_states(recipe, groups, store)
    unseen = _unseen(recipe, groups)
    boxes = make_boxes(states, hull=recipe.boxes.hull, radius=recipe.boxes.radius, unseen=unseen)

    def decide(head: CostHead, number: int) -> list[Decision]:
        what = f"deciding boxes, round {number}" if number else "deciding boxes"
        log = out / "boxes.jsonl"
        return decide_all(head, boxes, log, threshold=threshold, time_limit=recipe.time_limit, what=what)

    result = Repair(head, decide(head, 0), [])
    if recipe.repair is not None and answers is not None:
        completions, verdicts = answers
        where = recipe.repair.verdicts
        clean = clean_states(completions, verdicts, store.of_answers(completions), where=where)
        result = repair(head, boxes, result.decisions, clean, recipe.repair, threshold=threshold, decide_boxes=decide)
    is_repaired = result.head is not head
    # That of an earlier run would not be the certificate's.
    (out / REPAIRED_HEAD).unlink(missing_ok=True)
    if is_repaired:
        result.head.save(out / REPAIRED_HEAD)
    certificate = Certificate(
        headed.path,
        headed.identity,
        _head_file(head, headed.head_path),
        _head_file(result.head, str(out / REPAIRED_HEAD)) if is_repaired else None,
        threshold,
        [decision.on(box) for decision, box in zip(result.decisions, boxes, strict=True)],
        result.rounds,
        precisions,
        recipe.model_dump(mode="json"),
        _hashes(recipe),
        dict(versions),
        _warnings(boxes),
    )
    path = certificate.write(out)
    show_certificate(certificate)
    say(f"\n{path}")
    return certificate


def _read_answers(section: RepairSection) -> tuple[list[Completion], list[Verdict]]:
    completions = read_completions(Path(section.completions))
    if not completions:
        raise DataError(f"repair.completions: {section.completions} has no completions")
    return completions, read_verdicts(Path(section.verdicts))


def _read_states(
    recipe: CertifyRecipe, groups: Sequence[ParaphraseGroup], store: StateStore
) -> tuple[list[GroupStates], list[str]]:
    """Return the states of all groups, and the precisions in which the model runs here."""
    prompts = [prompt for group in groups for prompt in group.prompts]
    by_prompt = dict(
        zip((p.prompt_id for p in prompts), _as_array(store.of_prompts(prompts, recipe.answer)), strict=True)
    )
    measured: dict[str, torch.Tensor] = {}
    if recipe.boxes.precisions:
        first = [group.inside[0] for group in groups]
        measured = store.in_precisions(first, recipe.answer, recipe.boxes.precisions)
    width = len(next(iter(by_prompt.values())))
    in_precisions = np.zeros((len(groups), 0, width))
    if measured:
        in_precisions = np.stack([_as_array(states) for states in measured.values()], axis=1)
    states = [
        GroupStates(
            group.name,
            group.expects_unsafe,
            np.stack([by_prompt[prompt.prompt_id] for prompt in group.inside]),
            np.stack([by_prompt[prompt.prompt_id] for prompt in group.held_out]),
            in_precisions[number],
        )
        for number, group in enumerate(groups)
    ]
    return states, list(measured)


def _as_array(states: torch.Tensor) -> Array:
    array: Array = states.double().numpy()
    return array


def _unseen(recipe: CertifyRecipe, groups: Sequence[ParaphraseGroup]) -> list[str]:
    """Return the groups whose counter-examples the repair doesn't see; at least one is left to it."""
    if recipe.repair is None or recipe.repair.unseen == 0:
        return []
    names = sorted((group.name for group in groups), key=content_hash)
    return names[: min(max(1, round(recipe.repair.unseen * len(names))), len(names) - 1)]


def _head_file(head: CostHead, path: str) -> HeadFile:
    units = 0 if head.hidden_weight is None else len(head.hidden_weight)
    return HeadFile(path, head.identity, head.layers, head.width, units)


def _hashes(recipe: CertifyRecipe) -> dict[str, str]:
    paths = [recipe.paraphrases, recipe.head]
    if recipe.repair is not None:
        paths += [recipe.repair.completions, recipe.repair.verdicts]
    return {path: file_hash(Path(path)) for path in paths if Path(path).is_file()}


def _warnings(boxes: Sequence[RequestBox]) -> list[str]:
    warnings = []
    for kind in dict.fromkeys(box.kind for box in boxes):
        if not any(box.held_out_inside for box in boxes if box.kind == kind):
            warnings.append(
                f"no held-out paraphrase is in a box of the kind {kind}: what is certified of these boxes says "
                "nothing about other wordings"
            )
    return warnings


def show_certificate(certificate: Certificate) -> None:
    """Print what is certified, by kind of box, with what the boxes have to do with held-out paraphrases."""
    title = f"Boxes of hidden states, head {certificate.certified_head.in_words()}"
    show_table(title, SUMMARY_HEADINGS, [part.cells() for part in certificate.summaries()])
    if certificate.repair:
        show_table(
            "Repair: accuracy and loss on held-out clean states",
            ("round", "counter-examples", "accuracy", "loss", "certified, of boxes it sees"),
            [
                (
                    str(step.round),
                    f"{step.counter_examples:,}",
                    f"{step.accuracy:.3f}",
                    f"{step.loss:.3f}",
                    f"{step.certified:,} of {step.boxes:,}" if step.certified is not None else "rolled back",
                )
                for step in certificate.repair
            ],
        )
        if certificate.repaired is None:
            say("no repaired head: no round has more certified boxes than the head before")
    say(certificate.claim)
    for warning in certificate.warnings:
        warn(warning)
