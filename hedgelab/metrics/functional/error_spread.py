r"""Residual hedging: hedging read off the error's spread, without ground truth, new latents or continued training.

*What it rests on.* Let latent i track feature i, and let missing features ``m z_j f_j`` (``z_j ∈ {0, 1}`` rare, ``f_j``
orthonormal) have no latent. A decoder trained on squared error is the regression of activations on the codes c, so row i holds
``h_ij``, the coefficient of ``c_i`` in the regression of ``m z_j`` on c: omitted-variable bias. That is the hedged component.
The error ``e = x - x_hat`` shows no trace of it in its *mean*, which regression leaves uncorrelated with c, but in its
*spread*: a hedge is an average laid on every firing, while the feature fires or does not, and varies as often as it fires::

    E[(e · f_j)² | c]  =  m² p_j(c) (1 - p_j(c))
    S_i = coefficient of c_i in the regression of e eᵀ on c  ≈  Σ_j m (1 - p_ij) h_ij f_j f_jᵀ

with ``p_ij`` how often feature j fires along with latent i. Neither the Frobenius norm of ``S_i`` asks for the directions
``f_j``, nor that of the third moment ``T_i``, the coefficient of ``c_i`` in the regression of ``e ⊗ e ⊗ e``, whose terms are
those of S_i times ``m (1 - 2 p_ij)``. So

    r_i = ‖T_i‖ / ‖S_i‖ = m |1 - 2 p_i|,     p_i = (1 - r_i / m) / 2,     ‖h_i‖ = ‖S_i‖ / (m (1 - p_i)) = 2 ‖S_i‖ / (m + r_i).

The magnitude m is that of a two-point variable of mean variance v whose third moment is s times that, ``m² = s² + 4 v``, both
from the whole error: ``s² = ‖E[e ⊗ e ⊗ e]‖² / ‖E[e eᵀ]‖²`` and ``v = tr C³ / tr C²`` with C its covariance. Errors of features
that *do* have a latent (a TopK latent pushed out by others) lie along decoder rows, so errors are projected off the span of the
measured latents' rows, as long as these are fewer than d_in; a missing feature loses but its hedged share.

*Noise.* With examples split in blocks and ``g(t) = Cov(c)⁻¹ (c(t) - mean c) / n``,

    q_i = Σ_{t ∈ A} Σ_{t' ∈ B} g_i(t) g_i(t') (e_t · e_t')²,       t_i the same with the cube,       for different blocks A, B,

estimate ``‖S_i‖²`` and ``‖T_i‖²`` without bias, for the sampling errors of A and B are independent; means over all pairs of
blocks are taken. Where errors do not depend on codes, q_i scatters about 0 by a known ``σ_i² = Var(e · e')² Σ_A Σ_B ‖g_i‖²
‖g_i'‖²`` (of ``(e · e')²`` what is left once rows and columns are centred). Root and rate bend at that scale, ``τ_i = 1.5
σ_i``::

    ‖S_i‖ = q_i / (q_i² + τ_i²)^¼,        r_i² = (max(0, q_i t_i) + m² τ_i²) / (q_i² + τ_i²),   at most m².

The root is odd, and the rate even, under the change of sign of (q_i, t_i) that noise does not feel: a latent that hedges
nothing is zero on average, of either sign. Hedging below about ``√τ_i`` is underestimated. ``Cov(c)`` is shrunk toward its
diagonal by ``W / (W + examples)``, and for more than 4096 latents it is the diagonal. Each ``h_i`` is divided by the norm that
regression gives row i, which takes out the scale of the codes. *Standard error*: the mean over latents is linearised in the
values of every pair of blocks; the variance of a mean over pairs has a part that each block brings alone and a part of the
pairs (Hoeffding 1948), both by analysis of variance, the former of either sign. It was cut at 0 up to release 0.2, which made
standard errors a seventh too large where nothing hedges.

*When to trust it.* Toys with rare, orthonormal features and SAEs narrower than d_in: the ranks agree with true hedging at .97
in the whole trial of release 0.1.0, and at .90 to .97 in a smaller one since the bias was taken out. *When not:* a missing
feature that fires on *most* firings of a latent (``p_i > 1/2``) is underestimated, by ``(1 - p) / p``: the sign of ``1 - 2
p_i`` is not known. Anything else that makes the error's shape depend on a code counts as hedging, such as magnitudes that are
badly reconstructed outside the decoder's span. With more features than dimensions the projection takes about the share ``W /
d_in`` of every missing feature, so that widths between ``d_in / 2`` and ``d_in`` come out too low. On real activations, which
are both dense and overlapping, treat it as a comparison between SAEs of one width, not as a level.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes, row_pointers
from hedgelab.kernels.ops import decode
from hedgelab.kernels.values import Decoder
from hedgelab.metrics.functional.accumulate import (
    add_sum,
    as_codes,
    float64,
    fold_decoder,
    orthonormal_basis,
    pair_product,
)

BLOCKS = 16  # parts that examples are split into; errors are compared between different ones only
FIRINGS = 16  # firings that a latent needs for its hedging to be estimated
JOINT_LATENTS = 4096  # most latents whose codes are taken as correlated
_NOISE = 1.5  # standard deviations of the noise at which root and rate bend


class ResidualHedging(NamedTuple):
    """Hedging as the errors' spread shows it; float64."""

    hedging: Tensor  # mean over measured latents; of either sign where nothing hedges, NaN where none is measured
    std: Tensor  # standard error of it over examples
    latents: Tensor  # signed hedging of each latent, [W]; NaN for those that fire too rarely to be measured
    measured: Tensor  # number of latents measured
    magnitude: Tensor  # magnitude m of what is missing


