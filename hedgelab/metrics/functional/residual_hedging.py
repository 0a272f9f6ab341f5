r"""Residual hedging: hedging read off the error's spread, without ground truth, new latents or continued training.

*What it rests on.* Let latent i track feature i, and let missing features ``m_j z_j f_j`` (``z_j ∈ {0, 1}`` rare, ``f_j``
orthonormal) have no latent. A decoder trained on squared error is a regression of activations on codes c, so row i holds
``h_ij = Cov(m_j z_j, c_i) / Var(c_i)`` along ``f_j``: omitted-variable bias. That is the hedged component, and the error
``e = x - x_hat`` shows no trace of it in its *mean*: regression makes e and c uncorrelated. It does in its *spread*. A hedge is
an average laid on every firing, but the feature fires or it does not, and a rare feature varies as often as it fires::

    E[(e · f_j)² | c]  =  m_j² p_j(c) (1 - p_j(c))  ≈  m_j E[m_j z_j | c]
    S_i = Cov(e eᵀ, c_i) / Var(c_i)  ≈  Σ_j m_j h_ij f_j f_jᵀ          so          ‖S_i‖_F ≈ m ‖h_i‖

Feature i itself is absent from S_i, being reconstructed; so is every missing feature that does not depend on latent i, at its
background rate. The unknown directions ``f_j`` need not be found: a Frobenius norm does not ask for them.

*Without a floor.* With the rows split in blocks, weights ``g_i(t) = (c_i(t) - mean c_i) / (n Var c_i)`` give

    ‖S_i‖_F² = Σ_{t ∈ A} Σ_{t' ∈ B} g_i(t) g_i(t') (e_t · e_t')²        for any two different blocks A, B,

whose errors are independent: the estimate is unbiased, and where nothing hedges it is zero on average, of either sign. The mean
over pairs of blocks is taken. A latent's hedging is the signed root ``sign(q) √|q|`` of ``q = ‖S_i‖_F² / m_i²``, so that noise
still cancels when latents are averaged. No ``d_in x d_in`` matrix is ever made.

*Units.* ``m_i = (E[c_i²] / E[c_i]) ‖W_i‖``, latent i's magnitude, for folded codes; ``W_i`` is the row that regresses activations
on ``c_i`` alone, along decoder row i, and sets right what a penalty has shrunk. It stands for the missing features' magnitudes.

*Where it fails.* ``p (1 - p)`` is not p: a missing feature that fires on most of a latent's firings (a child whose parent has
a latent) is underestimated, without bound as p → 1. Magnitudes that vary along the latent's own direction and are badly
reconstructed count as hedging; so does any other dependence of the error's shape on the code.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.errors import UserError

BLOCKS = 4
"""Parts that examples are split into; errors are compared between different ones only."""
FIRINGS = 4
"""Firings a latent needs in every block for its hedging to be estimated."""
_LATENTS = 2048  # at a time


class ResidualHedging(NamedTuple):
    """Hedging as the errors' spread shows it; float64.

    Attributes:
        hedging: Mean over measured latents; may be slightly below zero where nothing hedges. NaN where none is measured.
        std: Standard error of it over examples, by the jackknife over blocks.
        latents: Signed hedging of each latent, ``[W]``; NaN for those that fire too rarely to be measured.
        measured: Number of latents measured.
    """

    hedging: Tensor
    std: Tensor
    latents: Tensor
    measured: Tensor


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
    parts = [slice(block * size, (block + 1) * size) for block in range(blocks)]
    error = (error - error[: size * blocks].mean(0)).float()
    squares, magnitudes, enough = [], [], []
    pieces = [slice(start, min(start + _LATENTS, len(W_dec))) for start in range(0, len(W_dec), _LATENTS)]
    kernels = {
        pair: (error[parts[pair[0]]] @ error[parts[pair[1]]].t()).square() for pair in combinations(range(blocks), 2)
    }
    for latents in pieces:
        own = codes[: size * blocks, latents].double()
        centred, variance = own - own.mean(0), own.var(0, unbiased=False).clamp_min(1e-30)
        weights = [_influence(own[part], variance) for part in parts]
        squares.append(torch.stack([_paired(kernel, weights[a], weights[b]) for (a, b), kernel in kernels.items()]))
        slope = ((centred.t() @ x[: size * blocks].double()) * W_dec[latents].double()).sum(1) / (len(own) * variance)
        magnitudes.append(own.square().mean(0) / own.mean(0).clamp_min(1e-30) * slope.abs())
        enough.append(torch.stack([(own[part] > 0).sum(0) >= FIRINGS for part in parts]).all(0))
    square = torch.cat(squares, 1) / torch.cat(magnitudes).square().clamp_min(1e-30)
    measured = torch.cat(enough)
    latents_hedging = torch.where(measured, signed_root(square.mean(0)), torch.nan)
    left_out = [
        signed_root(square[[block not in pair for pair in kernels]].mean(0))[measured].mean() for block in range(blocks)
    ]
    spread = torch.stack(left_out)
    std = ((blocks - 1) / blocks * (spread - spread.mean()).square().sum()).sqrt()
    return ResidualHedging(latents_hedging[measured].mean(), std, latents_hedging, measured.sum().double())


def signed_root(square: Tensor) -> Tensor:
    """``sign(q) √|q|``: an estimate of a square that came out negative stays on its side of zero."""
    return square.sign() * square.abs().sqrt()


def _influence(codes: Tensor, variance: Tensor) -> Tensor:
    """Weights g, ``[examples, latents]`` float32, with ``g_i · y = Cov(y, c_i) / Var(c_i)`` over a block."""
    return ((codes - codes.mean(0)) / (len(codes) * variance)).float()


def _paired(kernel: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``g_iᵀ K g_i'`` of each latent, ``[latents]`` float64."""
    return ((kernel @ second) * first).sum(0).double()
