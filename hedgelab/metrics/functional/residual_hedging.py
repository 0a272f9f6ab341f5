r"""Residual hedging: hedging read off the error's spread, without ground truth, new latents or continued training.

*What it rests on.* Let latent i track feature i, and let missing features ``m z_j f_j`` (``z_j ∈ {0, 1}`` rare, ``f_j``
orthonormal) have no latent. A decoder trained on squared error is the regression of activations on the codes c, so row i
holds ``h_ij``, the coefficient of ``c_i`` in the regression of ``m z_j`` on c: omitted-variable bias. That is the hedged
component, and the error ``e = x - x_hat`` shows no trace of it in its *mean*: regression leaves e and c uncorrelated. It does
in its *spread*. A hedge is an average laid on every firing, but the feature fires or it does not, and a rare feature varies
as often as it fires::

    E[(e · f_j)² | c]  =  m² p_j(c) (1 - p_j(c))
    S_i = coefficient of c_i in the regression of e eᵀ on c  ≈  Σ_j m (1 - p_ij) h_ij f_j f_jᵀ

with ``p_ij`` how often feature j fires along with latent i. The directions ``f_j`` need not be found: a Frobenius norm does
not ask for them, and neither does that of the third moment ``T_i``, the coefficient of ``c_i`` in the regression of ``e ⊗ e ⊗
e``, whose terms are those of S_i times ``m (1 - 2 p_ij)``. So

    r_i = ‖T_i‖ / ‖S_i‖ = m |1 - 2 p_i|,     p_i = (1 - r_i / m) / 2,     ‖h_i‖ = ‖S_i‖ / (m (1 - p_i)).

The magnitude m is that of a two-point variable whose mean variance is v and whose third moment is s times that, ``m² = s² + 4
v``, both taken from the whole error: ``s² = ‖E[e ⊗ e ⊗ e]‖² / ‖E[e eᵀ]‖²`` and ``v = tr C³ / tr C²`` with C the error's
covariance.

*Errors of features that do have a latent* (a TopK latent pushed out by others) depend on codes too. They lie along decoder
rows, so errors are projected off the span of the rows of measured latents, as long as these are fewer than d_in; a missing
feature loses but the share of it that is hedged. SAEs wider than that are measured with the errors as they are.

*Without a floor.* With examples split in blocks and ``g(t) = Cov(c)⁻¹ (c(t) - mean c) / n``,

    ‖S_i‖² = Σ_{t ∈ A} Σ_{t' ∈ B} g_i(t) g_i(t') (e_t · e_t')²       (and ‖T_i‖² with the cube) for different blocks A, B,

whose sampling errors are independent: the estimate is unbiased and, where nothing hedges, zero on average, of either sign;
the mean over pairs of blocks is taken. A latent's hedging is a signed root, so that noise still cancels in the mean over
latents. No ``d_in x d_in`` matrix is made for any latent. ``Cov(c)`` is shrunk toward its diagonal by ``W / (W + examples)``,
and for more than 4096 latents it is the diagonal. Rows are in units of the decoder's: codes are folded, and each ``h_i`` is
divided by the norm that regression gives row i, which sets right what a penalty has shrunk.

*Where it fails.* A missing feature that fires on *most* firings of a latent (``p_i > 1/2``: the sign of ``1 - 2 p_i`` is not
known) is underestimated, by ``(1 - p) / p``, and without bound as p → 1, where the two are one feature to anyone who sees
only activations. Anything else that makes the error's shape depend on a code, such as magnitudes that are badly reconstructed
outside the decoder's span, counts as hedging. With more features than dimensions the projection takes about the share
``W / d_in`` of every missing feature, so that widths between ``d_in / 2`` and ``d_in`` come out too low.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.metrics.functional.hedging_degree import orthonormal_basis

BLOCKS = 4
"""Parts that examples are split into; errors are compared between different ones only."""
FIRINGS = 4
"""Firings a latent needs in every block for its hedging to be estimated."""
JOINT_LATENTS = 4096
"""Most latents whose codes are taken as correlated."""


class ResidualHedging(NamedTuple):
    """Hedging as the errors' spread shows it; float64.

    Attributes:
        hedging: Mean over measured latents; may be slightly below zero where nothing hedges. NaN where none is measured.
        std: Standard error of it over examples, by the jackknife over blocks.
        latents: Signed hedging of each latent, ``[W]``; NaN for those that fire too rarely to be measured.
        measured: Number of latents measured.
        magnitude: Magnitude m of what is missing.
    """

    hedging: Tensor
    std: Tensor
    latents: Tensor
    measured: Tensor
    magnitude: Tensor


class _Moments(NamedTuple):
    """Squared norms for each pair of blocks: of ``S_i``, ``T_i``, ``[pairs, W]``; of the whole error's moments, ``[pairs]``."""

    second: Tensor
    third: Tensor
    second_of_all: Tensor
    third_of_all: Tensor


