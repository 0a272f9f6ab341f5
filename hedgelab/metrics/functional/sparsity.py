"""How sparse codes are: L0, dead latents, firing rates."""

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import as_codes, float64, total_weight, weighted_sum

LOG_DENSITY_EDGES = tuple(-6 + step / 4 for step in range(25))
"""Default bin edges of the firing-density histogram: log10 rates from one in a million to always."""


class DensityHistogram(NamedTuple):
    """Latents by firing rate.

    Attributes:
        counts: Latents in each bin, ``[bins]`` int64; the lowest bin also holds what fires more rarely.
        edges: Edges of the bins in log10 of the firing rate, ``[bins + 1]``.
        dead: Latents that never fired and are in no bin, int64 scalar.
    """

    counts: Tensor
    edges: Tensor
    dead: Tensor


def l0_update(codes: Tensor | Codes, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Active latents summed over examples, and the weight of the batch, float64 scalars."""
    active = as_codes(codes).active_per_example()
    return weighted_sum(active, weight), total_weight(active, weight)


def l0(codes: Tensor | Codes, weight: Tensor | None = None) -> Tensor:
    """Mean number of latents active (> 0) on an example; ``weight``: ``[batch]``.

    Logged as:
        l0: L0 [latents]: latents that fire on an example, mean
    """
    active, count = l0_update(codes, weight)
    return active / count


def firing_update(codes: Tensor | Codes, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight of the examples each latent fires on, ``[d_sae]``, and of the batch, both float64."""
    codes = as_codes(codes)
    if weight is None:
        fired = float64(codes.firing_counts())
        return fired, torch.tensor(codes.batch_size, dtype=torch.float64, device=fired.device)
    indicator = Codes(codes.d_sae, float64(codes.values > 0), codes.latents, codes.crow)
    return indicator.sum_per_latent(float64(weight)), float64(weight).sum()


def firing_rates(codes: Tensor | Codes, weight: Tensor | None = None) -> Tensor:
    """Fraction of examples each latent fires on, ``[d_sae]``; ``weight``: ``[batch]``."""
    fired, count = firing_update(codes, weight)
    return fired / count


def dead_latents(codes: Tensor | Codes, weight: Tensor | None = None) -> Tensor:
    """Number of latents that fire on no example (of positive weight), int64 scalar.

    Logged as:
        dead_latents: dead [latents] (lower): latents that fired on no example of the pass
        dead_fraction: dead share (lower): the same as a share of d_sae
    """
    return (firing_update(codes, weight)[0] == 0).sum()


def density_histogram(rates: Tensor, edges: tuple[float, ...] = LOG_DENSITY_EDGES) -> DensityHistogram:
    """Histogram of firing rates ``[d_sae]`` over ascending log10 ``edges``; a rate on an edge belongs to the bin above."""
    alive = float64(rates[rates > 0]).log10()
    boundaries = torch.tensor(edges, dtype=torch.float64, device=alive.device)
    bins = torch.bucketize(alive, boundaries[1:-1], right=True)
    counts = torch.bincount(bins, minlength=len(edges) - 1)
    return DensityHistogram(counts, boundaries, (rates == 0).sum())
