"""Residual hedging, gathered from batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.residual_hedging import BLOCKS, ResidualHedging, residual_hedging

ROWS = 8192
"""Examples kept: memory grows with them, time with their square."""


class ResidualHedgingMetric(Metric):
    """How much each latent of an SAE hedges, from held-out activations alone; see :mod:`.functional.residual_hedging`.

    Holds the first ``rows`` examples of each rank with their codes: ``4 · rows · (2 d_in + d_sae)`` bytes.

    Args:
        W_dec: The SAE's decoder, not folded, ``[d_sae, d_in]``.
        rows: Examples kept; later ones are ignored.
        blocks: Parts that they are split into.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    x: list[Tensor]
    error: list[Tensor]
    codes: list[Tensor]
    directions: Tensor
    norms: Tensor

    def __init__(self, W_dec: Tensor, rows: int = ROWS, blocks: int = BLOCKS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows, self.blocks = rows, blocks
        self.register_buffer("directions", normalize(W_dec.detach().float(), dim=1, eps=1e-30), persistent=False)
        self.register_buffer("norms", W_dec.detach().float().norm(dim=1), persistent=False)
        for name in ("x", "error", "codes"):
            self.add_state(name, [], dist_reduce_fx="cat")

    @property
    def kept(self) -> int:
        """Examples kept so far."""
        return sum(map(len, self.x))

    def update(self, x: Tensor, reconstruction: Tensor, codes: Codes) -> None:
        """Add a batch; ``x``, ``reconstruction``: ``[batch, d_in]``, with the codes that were decoded (not folded)."""
        room = max(0, self.rows - self.kept)
        if room:
            self.x.append(x[:room].detach().float())
            self.error.append((x - reconstruction)[:room].detach().float())
            self.codes.append(codes.scale(self.norms.to(codes.values)).to_dense()[:room].detach().float())

    def compute(self) -> ResidualHedging:
        """Hedging over everything kept.

        Raises:
            UserError: Hardly any examples.
        """
        x, error, codes = (dim_zero_cat(state) for state in (self.x, self.error, self.codes))
        return residual_hedging(x, error, codes, self.directions, self.blocks)

    def _wrap_compute(self, compute: Any) -> Any:
        """Undo torchmetrics' squeezing, which takes an SAE of one latent its dimension."""
        squeezing = super()._wrap_compute(compute)

        def restored(*args: Any, **kwargs: Any) -> ResidualHedging:
            result: ResidualHedging = squeezing(*args, **kwargs)
            return result._replace(latents=result.latents.reshape(-1))

        return restored