def residual_hedging(x: Tensor, error: Tensor, codes: Tensor, W_dec: Tensor, blocks: int = BLOCKS) -> ResidualHedging:
    """How much each latent hedges, from held-out activations and the SAE's errors on them; see the module.

    Examples should be independent: blocks are successive parts of them.

    Args:
        x: Activations, ``[examples, d_in]``.
        error: ``x - x_hat``, ``[examples, d_in]``.
        codes: Activations of latents, folded: in units of reconstructions, ``[examples, W]``.
        W_dec: Folded decoder, rows of norm 1, ``[W, d_in]``.
        blocks: Parts that examples are split into.

    Raises:
        UserError: Fewer than three blocks, or fewer than two examples a block.
    """
    if blocks < 3:
        raise UserError(f"blocks: must be at least 3, got {blocks}")
    size = len(x) // blocks
    if size < 2:
        raise UserError(f"examples: need at least {2 * blocks} for {blocks} blocks, got {len(x)}")
    x, error, codes = (rows[: size * blocks] for rows in (x, error, codes))
    measured = torch.stack([(part > 0).sum(0) >= FIRINGS for part in torch.split(codes, size)]).all(0)
    codes, W_dec = codes[:, measured].double(), W_dec[measured].double()
    latents = torch.full(measured.shape, torch.nan, dtype=torch.float64, device=codes.device)
    nothing = latents.new_tensor(torch.nan)
    if not len(W_dec):
        return ResidualHedging(nothing, nothing, latents, measured.sum().double(), nothing)
    error = outside(error.double() - error.double().mean(0), W_dec)
    if not bool(error.square().mean() > 1e-12 * x.double().square().mean()):  # nothing is left: nothing is missing
        zero = torch.zeros_like(nothing)
        return ResidualHedging(zero, zero, torch.where(measured, 0.0, latents), measured.sum().double(), zero)
    weights = influence(codes)
    rows = (weights.t() @ x.double() * W_dec).sum(1).abs().clamp_min(1e-30)
    pairs = list(combinations(range(blocks), 2))
    shares = [_centred(part) * blocks for part in torch.split(weights, size)]
    moments = _moments(torch.split(error.float(), size), shares, pairs)
    variance = mean_variance(error)
    everything = list(range(len(pairs)))
    own, magnitude = _hedging(moments, everything, variance)
    left_out = [
        (_hedging(moments, [at for at in everything if block not in pairs[at]], variance)[0] / rows).mean()
        for block in range(blocks)
    ]
    spread = torch.stack(left_out)
    std = ((blocks - 1) / blocks * (spread - spread.mean()).square().sum()).sqrt()
    latents[measured] = own / rows
    return ResidualHedging((own / rows).mean(), std, latents, measured.sum().double(), magnitude)


def outside(error: Tensor, W_dec: Tensor) -> Tensor:
    """Errors ``[examples, d_in]`` without their part in the span of rows ``[W, d_in]``; as they are where ``W > d_in``."""
    if len(W_dec) > W_dec.shape[1]:
        return error
    basis = orthonormal_basis(W_dec)
    return error - (error @ basis) @ basis.t()


def influence(codes: Tensor) -> Tensor:
    """Weights g, ``[examples, W]``: ``gᵀ y`` are the coefficients of codes ``[examples, W]`` in the regression of y on them."""
    examples, width = codes.shape
    centred = _centred(codes)
    variance = centred.square().mean(0).clamp_min(1e-30)
    if width > JOINT_LATENTS:
        return centred / (examples * variance)
    shrinkage = width / (width + examples)
    covariance = (1 - shrinkage) * (centred.t() @ centred) / examples
    covariance.diagonal().add_(shrinkage * variance)
    weights: Tensor = torch.linalg.solve(covariance, centred.t()).t() / examples
    return weights


def mean_variance(error: Tensor) -> Tensor:
    """``tr C³ / tr C²`` of the errors' covariance C: its eigenvalues' mean, weighted by their squares."""
    covariance = error.t() @ error / len(error)
    squared = covariance @ covariance
    return (squared * covariance).sum() / squared.diagonal().sum().clamp_min(1e-30)


def signed_root(square: Tensor) -> Tensor:
    """``sign(q) √|q|``: an estimate of a square that came out negative stays on its side of zero."""
    return square.sign() * square.abs().sqrt()


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)


def _moments(errors: Sequence[Tensor], weights: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> _Moments:
    parts: list[tuple[Tensor, ...]] = []
    for a, b in pairs:
        product = errors[a] @ errors[b].t()
        kernel = product.square()
        second, second_of_all = _paired(kernel, weights[a], weights[b]), kernel.mean(dtype=torch.float64)
        kernel *= product
        parts.append((second, _paired(kernel, weights[a], weights[b]), second_of_all, kernel.mean(dtype=torch.float64)))
    return _Moments(*(torch.stack(values) for values in zip(*parts, strict=True)))


def _paired(kernel: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``g_iᵀ K g_i'`` of each latent, ``[W]`` float64."""
    return ((kernel @ second.float()) * first.float()).sum(0).double()


def _hedging(moments: _Moments, chosen: Sequence[int], variance: Tensor) -> tuple[Tensor, Tensor]:
    """Signed ``‖h_i‖`` in units of codes, ``[W]``, from the chosen pairs of blocks, and the magnitude m."""
    second, third, second_of_all, third_of_all = (values[list(chosen)].mean(0) for values in moments)
    skew = (third_of_all / second_of_all.clamp_min(1e-30)).clamp_min(0)
    magnitude = (skew + 4 * variance).sqrt()
    ratio = (third.clamp_min(0) / second.abs().clamp_min(1e-30)).sqrt()
    rate = ((1 - ratio / magnitude) / 2).clamp(0, 0.5)
    return signed_root(second) / ((1 - rate) * magnitude), magnitude
