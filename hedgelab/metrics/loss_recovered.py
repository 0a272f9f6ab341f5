"""Loss recovered, accumulated over contexts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hedgelab.metrics.additive import AdditiveMetric
from hedgelab.metrics.functional.accumulate import float64
from hedgelab.metrics.functional.loss_recovered import (
    RecoveredLoss,
    baseline_sums,
    next_token_divergences,
    next_token_losses,
    recovered_loss,
)

_SUMS = ("count", "clean", "sae", "zero", "mean", "kl_sae", "kl_zero", "kl_mean")


class LossRecovered(AdditiveMetric):
    """How much of a language model's loss an SAE's reconstruction recovers; see :func:`.functional.recovered_loss`.

    The ablations are the same for every SAE, so their sums may be added on their own, once (:meth:`update_baselines`).
    """

    higher_is_better = True
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in _SUMS:
            self.add_sum(name)

    def update(
        self,
        tokens: Tensor,
        keep: Tensor,
        clean: Tensor,
        sae: Tensor,
        zero: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        """Add contexts ``[n, length]``: tokens, and logits of the untouched model and with each replacement spliced in."""
        losses, divergences = next_token_losses(sae, tokens, keep), next_token_divergences(clean, sae, keep)
        self.add_to(sae=float64(losses).sum(), kl_sae=float64(divergences).sum())
        if zero is not None and mean is not None:
            self.update_baselines(baseline_sums(tokens, keep, clean, zero, mean))

    def update_baselines(self, sums: dict[str, Tensor]) -> None:
        """Add what :func:`baseline_sums` gave for the same contexts."""
        self.add_to(**sums)

    def compute(self) -> RecoveredLoss:
        """Losses and shares over everything seen."""
        return recovered_loss({name: getattr(self, name) for name in _SUMS}, self.count)
