"""The BatchTopK SAE: k latents an example on average."""

from typing import Any

import torch
from torch import Tensor

from hedgelab.batch import Batch
from hedgelab.kernels.values import BatchTopK, Threshold
from hedgelab.saes.losses import LossTerms, followed
from hedgelab.saes.topk import KSparseSAE


class BatchTopKSAE(KSparseSAE):
    """Keep the k · batch largest latents of the whole batch (Bussmann et al. 2024; SPEC section 2).

    Inference uses one threshold, an exponential moving average (rate 0.01) of the smallest positive kept activation: exactly a
    JumpReLU SAE with a uniform threshold (uniform in units of the selection, where that is norm-aware).
    """

    threshold: Tensor  # a scalar; NaN before the first training step, when inference is a plain ReLU

    def __init__(self, d_in: int, d_sae: int, k: int, **kwargs: Any) -> None:
        super().__init__(d_in, d_sae, k, **kwargs)
        self.register_buffer("threshold", torch.tensor(float("nan"), dtype=torch.float32))

    def thresholds(self) -> Tensor:
        """What pre-activations must exceed in inference: a scalar, or ``[d_sae]`` where the selection is norm-aware."""
        threshold, scale = self.threshold.nan_to_num(0.0), self.selection_scale()
        return threshold if scale is None else threshold / scale.clamp_min(1e-30)

    def selection(self) -> Threshold:
        """Latents above the learned threshold."""
        return Threshold(self.thresholds())

    def training_selection(self, batch: Batch) -> BatchTopK:
        """The k · batch largest latents of the global batch, k as of now."""
        return BatchTopK(self.current_k(), batch.weight, self.ranks)

    @torch.no_grad()
    def after_step(self, result: LossTerms) -> None:
        """Move the threshold toward this batch's smallest kept activation, and advance the dead-latent clock."""
        super().after_step(result)
        scale = self.selection_scale()
        kept = result.codes if scale is None else result.codes.scale(scale)
        self.threshold.copy_(followed(self.threshold, self.ranks.min(kept.smallest_positive().to(self.threshold))))
