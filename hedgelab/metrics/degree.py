"""The hedging degree, with what it needs to know of activations gathered from batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.additive import AdditiveMetric
from hedgelab.metrics.functional.accumulate import as_codes, float64, total_weight
from hedgelab.metrics.functional.degree import DRAWS, DegreeScores, hedging_degree


class HedgingDegree(AdditiveMetric):
    """How much an SAE hedges, from its continuations with and without new latents.

    Arguments as in :func:`.functional.hedging_degree`. Batches settle which latents live and the activations' covariance; the
    degree itself needs only the decoders, and without batches all latents count as live.
    """

    higher_is_better = False
    control: Tensor
    extended: Tensor
    reordered: Tensor | None
    foreign: Tensor | None
    weight: Tensor
    total: Tensor
    products: Tensor
    control_fired: Tensor
    extended_fired: Tensor

    def __init__(
        self,
        control: Tensor,
        extended: Tensor,
        reordered: Tensor | None = None,
        foreign: list[Tensor] | None = None,
        draws: int = DRAWS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        rows = {"control": control, "extended": extended, "reordered": reordered}
        for name, decoder in (rows | {"foreign": torch.stack(foreign) if foreign else None}).items():
            self.register_buffer(name, None if decoder is None else decoder.detach(), persistent=False)
        self.draws, self.seed = draws, seed
        d_in = control.shape[1]
        self.add_sum("weight")
        self.add_sum("total", d_in)
        self.add_sum("products", d_in, d_in)
        self.add_sum("control_fired", len(control))
        self.add_sum("extended_fired", len(extended))

    def update(
        self, x: Tensor, control: Tensor | Codes, extended: Tensor | Codes, weight: Tensor | None = None
    ) -> None:
        """Add a batch; ``x``: ``[batch, d_in]``, with the latents of both SAEs, ``weight``: ``[batch]``."""
        rows = float64(x)
        weighted = rows if weight is None else rows * float64(weight)[:, None]
        self.add_to(
            weight=total_weight(rows, weight),
            total=weighted.sum(0),
            products=rows.t() @ weighted,
            control_fired=as_codes(control).firing_counts(),
            extended_fired=as_codes(extended).firing_counts(),
        )

    def compute(self) -> DegreeScores:
        """The degree with its controls, over everything seen."""
        return self.degree()

    def degree(self) -> DegreeScores:
        """The same, of this rank alone and without a warning where no batch was seen."""
        width, seen = len(self.control), bool(self.weight > 0)
        mean = self.total / self.weight
        return hedging_degree(
            self.control,
            self.extended,
            live=(self.control_fired > 0) & (self.extended_fired[:width] > 0) if seen else None,
            live_new=self.extended_fired[width:] > 0 if seen else None,
            covariance=self.products / self.weight - mean.outer(mean) if seen else None,
            foreign=None if self.foreign is None else list(self.foreign),
            reordered=self.reordered,
            draws=self.draws,
            seed=self.seed,
        )
