"""Dictionaries: the unit directions along which a toy's features lie."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.errors import UserError

_MAX_ITERATIONS = 500
_NORM_TOLERANCE = 1e-9


def make_dictionary(n: int, d_in: int, target_cosine: float, generator: torch.Generator) -> Tensor:
    """Unit directions ``[n, d_in]`` (float64): orthonormal where that is possible and asked for, else correlated."""
    if target_cosine == 0 and n <= d_in:
        return orthonormal_features(n, d_in, generator)
    return correlated_features(n, d_in, target_cosine, generator)


def orthonormal_features(n: int, d_in: int, generator: torch.Generator) -> Tensor:
    """``n <= d_in`` orthonormal directions in a uniformly random orientation, ``[n, d_in]`` (float64)."""
    if n > d_in:
        raise UserError(f"data.d_in: {n} orthonormal features need d_in of at least {n}, got {d_in}")
    q, r = torch.linalg.qr(torch.randn(d_in, n, generator=generator, dtype=torch.float64))
    directions: Tensor = (q * r.diagonal().sign()).T.contiguous()  # signs: uniform, not LAPACK's
    return directions


def correlated_features(n: int, d_in: int, target_cosine: float, generator: torch.Generator) -> Tensor:
    """Unit directions ``[n, d_in]`` (float64) of one pairwise cosine, or spread as little around it as d_in allows.

    With ``n <= d_in`` every cosine is exact. Beyond, each feature is a common direction, which gives the target, plus a
    unit-norm tight frame in its complement: tight frames reach the least possible mean squared cosine (Benedetto &
    Fickus 2003), so that at target 0 the root mean square over pairs is Welch's ``sqrt((n/d_in - 1)/(n - 1))``.

    The target lies below 1, and below 0 only for ``n <= d_in`` and down to ``-1/(n - 1)``.
    """
    lowest = 0.0 if n > d_in else -1 / max(n - 1, 1)
    if not lowest <= target_cosine < 1:
        raise UserError(
            f"data.target_cosine: must be at least {lowest:.4g} (for {n} features in {d_in} dimensions) and below 1, "
            f"got {target_cosine}"
        )
    if n <= d_in:
        gram = torch.full((n, n), target_cosine, dtype=torch.float64).fill_diagonal_(1.0)
        values, vectors = torch.linalg.eigh(gram)  # not Cholesky: at the lowest target the Gram matrix is singular
        root: Tensor = vectors * values.clamp(min=0).sqrt()
        return root @ orthonormal_features(n, d_in, generator)
    if target_cosine == 0:
        return _tight_frame(n, d_in, generator)
    if d_in < 2:
        raise UserError(f"data.d_in: a target cosine of {target_cosine} needs at least 2 dimensions, got {d_in}")
    basis = orthonormal_features(d_in, d_in, generator)
    frame: Tensor = _tight_frame(n, d_in - 1, generator) @ basis[1:]
    return math.sqrt(target_cosine) * basis[0] + math.sqrt(1 - target_cosine) * frame


def _tight_frame(n: int, d_in: int, generator: torch.Generator) -> Tensor:
    """A unit-norm tight frame ``[n, d_in]``, ``n >= d_in``, near random directions.

    Alternates between the nearest tight frame (a polar factor, through the small ``d_in x d_in`` Gram matrix, never
    ``n x n``) and unit norms (Tropp et al. 2005).
    """
    frame = normalize(torch.randn(n, d_in, generator=generator, dtype=torch.float64), dim=1)
    for _ in range(_MAX_ITERATIONS):
        values, vectors = torch.linalg.eigh(frame.T @ frame)
        frame = frame @ ((n / d_in / values).sqrt() * vectors @ vectors.T)
        norms = frame.norm(dim=1, keepdim=True)
        frame = frame / norms
        if float((norms - 1).abs().max()) < _NORM_TOLERANCE:
            break
    return frame
