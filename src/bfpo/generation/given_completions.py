"""Log-probabilities of given completions under a model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bfpo.config.recipes import Source, TextSection
from bfpo.core.pairs import Demonstration
from bfpo.core.samples import Completion
from bfpo.core.terminal import progress
from bfpo.data.load import SourceReport
from bfpo.data.tokenize import Encoder
from bfpo.errors import DataError
from bfpo.generation.in_process import load_checkpoint
from bfpo.model.layout import packed_layout, packs
from bfpo.model.logps import add_layout_forward

_TOKENS_PER_PACK = 8192


def logps_of(model_path: Path, completions: Sequence[Completion], *, max_length: int) -> NDArray[np.float64]:
    """Return the log-probability of each completion, in nats, summed over its tokens and the end of turn, (N,).

    Args:
        model_path: Folder of a model or an adapter.
        completions: The completions.
        max_length: Maximum length of a prompt with its completion, in tokens.

    Raises:
        DataError: If a completion is empty or too long.
    """
    model, tokenizer, _ = load_checkpoint(str(model_path), dtype="float32", revision=None)
    add_layout_forward(model)
    model.eval()
    report = SourceReport("completions", Source(path=str(model_path)))
    demonstrations = [Demonstration(completion.prompt, completion.text) for completion in completions]
    _, examples = Encoder(tokenizer, TextSection(max_length=max_length)).encode(demonstrations, report)
    if report.dropped:
        raise DataError(f"{model_path}: completions without a log-probability: {dict(report.dropped)}")
    logps = []
    with torch.no_grad(), progress("log-probabilities", len(examples)) as advance:
        for part in packs(examples, _TOKENS_PER_PACK):
            logps.append(model(layout=packed_layout(examples[part]).to(model.device)).double().cpu().numpy())
            advance(len(logps[-1]))
    return np.concatenate(logps)
