"""Loss recovered, accumulated over contexts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hedgelab.metrics.additive import AdditiveMetric
from hedgelab.metrics.functional.loss_recovered import (
    RecoveredLoss,
    next_token_divergences,
    next_token_losses,
    recovered_loss,
    sum64,
)

_SUMS = ("clean", "sae", "zero", "mean", "kl_sae", "kl_zero", "kl_mean")


class LossRecovered(AdditiveMetric):
    """How much of a language model's loss an SAE's reconstruction recovers; see :class:`.functional.RecoveredLoss`.

    The ablations are the same for every SAE, so their sums may be added on their own, once (:meth:`update_baselines`).

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("count", *_SUMS):
            self.add_sum(f"sum_{name}" if name in _SUMS else name)

    def update(
        self,
        tokens: Tensor,
        keep: Tensor,
        clean: Tensor,
        sae: Tensor,
        zero: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        """Add contexts.

        Args:
            tokens: ``[n, length]``.
            keep: Positions whose prediction counts, bool ``[n, length]``.
            clean: Logits of the untouched model, ``[n, length, vocabulary]``.
            sae: With the reconstruction.
            zero: With zeros; None where :meth:`update_baselines` adds them.
            mean: With the mean activation.
        """
        self.add_to(
            sum_sae=sum64(next_token_losses(sae, tokens, keep)),
            sum_kl_sae=sum64(next_token_divergences(clean, sae, keep)),
        )
        if zero is not None and mean is not None:
            self.update_baselines(baseline_sums(tokens, keep, clean, zero, mean))

    def update_baselines(self, sums: dict[str, Tensor]) -> None:
        """Add what :func:`baseline_sums` gave for the same contexts."""
        self.add_to(**{name if name == "count" else f"sum_{name}": value for name, value in sums.items()})

    def compute(self) -> RecoveredLoss:
        """Losses and shares over everything seen."""
        return recovered_loss({name: getattr(self, f"sum_{name}") for name in _SUMS}, self.count)


def baseline_sums(tokens: Tensor, keep: Tensor, clean: Tensor, zero: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Sums over tokens of what does not depend on an SAE; arguments as in :meth:`LossRecovered.update`."""
    sums = {"count": sum64(keep[:, :-1]), "clean": sum64(next_token_losses(clean, tokens, keep))}
    for name, logits in (("zero", zero), ("mean", mean)):
        sums[name] = sum64(next_token_losses(logits, tokens, keep))
        sums[f"kl_{name}"] = sum64(next_token_divergences(clean, logits, keep))
    return sums
