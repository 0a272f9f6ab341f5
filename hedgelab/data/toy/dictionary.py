"""Dictionaries that a config names: more directions than dimensions, made as orthogonal as a few steps can make them."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from hedgelab.errors import positive, whole_number

_COLUMNS = 128


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