def residual_hedging(
    x: Tensor, error: Tensor, codes: Tensor | Codes, W_dec: Tensor, blocks: int = BLOCKS
) -> ResidualHedging:
    """How much each latent hedges, from held-out activations and the SAE's errors on them; formulas, and trust, in the module.

    From about 0 (none) to 1 (a latent that is mostly other features). ``x``, ``error = x - x_hat``: ``[examples, d_in]``;
    latents are codes or dense ``[examples, W]``; ``W_dec [W, d_in]`` has any norms. Examples should be independent of one
    another and of training: ``blocks`` are successive parts of them. Needs about ``4 · W · (examples + 8 W)`` bytes (codes
    stay sparse), and ``W · examples²`` multiplications.

    >>> x = torch.eye(3).repeat(200, 1)[:, [0, 1, 1]]  # a perfect SAE leaves no error
    >>> residual_hedging(x, 0 * x, x[:, :1], torch.eye(3)[:1]).hedging.item()
    0.0

    Logged as:
        hedging/residual_hedging: residual hedging (lower): norm of hedged components, from the spread of errors; 0: none
        hedging/residual_hedging_std: its std. error: standard error of residual hedging over examples
    """
    if blocks < 4:
        raise UserError(f"blocks: must be at least 4, got {blocks}")
    size = len(x) // blocks
    if size < 2:
        raise UserError(f"examples: need at least {2 * blocks} for {blocks} blocks, got {len(x)}")
    directions = fold_decoder(W_dec)[0]  # the scale of codes cancels: rows of the regression are in units of it too
    x, error = (rows.detach()[: size * blocks] for rows in (x, error))
    codes = as_codes(codes).detach().part(slice(0, size * blocks)).to(directions.device)
    measured = codes.firing_counts() >= FIRINGS
    latents = torch.full(measured.shape, torch.nan, dtype=torch.float64, device=measured.device)
    count, nothing = measured.sum().double(), latents.new_tensor(torch.nan)
    if not bool(measured.any()):
        return ResidualHedging(nothing, nothing, latents, count, nothing)
    chosen = measured.nonzero().squeeze(1)
    directions = directions[chosen]
    error = float64(error) - float64(error).mean(0)
    if len(directions) <= directions.shape[1]:
        basis = orthonormal_basis(directions)
        error = error - (error @ basis) @ basis.t()
    if not bool(error.square().mean() > 1e-12 * float64(x.square().mean())):  # nothing is left: nothing is missing
        zero = torch.zeros_like(nothing)
        return ResidualHedging(zero, zero, torch.where(measured, 0.0, latents), count, zero)
    parts = [_of_latents(codes.part(slice(at, at + size)), chosen) for at in range(0, len(x), size)]
    weights = influence(parts)
    scale, shares = torch.zeros_like(directions[:, 0]), []
    for g, part, own in zip(weights, parts, torch.split(x, size), strict=True):
        scale += ((float64(g).t() @ float64(own)) * directions).sum(1)
        g.sub_(g.mean(0))
        _, index, values = part.csr()
        shares.append(part.with_values(float64(values) * g[part.rows(), index]).sum_per_latent())
    scale, own_share = scale.abs().clamp_min(1e-30), torch.stack(shares)
    moments, noise = _moments([part.float() for part in torch.split(error, size)], weights)
    with torch.enable_grad():
        means = [part.mean(0).requires_grad_() for part in moments]
        own, magnitude = _hedging(means, noise, error.t() @ error / len(error))
        hedging = (own / scale).mean()
        slopes = torch.autograd.grad(hedging, means)
    first, second = torch.triu_indices(blocks, blocks, 1, device=own_share.device)
    excess = own_share / own_share.mean(0) - 1  # of a latent's variance in a block: no error of a regression
    excess = excess[first] + excess[second]
    q, t = (part - mean.detach() * excess for part, mean in zip(moments[:2], means[:2], strict=True))
    by_pair = (q * slopes[0] + t * slopes[1]).sum(1) + (moments[2] * slopes[2] + moments[3] * slopes[3])
    latents[chosen] = (own / scale).detach()
    std = pairwise_standard_error(by_pair, blocks)
    return ResidualHedging(hedging.detach(), std, latents, count, magnitude.detach())


