"""The basic metrics: how well a reconstruction matches, and how sparse its codes are.

``x`` and ``x_hat`` are ``[batch, d_in]``, codes are ``Codes`` or dense ``[batch, d_sae]``, where a latent fires above 0;
``weight [batch]`` are the examples' probabilities (population mode), None weighs all alike. A score is a float64 scalar.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import (
    Ratio,
    as_codes,
    at_least_float32,
    float64,
    total_weight,
    weighted_sum,
)

LOG_DENSITY_EDGES = tuple(-6 + step / 4 for step in range(25))
"""Default bin edges of the firing-density histogram: log10 rates from one in a million to always."""


class VarianceSums(NamedTuple):
    """Sums behind explained variance; those of two batches, or of two ranks, add up entry by entry.

    The scatter of a batch about its own mean enters in ``within``, where nothing cancels; only the scatter of the batch
    means is taken from raw float64 sums (``between``). The relative error is therefore about 1e-16 (mean / std)² times
    the share of the variance that lies between batches.
    """

    weight: Tensor  # of the examples, scalar
    residual: Tensor  # Σ‖x - x_hat‖², scalar
    within: Tensor  # Σ_batches Σ‖x - batch mean‖², scalar
    between: Tensor  # Σ_batches weight · ‖batch mean‖², scalar
    total: Tensor  # Σ x, [d_in]


def explained_variance_update(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> VarianceSums:
    """Sums of one batch."""
    x, x_hat = at_least_float32(x), at_least_float32(x_hat)
    count = total_weight(x, weight)
    if x.shape[0] == 0 or (weight is not None and count == 0):
        zero = count.new_zeros(())
        return VarianceSums(zero, zero, zero, zero, count.new_zeros(x.shape[1]))
    shift = x.mean(0)
    centred = x - shift
    offset = float64(centred.mean(0)) if weight is None else weighted_sum(centred, weight) / count  # rounding, weights
    mean = float64(shift) + offset
    within = weighted_sum(centred.square_().sum(1), weight) - count * offset.square().sum()
    residual = weighted_sum((x - x_hat).square_().sum(1), weight)
    return VarianceSums(count, residual, within, count * mean.square().sum(), count * mean)


def explained_variance_compute(sums: VarianceSums) -> Tensor:
    """Explained variance from its sums; NaN without examples and where ``x`` does not vary."""
    variance = sums.within + sums.between - sums.total.square().sum() / sums.weight
    return 1 - sums.residual / torch.where(variance > 0, variance, torch.nan)


def explained_variance(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Share of the variance that the reconstruction explains, ``1 - Σ‖x - x_hat‖² / Σ‖x - mean x‖²``: at most 1.

    Squares are summed over examples *and* dimensions before the one division (1 - FVU of Gao et al. 2024). Do not compare it
    with other numbers of the same name: the mean of a ratio for each example or dimension, or the one of scikit-learn and
    torchmetrics that takes the mean residual off first. A constant offset of ``x_hat`` counts as error here.

    >>> x = torch.tensor([[0.0, 0], [2, 0]])
    >>> explained_variance(x, torch.tensor([[0.5, 0], [1.5, 0]])).item()
    0.75

    Logged as:
        explained_variance: expl. var. (higher): 1 - squared error / variance of the activations; 1 is perfect
    """
    return explained_variance_compute(explained_variance_update(x, x_hat, weight))


def mean_squared_error_update(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Ratio:
    """Σ‖x - x_hat‖² of one batch, over its weight."""
    error = at_least_float32(x) - at_least_float32(x_hat)
    return Ratio(weighted_sum(error.square_().sum(1), weight), total_weight(x, weight))


def mean_squared_error(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error ``E‖x - x_hat‖²``, **summed** over d_in and averaged over examples, as in every loss here.

    It has the scale of the activations: compare it between SAEs of the same activations only.

    >>> mean_squared_error(torch.zeros(4, 3), torch.full((4, 3), 2.0)).item()
    12.0

    Logged as:
        mse: squared error (lower): ‖x - x̂‖², summed over d_in, mean over examples
    """
    return mean_squared_error_update(x, x_hat, weight).value()


def shrinkage_update(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Ratio:
    """Σ‖x_hat‖² of one batch, over Σ x·x_hat."""
    x, x_hat = at_least_float32(x), at_least_float32(x_hat)
    return Ratio(weighted_sum(x_hat.square().sum(1), weight), weighted_sum((x * x_hat).sum(1), weight))


def shrinkage(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Relative reconstruction bias ``γ = E‖x_hat‖² / E[x·x_hat]``; below 1 the reconstruction is shrunk, 1 is unbiased.

    γ is the scale by which ``x_hat`` would have to be *divided* for the least squared error (Rajamanoharan et al. 2024,
    *Improving Dictionary Learning with Gated Sparse Autoencoders*). Unlike ‖x_hat‖ / ‖x‖ it is 1 for an orthogonal
    projection, which loses norm without shrinking, and it is defined where single examples are all zero (toys). Of
    reconstructions that hardly correlate with ``x`` it says nothing.

    >>> x = torch.tensor([[1.0, 2.0]])
    >>> shrinkage(x, x / 2).item()
    0.5

    Logged as:
        shrinkage: shrinkage: best scale of the reconstruction, inverted: below 1 it is too short
    """
    return shrinkage_update(x, x_hat, weight).value()


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
