"""What training costs elsewhere: log-probabilities of held-out answers to benign instructions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bfpo.config.recipes import Source, TextSection
from bfpo.core.pairs import PreferencePair
from bfpo.core.terminal import progress
from bfpo.data.adapters import ADAPTERS
from bfpo.data.load import SourceReport
from bfpo.data.rows import read_rows
from bfpo.data.tokenize import Encoder
from bfpo.generation.in_process import load_checkpoint

MAX_LENGTH = 160


@dataclass(frozen=True)
class HeldOut:
    """A held-out pair under a model.

    Args:
        row_id: Hash of the texts.
        chosen: Summed log-probability of the preferred answer, in nats.
        rejected: That of the other answer.
        tokens: Number of tokens of the preferred answer.
    """

    row_id: str
    chosen: float
    rejected: float
    tokens: int

    def to_row(self) -> dict[str, Any]:
        """Return the pair for a results file."""
        logps = {"chosen": round(self.chosen, 3), "rejected": round(self.rejected, 3)}
        return {"row_id": self.row_id, **logps, "tokens": self.tokens}


@torch.inference_mode()
def score_pairs(model_path: Path, pairs: Path) -> list[HeldOut]:
    """Return the log-probabilities of AlpacaEval's held-out pairs under a model.

    Args:
        model_path: Folder of a model or an adapter.
        pairs: File for the adapter `alpaca_eval`.
    """
    model, tokenizer, _ = load_checkpoint(str(model_path), dtype="float32", revision=None)
    source = Source(path=str(pairs), adapter="alpaca_eval")
    rows = ADAPTERS["alpaca_eval"].read(read_rows(source), source)
    records = [row for row in rows if isinstance(row, PreferencePair)]
    encoder = Encoder(tokenizer, TextSection(max_length=MAX_LENGTH))
    encoded, examples = encoder.encode(records, SourceReport("held out", source))
    results = []
    with progress("held-out answers", len(examples)) as advance:
        for pair, example in zip(encoded, examples, strict=True):
            sums = [_logp(model, example.prompt_ids.tolist(), ids.tolist()) for ids in example.completions]
            results.append(HeldOut(pair.row_id, sums[0], sums[1], len(example.completions[0])))
            advance(1)
    return results


def _logp(model: Any, prompt: list[int], completion: list[int]) -> float:
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logps = logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
    return float(logps.sum())
