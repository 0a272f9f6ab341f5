"""Dictionaries: the unit directions along which a toy's features lie, orthonormal, correlated, or such as a config names."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from hedgelab.errors import UserError, positive, whole_number

_COLUMNS, _MAX_ITERATIONS, _NORM_TOLERANCE = 128, 500, 1e-9


class Dictionary(ABC):
    """How a toy's unit directions are chosen."""

    @abstractmethod
    def directions(self, n: int, d_in: int, generator: torch.Generator) -> Tensor:
        """Unit directions of n features, float64 ``[n, d_in]``; a pure function of the generator's state."""


class Orthogonalised(Dictionary):
    """Random unit vectors, pushed apart by Adam on ``sum_{i != j} (e_i . e_j)^2 + n sum_i (|e_i|^2 - 1)^2``, then normalised.

    The dictionary of SynthSAEBench (Chanin & Garriga-Alonso 2026, arXiv 2602.14687), there with 100 steps at 3e-4: of 16 384
    directions in 768 dimensions each then has a largest |cosine| of about .15. The squared cosines of all pairs sum to
    ``|E^T E|_F^2``, so a step costs ``4 n d_in^2`` operations and no ``n x n`` matrix. Steps are float32.

    >>> e = Orthogonalised(steps=200, lr=0.01).directions(8, 16, torch.Generator().manual_seed(0))
    >>> round(float((e @ e.T - torch.eye(8)).abs().max()), 2)
    0.0

    Args:
        steps: Steps of Adam; 0 leaves the random vectors as they are.
        lr: Learning rate of Adam.
    """

    def __init__(self, steps: int = 100, lr: float = 3e-4) -> None:
        self.steps = whole_number("data.dictionary.steps", steps, 0)
        self.lr = positive("data.dictionary.lr", lr)

    def directions(self, n: int, d_in: int, generator: torch.Generator) -> Tensor:
        """Unit directions, float64 ``[n, d_in]``."""
        start = normalize(torch.randn(n, d_in, generator=generator, dtype=torch.float64), dim=1)
        if self.steps == 0:
            return start
        return normalize(orthogonalised(start.float(), self.steps, self.lr).double(), dim=1)


def orthogonalised(start: Tensor, steps: int, lr: float) -> Tensor:
    """The vectors ``[n, d_in]`` after some steps of Adam on :func:`overlap_gradient`; not normalised."""
    vectors = start.clone()
    optimizer = torch.optim.Adam([vectors], lr=lr, fused=True)
    for _ in tqdm(range(steps), "dictionary", leave=False, delay=3):
        vectors.grad = overlap_gradient(vectors)
        optimizer.step()
    return vectors


def overlap_gradient(vectors: Tensor) -> Tensor:
    """Gradient of :class:`Orthogonalised`'s objective, ``4 E E^T E + 4 (n (|e_i|^2 - 1) - |e_i|^2) e_i``, ``[n, d_in]``.

    >>> overlap_gradient(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).tolist()
    [[4.0, 0.0], [4.0, 0.0]]
    """
    squares = torch.linalg.vector_norm(vectors, dim=1, keepdim=True).square()
    own = vectors * (len(vectors) * (squares - 1) - squares)
    return torch.addmm(own, vectors, _gram(vectors), beta=4, alpha=4)


def _gram(vectors: Tensor) -> Tensor:
    """``E^T E`` by blocks of columns. It is symmetric: blocks below the diagonal are copied, which saves a third."""
    width = vectors.shape[1]
    gram = vectors.new_empty(width, width)
    for first in range(0, width, _COLUMNS):
        last = min(first + _COLUMNS, width)
        torch.mm(vectors[:, first:last].T, vectors[:, first:], out=gram[first:last, first:])
        gram[last:, first:last] = gram[first:last, last:].T
    return gram


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
        possible = f"at least {lowest:.4g} (for {n} features in {d_in} dimensions) and below 1"
        raise UserError(f"data.target_cosine: must be {possible}, got {target_cosine}")
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
    """A unit-norm tight frame ``[n, d_in]``, ``n >= d_in``, near random ones: by turns tight and normed (Tropp et al. 2005)."""
    frame = normalize(torch.randn(n, d_in, generator=generator, dtype=torch.float64), dim=1)
    for _ in range(_MAX_ITERATIONS):
        values, vectors = torch.linalg.eigh(frame.T @ frame)  # the nearest tight frame is a polar factor: never n x n
        frame = frame @ ((n / d_in / values).sqrt() * vectors @ vectors.T)
        norms = frame.norm(dim=1, keepdim=True)
        frame = frame / norms
        if float((norms - 1).abs().max()) < _NORM_TOLERANCE:
            break
    return frame
