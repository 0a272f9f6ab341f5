"""How sparse codes are: L0, dead latents, firing rates.

Codes are ``Codes`` or dense ``[batch, d_sae]``; a latent fires where it is above 0. ``weight [batch]`` are the examples'
probabilities (population mode), None weighs all alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import Ratio, as_codes, float64, total_weight, weighted_sum

LOG_DENSITY_EDGES = tuple(-6 + step / 4 for step in range(25))
"""Default bin edges of the firing-density histogram: log10 rates from one in a million to always."""


class FiringSums(NamedTuple):
    """How often latents fire, float64; those of batches and ranks add up."""

    fired: Tensor  # weight of the examples each latent fires on, [d_sae]
    weight: Tensor  # of all examples, scalar


class DensityHistogram(NamedTuple):
    """Latents by firing rate."""

    counts: Tensor  # latents in each bin, [bins] int64; the lowest bin also holds what fires more rarely
    edges: Tensor  # of the bins, in log10 of the firing rate, [bins + 1]
    dead: Tensor  # latents that never fired and are in no bin, int64 scalar


def l0_update(codes: Tensor | Codes, weight: Tensor | None = None) -> Ratio:
    """Active latents summed over a batch, over its weight."""
    active = as_codes(codes).active_per_example()
    return Ratio(weighted_sum(active, weight), total_weight(active, weight))


def l0(codes: Tensor | Codes, weight: Tensor | None = None) -> Tensor:
    """Mean number of latents that fire on an example, from 0 to d_sae, a float64 scalar.

    It counts latents however weakly they fire: compare other metrics at equal L0, not L0 itself.

    >>> l0(torch.tensor([[1.0, 0, 3], [0, 0, 0.1]])).item()
    1.5

    Logged as:
        l0: L0 [latents]: latents that fire on an example, mean
    """
    return l0_update(codes, weight).value()


def firing_update(codes: Tensor | Codes, weight: Tensor | None = None) -> FiringSums:
    """Sums of one batch."""
    codes = as_codes(codes)
    if weight is None:
        fired = float64(codes.firing_counts())
        return FiringSums(fired, fired.new_tensor(codes.batch_size))
    indicator = Codes(codes.d_sae, float64(codes.values > 0), codes.latents, codes.crow)
    return FiringSums(indicator.sum_per_latent(float64(weight)), float64(weight).sum())


def firing_rates(codes: Tensor | Codes, weight: Tensor | None = None) -> Tensor:
    """Fraction of examples each latent fires on, ``[d_sae]`` float64."""
    fired, count = firing_update(codes, weight)
    return fired / count


def dead_latents(codes: Tensor | Codes, weight: Tensor | None = None) -> Tensor:
    """Number of latents that fire on no example (of positive weight), int64 scalar.

    Few examples make rare latents look dead: give it several times ``1 / rate`` of the rarest that matters.

    >>> dead_latents(torch.tensor([[1.0, 0, 3], [0, 0, 0.1]])).item()
    1

    Logged as:
        dead_latents: dead [latents] (lower): latents that fired on no example of the pass
        dead_fraction: dead share (lower): the same as a share of d_sae
    """
    return (firing_update(codes, weight).fired == 0).sum()


def density_histogram(rates: Tensor, edges: tuple[float, ...] = LOG_DENSITY_EDGES) -> DensityHistogram:
    """Histogram of firing rates ``[d_sae]`` over ascending log10 ``edges``; a rate on an edge belongs to the bin above."""
    alive = float64(rates[rates > 0]).log10()
    boundaries = torch.tensor(edges, dtype=torch.float64, device=alive.device)
    bins = torch.bucketize(alive, boundaries[1:-1], right=True)
    counts = torch.bincount(bins, minlength=len(edges) - 1)
    return DensityHistogram(counts, boundaries, (rates == 0).sum())