def influence(codes: Sequence[Codes]) -> list[Tensor]:
    """Weights g of each block: the sum over blocks of ``gᵀ y`` are the coefficients of codes in the regression of y on them.

    float32 ``[examples, W]``; nothing else is of that size.
    """
    examples, width = sum(part.batch_size for part in codes), codes[0].d_sae
    wide = [part.with_values(float64(part.values)) for part in codes]
    mean = torch.stack([part.sum_per_latent() for part in wide]).sum(0) / examples
    squares = torch.stack([part.with_values(part.values.square()).sum_per_latent() for part in wide]).sum(0)
    variance = (squares / examples - mean.square()).clamp_min(1e-30)
    if width > JOINT_LATENTS:
        return [((part.to_dense() - mean) / (examples * variance)).float() for part in wide]
    shrinkage = width / (width + examples)
    covariance = -examples * mean.outer(mean)
    for part in wide:
        add_sum(covariance, pair_product(part, part))
    covariance.mul_((1 - shrinkage) / examples).diagonal().add_(shrinkage * variance)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance)).div_(examples)
    regression = Decoder(inverse.float(), -(mean @ inverse).float())
    return [decode(part.with_values(part.values.float()), regression) for part in codes]


def pairwise_standard_error(values: Tensor, blocks: int) -> Tensor:
    """Standard error of the mean over all pairs of blocks of ``values [pairs]``, pairs in the order of ``combinations``.

    ``value_ab = mean + ξ_a + ξ_b + η_ab``: the variance of the mean is ``4 Var ξ / blocks + Var η / pairs``, both estimated
    without bias. Var ξ may come out negative, but takes no more than half of the other part: were it cut at 0, the standard
    error would be a seventh too large where blocks bring nothing of their own.
    """
    first, second = torch.triu_indices(blocks, blocks, 1, device=values.device)
    table = values.new_zeros(blocks, blocks)
    table[first, second] = table[second, first] = values - values.mean()
    alone = table.sum(1) / (blocks - 2)
    left = table[first, second] - alone[first] - alone[second]
    of_pairs = left.square().sum() / (blocks * (blocks - 3) / 2)
    of_blocks = alone.square().sum() / (blocks - 1) - of_pairs / (blocks - 2)
    return (4 * of_blocks / blocks).clamp_min(-of_pairs / len(values) / 2).add(of_pairs / len(values)).sqrt()


def _of_latents(codes: Codes, chosen: Tensor) -> Codes:
    """Codes of some latents alone, as sparse ones."""
    _, latents, values = codes.csr()
    place = torch.full((codes.d_sae,), -1, device=latents.device)
    place[chosen] = torch.arange(len(chosen), device=latents.device)
    kept = (place[latents] >= 0).nonzero().squeeze(1)
    crow = row_pointers(codes.rows()[kept], codes.batch_size)
    return Codes.from_csr(crow, place[latents[kept]], values[kept], len(chosen))


def _moments(errors: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """For each pair of blocks q and t of each latent, ``[pairs, W]``, and of the whole error, ``[pairs]``; then σ ``[W]``.

    ``weights`` have no mean in any block.
    """
    blocks = len(errors)
    sizes = [blocks**2 * g.square().sum(0, dtype=torch.float64) for g in weights]
    parts: list[tuple[Tensor, ...]] = []
    scatter, amounts = [], torch.zeros_like(sizes[0])
    for a, b in combinations(range(blocks), 2):
        product = errors[a] @ errors[b].t()
        square = product.square()
        scatter.append((square.var() - square.mean(0).var() - square.mean(1).var()).double().clamp_min(0))
        amounts += sizes[a] * sizes[b]
        cube = square * product
        of_latents = [blocks**2 * ((kernel @ weights[b]).mul_(weights[a])).sum(0).double() for kernel in (square, cube)]
        parts.append((*of_latents, square.mean(dtype=torch.float64), cube.mean(dtype=torch.float64)))
    noise = (torch.stack(scatter).mean() * amounts).sqrt() / len(parts)
    return [torch.stack(values) for values in zip(*parts, strict=True)], noise


def _hedging(means: Sequence[Tensor], noise: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Signed ``‖h_i‖`` in units of codes, ``[W]``, and the magnitude m; the covariance is that of the errors."""
    second, third, second_of_all, third_of_all = means
    squared = covariance @ covariance
    variance = (squared * covariance).sum() / squared.diagonal().sum().clamp_min(1e-30)
    skew = (third_of_all / second_of_all.clamp_min(1e-30)).clamp_min(0)
    magnitude = (skew + 4 * variance).sqrt()
    bend = _NOISE * noise
    known = second.square() + bend.square()
    squared_ratio = ((second * third).clamp_min(0) + (magnitude * bend).square()) / known.clamp_min(1e-60)
    ratio = torch.minimum(squared_ratio.clamp_min(1e-30).sqrt(), magnitude)
    # signed, and straight where |q| is below τ
    root = second / known.clamp_min(torch.finfo(second.dtype).tiny).pow(0.25)
    return 2 * root / (magnitude + ratio), magnitude
