"""Directions along which features are planted: as loud as chance, as the activations are, or at a chosen angle to them."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.data.toy.dictionary import orthonormal_features
from hedgelab.errors import UserError, whole_number


class Directions(ABC):
    """How unit directions are chosen for planted features."""

    @abstractmethod
    def choose(self, n: int, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Unit directions of n features among activations like ``rows [examples, d_in]``, float64 ``[n, d_in]``."""


class RandomDirections(Directions):
    """Orthonormal directions in a uniformly random orientation, at most d_in of them."""

    def choose(self, n: int, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Unit directions, float64 ``[n, d_in]``."""
        return orthonormal_features(n, rows.shape[1], generator)


class MatchedDirections(Directions):
    """Directions of random draws with the activations' own covariance C: ``C^½ g / |C^½ g|``, g standard normal.

    Random orthonormal directions are quieter than the data, which lies in a few loud ones; these are as loud as it is.
    """

    def choose(self, n: int, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Unit directions, float64 ``[n, d_in]``."""
        values, vectors = _spectrum(rows)
        draws = torch.randn(n, len(values), generator=generator, dtype=torch.float64)
        return normalize((draws * values.clamp_min(0).sqrt()) @ vectors.t(), dim=1)


class PrincipalDirections(Directions):
    """Directions at one cosine with the principal subspace: ``cos · a + √(1 - cos²) · b``, a random in it and b outside it.

    Args:
        cosine: Cosine of each direction with the subspace, from 0 to 1.
        rank: Dimension of the subspace: so many principal components of the activations.
    """

    def __init__(self, cosine: float, rank: int = 32) -> None:
        if not 0 <= cosine <= 1:
            raise UserError(f"data.directions.cosine: must be from 0 to 1, got {cosine}")
        self.cosine, self.rank = cosine, whole_number("data.directions.rank", rank)

    def choose(self, n: int, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Unit directions, float64 ``[n, d_in]``."""
        d_in = rows.shape[1]
        if not self.rank < d_in:
            raise UserError(f"data.directions.rank: must be below d_in = {d_in}, got {self.rank}")
        vectors = _spectrum(rows)[1].flip(1)  # the largest first
        draws = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
        inside, outside = (normalize(part, dim=1) for part in draws.tensor_split([self.rank], dim=1))
        sine = (1 - self.cosine**2) ** 0.5
        return torch.cat([self.cosine * inside, sine * outside], dim=1) @ vectors.t()


def _spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors (columns) of the covariance of activations."""
    centred = rows.double() - rows.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.t() @ centred / len(rows))
    return values, vectors
