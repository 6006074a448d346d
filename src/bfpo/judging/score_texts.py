"""Token ids of pairs for score models: exactly the texts that judges with a score head read."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime

import numpy as np
from transformers import PreTrainedTokenizerBase

from bfpo.core.pairs import PreferencePair
from bfpo.data.load import Reason, SourceReport
from bfpo.data.readings import read_part
from bfpo.data.table import Example
from bfpo.data.template import fixed_clock
from bfpo.errors import ModelError
from bfpo.generation.model_inputs import TemplateRefusal
from bfpo.judging.label_pairs import as_completion
from bfpo.judging.scorers import ScoreJudge

_CHUNK = 512


def encode_scored(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    report: SourceReport,
    *,
    max_length: int,
    clock: datetime | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[PreferencePair], list[Example]]:
    """Encode the pairs of a source, and count in the report what is dropped.

    The prompt of an example is all that its two texts have in common at the beginning: it is fed once.

    Args:
        pairs: Pairs.
        tokenizer: Tokenizer with a chat template.
        report: Report on the source.
        max_length: Maximum length of a text, in tokens; pairs with a longer one are dropped, because a score is that
            of a whole answer.
        clock: Time that the chat template sees; None for the current time.
        advance: Function that is called after each chunk with the number of its pairs.

    Returns:
        The pairs that could be encoded, and their token ids.

    Raises:
        ModelError: If the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{tokenizer.name_or_path} has no chat template; set text.chat_template in the recipe to a Jinja "
            "template or to a file with one"
        )
    reader = ScoreJudge("reward", None, tokenizer, tokenizer.name_or_path)
    kept: list[PreferencePair] = []
    examples: list[Example] = []
    for start in range(0, len(pairs), _CHUNK):
        chunk = pairs[start : start + _CHUNK]
        with nullcontext() if clock is None else fixed_clock(clock):
            texts = [_render(pair, reader) for pair in chunk]
        ids = iter(_tokenize([text for both in texts if not isinstance(both, str) for text in both], tokenizer))
        for pair, both in zip(chunk, texts, strict=True):
            example = both if isinstance(both, str) else _split(next(ids), next(ids), max_length)
            if isinstance(example, str):
                report.dropped[Reason(example, pair.cell)] += 1
                continue
            kept.append(pair)
            examples.append(example)
        advance(len(chunk))
    return kept, examples


def _render(pair: PreferencePair, reader: ScoreJudge) -> tuple[str, str] | str:
    """Return the texts of both answers with their prompt, or the reason of a failure."""
    try:
        chosen, rejected = (str(reader.render(read_part(as_completion(pair, side)))[0]) for side in (0, 1))
    except TemplateRefusal as refusal:
        return str(refusal)
    return chosen, rejected


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    all_ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return all_ids


def _split(chosen: list[int], rejected: list[int], max_length: int) -> Example | str:
    if chosen == rejected:
        return "identical answers after the chat template"
    if max(len(chosen), len(rejected)) > max_length:
        return "longer than text.max_length"
    shared = 0
    # Each completion keeps a token of its own, even if one text begins with the whole other one.
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        return "the texts of both answers begin differently"
    prompt, *completions = (
        np.array(ids, dtype=np.int32) for ids in (chosen[:shared], chosen[shared:], rejected[shared:])
    )
    return Example(prompt, tuple(completions))
