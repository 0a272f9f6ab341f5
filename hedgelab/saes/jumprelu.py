"""The JumpReLU SAE: a learned threshold for every latent."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hedgelab.batch import Batch
from hedgelab.errors import positive, whole_number
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import JumpReLU, Threshold
from hedgelab.saes.flat import FlatSAE
from hedgelab.saes.losses import warmed_up


class JumpReLUSAE(FlatSAE):
    """Latents that jump at learned thresholds, with an L0 penalty (Rajamanoharan et al. 2024; SPEC section 2).

    Args:
        d_in: Width of the activations (linked from the data).
        d_sae: Number of latents.
        l0_coefficient: λ of the penalty ``λ · mean_b Σ_i 1[pre_i > θ_i]``.
        l0_warmup_steps: Steps over which λ rises linearly to its full value.
        threshold: Threshold of every latent at the start.
        bandwidth: Width ε of the rectangle kernel of the straight-through estimates.
        **kwargs: Arguments of :class:`~hedgelab.saes.flat.FlatSAE`.
    """

    penalty_name = "l0_penalty"
    per_member = ("l0_coefficient",)
    full_precision = ("log_threshold",)

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l0_coefficient: float,
        l0_warmup_steps: int = 0,
        threshold: float = 0.01,
        bandwidth: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(d_in, d_sae, **kwargs)
        self.l0_coefficient = positive("model.l0_coefficient", l0_coefficient, or_zero=True)
        self.l0_warmup_steps = whole_number("model.l0_warmup_steps", l0_warmup_steps, 0)
        self.threshold = positive("model.threshold", threshold)
        self.bandwidth = positive("model.bandwidth", bandwidth)
        self.log_threshold = nn.Parameter(torch.full((d_sae,), math.log(threshold)))

    def thresholds(self) -> Tensor:
        """θ, what pre-activations must exceed, ``[d_sae]``."""
        return self.log_threshold.exp()

    def selection(self) -> Threshold:
        """Latents above θ."""
        return Threshold(self.thresholds())

    def training_selection(self, batch: Batch) -> JumpReLU:
        """The same, with straight-through gradients to θ."""
        return JumpReLU(self.log_threshold, self.bandwidth, batch.weight)

    def penalty(self, codes: Codes, batch: Batch) -> Tensor:
        """``λ · mean_b 1[pre_i > θ_i]`` of each latent, with a straight-through gradient to θ, ``[d_sae]``."""
        assert codes.rates is not None
        return warmed_up(self.l0_coefficient, self.steps_done, self.l0_warmup_steps) * codes.rates
