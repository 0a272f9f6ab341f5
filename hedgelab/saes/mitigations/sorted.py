"""Latents sorted by how often they fire before matryoshka levels are cut."""

from typing import Any

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Decoder, Target
from hedgelab.saes.losses import LossTerms
from hedgelab.saes.mitigations.base import Mitigation


class SortedLatents(Mitigation):
    """Level ℓ has the ``levels[ℓ]`` latents that fire most often, instead of the first ``levels[ℓ]``.

    Which latents are inner is then not decided by where they stand when training begins: one that comes to track a frequent
    feature moves inward, a dead one out. Rates are a running mean over global batches, ``rate ← decay · rate + (1 - decay) ·
    mean_b 1[a_b ≠ 0]``; ties keep the latents' order. From LISTA-Matryoshka (chanind/claude-auto-research-synthsaebench, 2026).

    Dead latents come last, so ``auxiliary_per_level`` revives them for the error of the last level.

    Weights keep their places, so encoding and decoding know nothing of the order. In training, and of a saved SAE, *level ℓ*
    means the latents ``sae.latent_order()[:levels[ℓ]]``; the rates are saved with the weights.

    Args:
        decay: Share of the running mean that a step keeps, at least 0 and below 1.
    """

    needs_levels = fixed_shapes = True
    rates: Tensor  # running mean of how often each latent fires, [d_sae] float64

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"model.mitigations.decay: must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self._weight: Tensor | None = None  # of the examples of the step under way

    def check(self, sae: Any) -> None:
        """Start with no latent having fired."""
        self.register_buffer("rates", torch.zeros(sae.d_sae, dtype=torch.float64))

    def order(self) -> Tensor:
        """The latents, those that fire most often first."""
        return self.rates.argsort(descending=True, stable=True)

    def codes_and_decoder(self, sae: Any, codes: Codes, decoder: Decoder) -> tuple[Codes, Decoder]:
        """Both in that order."""
        order = self.order()
        return codes.relabelled(order.argsort()), decoder._replace(W_dec=decoder.W_dec.index_select(0, order))

    def target(self, sae: Any, target: Target) -> Target:
        """As it is; the weight of its examples is that of their firings."""
        self._weight = target.weight
        return target

    def after_step(self, sae: Any, result: LossTerms) -> None:
        """Take the batch's firing rates into the running mean."""
        codes = result.codes
        if self._weight is None:  # counts: their sum is the same however the batch is split, so that ties stay ties
            rates = sae.ranks.sum(codes.firing_counts()).double() / (codes.batch_size * sae.ranks.size)
        else:
            fires = codes.with_values((codes.values != 0).double())
            rates = sae.ranks.mean(fires.sum_per_latent(self._weight))
        self.rates.lerp_(rates, 1 - self.decay)
