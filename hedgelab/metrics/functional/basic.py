"""The basic metrics: how well a reconstruction matches, and how sparse its codes are.

``x`` and ``x_hat`` are ``[batch, d_in]``, codes are ``Codes`` or dense ``[batch, d_sae]``, where a latent fires that is not 0;
``weight [batch]`` are the examples' probabilities (population mode), None weighs all alike. A score is a float64 scalar.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import Ratio, as_codes, float64, total_weight, weighted_sum

SMALLEST_NORM = 1e-6  # of activations whose reconstruction has a relative norm
LOG_DENSITY_EDGES = tuple(-6 + step / 4 for step in range(25))  # log10 of firing rates, from one in a million to always


class VarianceSums(NamedTuple):
    """Sums behind explained variance; those of batches and ranks add up.

    Nothing cancels in a batch's scatter about its own mean (``within``), only in that of the batch means (``between``): the
    relative error is about 1e-16 (mean / std)² times the share of the variance that lies between batches.
    """

    weight: Tensor  # of the examples, scalar
    residual: Tensor  # Σ‖x - x_hat‖², scalar
    within: Tensor  # Σ_batches Σ‖x - batch mean‖², scalar
    between: Tensor  # Σ_batches weight · ‖batch mean‖², scalar
    total: Tensor  # Σ x, [d_in]

    def value(self) -> Tensor:
        """Explained variance; NaN without examples and where ``x`` does not vary."""
        variance = self.within + self.between - self.total.square().sum() / self.weight
        return 1 - self.residual / torch.where(variance > 0, variance, torch.nan)


def explained_variance_update(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> VarianceSums:
    """Sums of one batch."""
    x, x_hat = _at_least_float32(x), _at_least_float32(x_hat)
    count = total_weight(x, weight)
    if x.shape[0] == 0 or (weight is not None and count == 0):
        zero = count.new_zeros(())
        return VarianceSums(zero, zero, zero, zero, count.new_zeros(x.shape[1]))
    centred = x - (shift := x.mean(0))
    offset = float64(centred.mean(0)) if weight is None else weighted_sum(centred, weight) / count  # rounding, weights
    mean = float64(shift) + offset
    within = weighted_sum(centred.square_().sum(1), weight) - count * offset.square().sum()
    residual = weighted_sum((x - x_hat).square_().sum(1), weight)
    return VarianceSums(count, residual, within, count * mean.square().sum(), count * mean)


def explained_variance(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Share of the variance that the reconstruction explains, ``1 - Σ‖x - x_hat‖² / Σ‖x - mean x‖²``: at most 1.

    Squares are summed over examples *and* dimensions before the one division, and a constant offset of ``x_hat`` counts as an
    error, as in 1 - FVU of Gao et al. 2024 and SynthSAEBench (arXiv 2602.14687). Means of a ratio for each example or dimension
    differ, and so does scikit-learn's and torchmetrics' number of this name, which takes the mean residual off first.

    >>> x = torch.tensor([[0.0, 0], [2, 0]])
    >>> explained_variance(x, torch.tensor([[0.5, 0], [1.5, 0]])).item()
    0.75

    Logged as:
        explained_variance: expl. var. (higher): 1 - squared error / variance of the activations; 1 is perfect
    """
    return explained_variance_update(x, x_hat, weight).value()


