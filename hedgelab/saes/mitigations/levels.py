"""Matryoshka levels that feel less gradient, are drawn anew, or hold what fires most; and a loss that weighs bad examples."""

import math
from typing import Any

import torch
from torch import Tensor

from hedgelab.errors import UserError, positive, whole_number
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Decoder, Target
from hedgelab.saes.losses import LossTerms
from hedgelab.saes.mitigations.base import Mitigation
from hedgelab.seeding import generator, resolve_seed


class DetachedInnerLevels(Mitigation):
    """Level ℓ's error reaches its own new latents alone, the outermost level's reaches all latents.

    ``L = Σ_(ℓ<L) w_ℓ ‖sg(x_hat_(ℓ-1)) + Δ_ℓ - x‖² + w_L ‖x_hat_L - x‖²``, with ``Δ_ℓ`` what level ℓ adds and ``sg`` stopping
    gradients. Inner latents thus hedge less for the sake of levels between, and still learn to serve the whole SAE, which
    ``detached: true`` forbids them. The sparsity penalty of an inner level covers its own new latents, that of the last covers
    all. From LISTA-Matryoshka (chanind/claude-auto-research-synthsaebench, 2026).
    """

    needs_levels = fixed_shapes = True

    def check(self, sae: Any) -> None:
        """Refuse what detaches in another way."""
        if sae.detached:
            wrong = "detached: detaches all levels already; set it to false"
        elif sae.credit:
            wrong = "credit: gives levels targets of their own; set it to 0"
        else:
            return
        raise UserError(f"model.{wrong}, or remove DetachedInnerLevels")

    def target(self, sae: Any, target: Target) -> Target:
        """The same, detached for all levels but the last."""
        return target._replace(detach="all_but_last")


class RandomPrefixes(Mitigation):
    """Each step cuts levels of other sizes, drawn log-uniformly from ``smallest`` to d_sae; the last is always d_sae.

    With fixed levels a latent matters to those outside its own prefix only, and latents of one level are in no order; with
    random ones every latent is more important than the next. The SAE's ``levels`` say how many are drawn, its weights go by
    position, innermost first, and so do the names of loss terms: ``mse/level1`` is the innermost. The sizes of a step are a
    function of the seed and the step's number alone.

    Args:
        smallest: Smallest level; null for the SAE's first.
        seed: Seed of the sizes; null takes the run's ``seed_everything``.
    """

    needs_levels = True

    def __init__(self, smallest: int | None = None, seed: int | None = None) -> None:
        super().__init__()
        self.smallest = None if smallest is None else whole_number("model.mitigations.smallest", smallest)
        self.seed = resolve_seed(seed)

    def check(self, sae: Any) -> None:
        """See that there is room for as many levels, and name them by their position."""
        if sae.adaptive:
            raise UserError("model.adaptive: weighs levels of fixed sizes; set it to false, or remove RandomPrefixes")
        self.smallest = sae.levels[0] if self.smallest is None else self.smallest
        if self.smallest + len(sae.levels) - 1 > sae.d_sae:
            room = f"{len(sae.levels)} levels from {self.smallest} up do not fit into d_sae = {sae.d_sae}"
            raise UserError(f"model.mitigations: RandomPrefixes: {room}; lower smallest, or give fewer levels")
        sae.level_names = [f"level{number}" for number in range(1, len(sae.levels) + 1)]

    def sizes(self, step: int, count: int, d_sae: int) -> list[int]:
        """The ``count`` rising sizes of a step.

        >>> RandomPrefixes(smallest=2, seed=0).sizes(step=0, count=3, d_sae=64)[-1]
        64
        """
        least = self.smallest or 1
        share = torch.rand(count - 1, generator=generator(self.seed, "prefixes", step), dtype=torch.float64)
        drawn = sorted(int(least * math.exp(one * math.log(d_sae / least))) for one in share.tolist())
        sizes: list[int] = []
        for number, size in enumerate(drawn):  # distinct, and with room for those that follow
            above = max(size, sizes[-1] + 1 if sizes else least)
            sizes.append(min(above, d_sae - (count - 1 - number)))
        return [*sizes, d_sae]

    def target(self, sae: Any, target: Target) -> Target:
        """The same, of this step's levels."""
        return target._replace(levels=self.sizes(sae.steps_done, len(target.levels), sae.d_sae))


class SortedLatents(Mitigation):
    """Level ℓ has the ``levels[ℓ]`` latents that fire most often, instead of the first ``levels[ℓ]``.

    Which latents are inner is then not decided by where they stand when training begins: a latent that comes to track a
    frequent feature moves inward, and a dead one out. Rates are a running mean over global batches,
    ``rate ← decay · rate + (1 - decay) · mean_b 1[a_b ≠ 0]``; ties keep the latents' own order. From LISTA-Matryoshka
    (chanind/claude-auto-research-synthsaebench, 2026).

    Dead latents come last, so ``auxiliary_per_level`` revives them for the error of the last level.

    Weights keep their places, so encoding and decoding know nothing of the order. In training, and of a saved SAE, *level ℓ*
    means the latents ``sae.latent_order()[:levels[ℓ]]``; the rates are saved with the weights.

    Args:
        decay: Share of the running mean that a step keeps, at least 0 and below 1.

    Attributes:
        rates: Running mean of how often each latent fires, ``[d_sae]`` float64.
    """

    needs_levels = fixed_shapes = True
    rates: Tensor

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


class TiltedLoss(Mitigation):
    """``Σ_b softmax_b(t L_b / mean L) L_b`` in place of ``mean_b L_b``, for each level; the weights have no gradient.

    ``L_b`` is the squared error of example b, over the global batch. Tilted empirical risk minimisation (Li et al. 2021, arXiv
    2007.01162); for SAEs in LISTA-Matryoshka (chanind/claude-auto-research-synthsaebench, 2026).

    Args:
        tilt: t, from 0 (plain mean) up; the larger, the more the worst examples count.
    """

    fixed_shapes = True

    def __init__(self, tilt: float = 2e-3) -> None:
        super().__init__()
        self.tilt = positive("model.mitigations.tilt", tilt, or_zero=True)

    def target(self, sae: Any, target: Target) -> Target:
        """The same, tilted."""
        return target._replace(tilt=self.tilt, ranks=sae.ranks)
