"""Groups of paraphrases of a request, of which some are held out."""

from collections.abc import Sequence
from dataclasses import dataclass

from bfpo.core.files import content_hash
from bfpo.core.samples import Prompt
from bfpo.data.stages import read_prompt_file
from bfpo.errors import DataError

# Two make a hull, and one is held out.
MIN_PARAPHRASES = 3


@dataclass(frozen=True, slots=True)
class ParaphraseGroup:
    """A request in several wordings.

    Args:
        name: `group` of the prompts.
        expects_unsafe: Whether the head should call their states unsafe.
        inside: Paraphrases that boxes are made of, at least two, in the order of the file.
        held_out: The others, at least one.
    """

    name: str
    expects_unsafe: bool
    inside: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All paraphrases, those of the boxes first."""
        return (*self.inside, *self.held_out)


def read_paraphrases(path: str, holdout: float) -> list[ParaphraseGroup]:
    """Read groups of paraphrases.

    Args:
        path: File of prompts with `group` and `kind`.
        holdout: Share of each group that is held out, at least one prompt; a hash of the prompt decides which.

    Raises:
        DataError: If a prompt has no group or no kind, or a group has two kinds, equal prompts, or too few of them.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in read_prompt_file(path):
        if prompt.group is None or prompt.kind is None:
            raise DataError(
                f"{path}: prompt '{prompt.prompt_id}' has no {'group' if prompt.group is None else 'kind'}; each "
                "prompt needs the `group` of its request, and its `kind`: harmful, benign or lookalike"
            )
        groups.setdefault(prompt.group, []).append(prompt)
    return [_as_group(path, group, prompts, holdout) for group, prompts in groups.items()]


def _as_group(path: str, group: str, prompts: Sequence[Prompt], holdout: float) -> ParaphraseGroup:
    expected = {prompt.kind == "harmful" for prompt in prompts}
    if len(expected) > 1:
        raise DataError(f"{path}: group '{group}' has harmful prompts and others; paraphrases are all of one kind")
    by_content = {content_hash(prompt.prompt, *prompt.inputs.hashed): prompt for prompt in prompts}
    if len(by_content) < len(prompts):
        raise DataError(f"{path}: group '{group}' has a prompt twice; remove one, for it would seem to be held out")
    if len(prompts) < MIN_PARAPHRASES:
        raise DataError(
            f"{path}: group '{group}' has {len(prompts)} prompts; expected at least {MIN_PARAPHRASES}: two make a "
            "box, and one is held out to see whether the box has anything to do with other wordings"
        )
    number = min(max(1, round(holdout * len(prompts))), len(prompts) - 2)
    held_out = {by_content[key].prompt_id for key in sorted(by_content)[:number]}
    return ParaphraseGroup(
        group,
        expected.pop(),
        tuple(prompt for prompt in prompts if prompt.prompt_id not in held_out),
        tuple(prompt for prompt in prompts if prompt.prompt_id in held_out),
    )