def mean_squared_error_update(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Ratio:
    """Σ‖x - x_hat‖² of one batch, over its weight."""
    error = _at_least_float32(x) - _at_least_float32(x_hat)
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
    x, x_hat = _at_least_float32(x), _at_least_float32(x_hat)
    return Ratio(weighted_sum(x_hat.square().sum(1), weight), weighted_sum((x * x_hat).sum(1), weight))


def shrinkage(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Relative reconstruction bias ``γ = E‖x_hat‖² / E[x·x_hat]``; below 1 the reconstruction is shrunk, 1 is unbiased.

    γ is what ``x_hat`` would have to be *divided* by for the least squared error (Rajamanoharan et al. 2024, *Improving
    Dictionary Learning with Gated Sparse Autoencoders*). Unlike ‖x_hat‖ / ‖x‖ (:func:`norm_ratio`, SynthSAEBench's shrinkage)
    it is 1 for an orthogonal projection. Of reconstructions that hardly correlate with ``x`` it says nothing.

    >>> x = torch.tensor([[1.0, 2.0]])
    >>> shrinkage(x, x / 2).item()
    0.5

    Logged as:
        shrinkage: shrinkage: best scale of the reconstruction, inverted: below 1 it is too short
    """
    return shrinkage_update(x, x_hat, weight).value()


def norm_ratio_update(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Ratio:
    """Σ ‖x_hat‖ / ‖x‖ over the examples of a batch with ‖x‖ > 1e-6, over their weight."""
    sizes, own = (_at_least_float32(part).norm(dim=1) for part in (x, x_hat))
    counted = sizes > SMALLEST_NORM
    return Ratio(weighted_sum(torch.where(counted, own / sizes, 0.0), weight), weighted_sum(counted, weight))


def norm_ratio(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of ``‖x_hat‖ / ‖x‖`` over examples of ``‖x‖ > 1e-6``: what SynthSAEBench (arXiv 2602.14687) calls shrinkage.

    It falls with all that a reconstruction leaves out, not only where it is too short; :func:`shrinkage` tells both apart.

    >>> norm_ratio(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])).item()
    0.5

    Logged as:
        norm_ratio: norm ratio: ‖x̂‖ / ‖x‖, mean over examples; SynthSAEBench's shrinkage
    """
    return norm_ratio_update(x, x_hat, weight).value()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


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
    """Mean number of latents that fire on an example, from 0 to d_sae.

    It counts latents however weakly they fire: compare other metrics at equal L0, not L0 itself.

    >>> l0(torch.tensor([[1.0, 0, 3], [0, 0, 0.1]])).item()
    1.5

    Logged as:
        l0: L0 [latents]: latents that fire on an example, mean
    """
    return l0_update(codes, weight).value()


def firing_update(codes: Tensor | Codes, weight: Tensor | None = None) -> Ratio:
    """Weight of a batch's examples that each latent fires on, ``[d_sae]``, over that of all."""
    codes = as_codes(codes)
    if weight is None:
        fired = float64(codes.firing_counts())
        return Ratio(fired, fired.new_tensor(codes.batch_size))
    indicator = codes.with_values(float64(codes.values != 0))
    return Ratio(indicator.sum_per_latent(float64(weight)), float64(weight).sum())


def firing_rates(codes: Tensor | Codes, weight: Tensor | None = None) -> Tensor:
    """Fraction of examples each latent fires on, ``[d_sae]`` float64."""
    return firing_update(codes, weight).value()


def dead_latents(codes: Tensor | Codes, weight: Tensor | None = None) -> Tensor:
    """Number of latents that fire on no example (of positive weight), int64 scalar.

    Few examples make rare latents look dead: give it several times ``1 / rate`` of the rarest that matters.

    >>> dead_latents(torch.tensor([[1.0, 0, 3], [0, 0, 0.1]])).item()
    1

    Logged as:
        dead_latents: dead [latents] (lower): latents that fired on no example of the pass
        dead_fraction: dead share (lower): the same as a share of d_sae
    """
    return (firing_update(codes, weight).numerator == 0).sum()


def density_histogram(rates: Tensor, edges: tuple[float, ...] = LOG_DENSITY_EDGES) -> DensityHistogram:
    """Histogram of firing rates ``[d_sae]`` over ascending log10 ``edges``; a rate on an edge belongs to the bin above."""
    alive = float64(rates[rates > 0]).log10()
    boundaries = torch.tensor(edges, dtype=torch.float64, device=alive.device)
    bins = torch.bucketize(alive, boundaries[1:-1], right=True)
    return DensityHistogram(torch.bincount(bins, minlength=len(edges) - 1), boundaries, (rates == 0).sum())
