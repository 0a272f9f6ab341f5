"""Residual hedging, gathered from batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.additive import ShapedMetric
from hedgelab.metrics.functional.accumulate import as_codes
from hedgelab.metrics.functional.error_spread import BLOCKS, ResidualHedging, residual_hedging

ROWS = 8192
"""Examples kept: memory grows with them, time with their square."""


class ResidualHedgingMetric(ShapedMetric):
    """How much each latent of an SAE hedges, from held-out activations alone; see :func:`.functional.residual_hedging`.

    Holds the first ``rows`` examples of each rank with their codes: ``4 · rows · (2 d_in + d_sae)`` bytes.
    """

    higher_is_better = False
    x: list[Tensor]
    error: list[Tensor]
    codes: list[Tensor]
    W_dec: Tensor

    def __init__(self, W_dec: Tensor, rows: int = ROWS, blocks: int = BLOCKS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows, self.blocks = rows, blocks
        self.register_buffer("W_dec", W_dec.detach().float(), persistent=False)
        for name in ("x", "error", "codes"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, x: Tensor, reconstruction: Tensor, codes: Tensor | Codes) -> None:
        """Add a batch; ``x``, ``reconstruction``: ``[batch, d_in]``, with the latents that were decoded."""
        room = self.rows - sum(map(len, self.x))
        if room > 0:
            self.x.append(x[:room].detach().float())
            self.error.append((x - reconstruction)[:room].detach().float())
            self.codes.append(as_codes(codes).to_dense()[:room].detach().float())

    def compute(self) -> ResidualHedging:
        """Hedging over everything kept."""
        x, error, codes = (dim_zero_cat(state) for state in (self.x, self.error, self.codes))
        return residual_hedging(x, error, codes, self.W_dec, self.blocks)
