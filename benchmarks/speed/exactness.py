"""Errors of float32 log-probabilities against those of the same model in float64, by layout."""

import copy

import torch
from torch import Tensor

from bfpo.data.table import PairTable
from bfpo.model.attention import span_attention
from bfpo.model.layout import packed_layout, padded_layout
from bfpo.model.logps import completion_logps

from .variants import VARIANTS, Shape, new_model, trl_trainer


@torch.no_grad()
def largest_errors(shape: Shape, table: PairTable, rows: list[int]) -> dict[str, float]:
    """Return the largest error of a summed log-probability in each layout, and the median sum, in nats."""
    model = new_model(shape, VARIANTS["bfpo"])
    examples = [table[row] for row in rows]
    exact = completion_logps(copy.deepcopy(model).double(), padded_layout(examples))
    padded = completion_logps(model, padded_layout(examples))
    with span_attention(model.get_decoder().config):
        packed = completion_logps(model, packed_layout(examples))
    trainer, collate = trl_trainer(VARIANTS["TRL"], model, table, len(rows))
    trl_logps = torch.stack(trainer.compute_ref_log_probs(trainer.ref_model, collate(rows)), dim=1).flatten()

    def error(logps: Tensor) -> float:
        return float((logps.double() - exact).abs().max())

    return {
        "pairs": len(rows),
        "median_logp": round(float(exact.median()), 1),
        "TRL": error(trl_logps),
        "bfpo, padded": error(padded),
        "bfpo": error(packed),
    }
