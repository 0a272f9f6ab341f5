"""Laws: one number for each of n features (rates, magnitudes, spreads) from two or three numbers."""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from hedgelab.errors import UserError, positive, whole_number


class Law(ABC):
    """A number for each feature, by its place; feature 0 comes first."""

    @abstractmethod
    def values(self, n: int) -> Tensor:
        """The numbers of n features, float64 ``[n]``."""


def per_feature(key: str, value: float | list[float] | Law, n: int, dtype: torch.dtype, or_zero: bool = False) -> Tensor:
    """A law, a list, or one number for all, as ``[n]`` finite numbers above 0 (``or_zero``: at least 0)."""
    given = value.values(n) if isinstance(value, Law) else torch.tensor(value, dtype=torch.float64)
    if given.dim() and len(given) != n:
        raise UserError(f"{key}: expected one number or a list of {n}, one a feature, got {len(given)}")
    numbers = given.to(dtype).expand(n).contiguous()
    possible = numbers.isfinite() & (numbers >= 0 if or_zero else numbers > 0)
    if not bool(possible.all()):
        expected = "at least 0" if or_zero else "positive"
        raise UserError(f"{key}: must be {expected} and finite, got {float(numbers[~possible][0])}")
    return numbers


class Zipf(Law):
    """Zipf's law: ``(i + 1)^-exponent``, brought into a range or to a sum.

    With ``smallest``, values run from ``largest`` to it, affine in ``(i + 1)^-exponent`` (as SAELens' Zipfian probabilities);
    with ``total``, they are ``min(largest, c (i + 1)^-exponent)``, whose c makes them add up to it; else ``c = largest``.

    >>> Zipf(exponent=1.0, largest=0.6).values(3).tolist()
    [0.6, 0.3, 0.19999999999999998]
    >>> [round(value, 12) for value in Zipf(exponent=1.0, largest=0.5, smallest=0.1).values(3).tolist()]
    [0.5, 0.2, 0.1]

    Args:
        exponent: How steeply values fall; 0 gives all the same.
        largest: The first value, or a ceiling to all where ``total`` is given.
        smallest: The last value.
        total: Sum of all values.
    """

    def __init__(
        self, exponent: float = 1.0, largest: float = 0.5, smallest: float | None = None, total: float | None = None
    ) -> None:
        if not 0 <= exponent < math.inf:
            raise UserError(f"Zipf.exponent: must be at least 0 and finite, got {exponent}")
        if smallest is not None and total is not None:
            raise UserError("Zipf.smallest: give it or total, not both")
        if smallest is not None and not (0 < smallest < largest and exponent > 0):
            possible = f"above 0, below largest = {largest} (exponent above 0)"
            raise UserError(f"Zipf.smallest: must be {possible}, got {smallest}")
        self.exponent, self.largest = exponent, positive("Zipf.largest", largest)
        self.smallest, self.total = smallest, total

    def values(self, n: int) -> Tensor:
        """Falling numbers, ``[n]``."""
        law = torch.arange(1, n + 1, dtype=torch.float64) ** -self.exponent
        if float(law[-1]) * self.largest < 1e-300:
            raise UserError(f"Zipf.exponent: {self.exponent} gives feature {n - 1} a value of zero; lower it")
        if self.smallest is not None:
            share = (law - law[-1]) / (law[0] - law[-1]) if n > 1 else law
            return self.smallest + (self.largest - self.smallest) * share
        if self.total is None:
            return self.largest * law
        if not 0 < self.total < n * self.largest:
            ceiling = f"n * largest = {n * self.largest:.6g}"
            raise UserError(f"Zipf.total: must be above 0, below {ceiling}, got {self.total}")
        from scipy.optimize import brentq  # late: scipy is slow to import

        def excess(log_c: float) -> float:
            return float(np.minimum(self.largest, math.exp(log_c) * law.numpy()).sum() - self.total)

        low, high = math.log(self.total / n) - 1, math.log(self.largest / float(law[-1]))
        return (math.exp(brentq(excess, low, high)) * law).clamp(max=self.largest)


class Linear(Law):
    """From ``start`` to ``end`` in equal steps.

    >>> Linear(5, 4).values(3).tolist()
    [5.0, 4.5, 4.0]

    Args:
        start: Value of the first feature.
        end: Value of the last.
    """

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = positive("Linear.start", start, True), positive("Linear.end", end, True)

    def values(self, n: int) -> Tensor:
        """Equally spaced numbers, ``[n]``."""
        return torch.linspace(self.start, self.end, n, dtype=torch.float64)


class Exponential(Law):
    """From ``start`` to ``end`` by equal factors.

    >>> [round(value, 12) for value in Exponential(8, 2).values(3).tolist()]
    [8.0, 4.0, 2.0]

    Args:
        start: Value of the first feature.
        end: Value of the last.
    """

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = positive("Exponential.start", start), positive("Exponential.end", end)

    def values(self, n: int) -> Tensor:
        """Geometrically spaced numbers, ``[n]``."""
        return self.start * (self.end / self.start) ** torch.linspace(0, 1, n, dtype=torch.float64)


class FoldedNormal(Law):
    """Each feature's own draw of ``|N(mean, std^2)|``, the same whenever asked for.

    Args:
        mean: Mean of the normal distribution.
        std: Its standard deviation.
        seed: Seed of the draws; part of the toy's definition, apart from the run's seed.
    """

    def __init__(self, mean: float = 0.5, std: float = 0.5, seed: int = 0) -> None:
        self.mean, self.std = mean, positive("FoldedNormal.std", std, True)
        self.seed = whole_number("FoldedNormal.seed", seed, 0)

    def values(self, n: int) -> Tensor:
        """Independent draws, ``[n]``."""
        draws = torch.randn(n, generator=torch.Generator().manual_seed(self.seed))  # as SAELens', of its seed
        return (self.mean + self.std * draws.double()).abs()
