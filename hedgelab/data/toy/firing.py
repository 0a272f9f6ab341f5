"""Which features fire together: the contract of every firing distribution, and the independent one."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes, row_pointers

MAX_ENUMERABLE = 16
SPARSE_FEATURES = 128
"""Activations of more features than this are sparse: from about here on a gather of what fires beats a dense product."""


def check_probability(key: str, value: float) -> float:
    """The value if it is a probability; a UserError naming the key if not."""
    if isinstance(value, bool) or not 0 <= value <= 1:  # also catches NaN
        raise UserError(f"{key}: must be a probability between 0 and 1, got {value}")
    return value


def all_patterns(n: int) -> Tensor:
    """Every firing pattern of n features, bool ``[2**n, n]``: row number r has feature i firing where bit i of r is."""
    return (torch.arange(2**n)[:, None] >> torch.arange(n)) % 2 == 1


def pattern_numbers(states: Tensor) -> Tensor:
    """The row of :func:`all_patterns` that each state ``[count, n]`` is, int64 ``[count]``."""
    return (states.long() << torch.arange(states.shape[1])).sum(1)


def true_positions(states: Tensor) -> Tensor:
    """Where states are true, counted along their rows, int64."""
    if states.is_cuda:
        return states.flatten().nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(states.numpy()))  # several times as fast as nonzero of torch


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """Magnitudes ``relu(mean + std * noise)`` of firing features; ``mean`` and ``std``: ``[n]``, of one dtype."""

    mean: Tensor
    std: Tensor

    @cached_property
    def noisy(self) -> bool:
        """Whether any magnitude varies."""
        return bool(self.std.any())

    def draw(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """A magnitude for each of the firing ``features``."""
        values = self.mean[features]
        if not self.noisy:
            return values
        noise = torch.randn(len(features), generator=generator, dtype=values.dtype, device=values.device)
        return (values + self.std[features] * noise).relu_()


class Firing(ABC):
    """A distribution over firing patterns ``z`` in ``{0, 1}^n``; ``n`` (an attribute or a property) counts features."""

    n: int

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent firing patterns, bool ``[count, n]``."""

    def activations(self, count: int, generator: torch.Generator, magnitudes: Magnitudes) -> Tensor | Codes:
        """True activations ``[count, n]``: magnitudes of what fires. Codes of more than 128 features, else a tensor."""
        states = self.sample(count, generator)
        if self.n <= SPARSE_FEATURES and not magnitudes.noisy:
            return torch.where(states, magnitudes.mean, 0.0)
        firing = true_positions(states)
        feature = firing % self.n
        values = magnitudes.draw(feature, generator)
        codes = Codes.from_csr(row_pointers(firing // self.n, count), feature, values, self.n)
        return codes if self.n > SPARSE_FEATURES else codes.to_dense()

    @property
    def parents(self) -> Tensor | None:
        """Parent of each feature, int64 ``[n]``, -1 for features without one; None where there is no such structure."""
        return None

    @property
    def stored_per_example(self) -> float:
        """How many numbers an example takes up while activations are drawn."""
        return self.n

    def enumerate(self) -> tuple[Tensor, Tensor]:
        """Every pattern of positive probability, bool ``[m, n]``, and its probability, float64 ``[m]``, in sum 1."""
        if self.n > MAX_ENUMERABLE:
            most = f"'population' enumerates at most {MAX_ENUMERABLE} features, this firing has {self.n}"
            raise UserError(f"data.sampling: {most}; use 'samples'")
        probabilities = self.pattern_probabilities()
        possible = probabilities > 0
        kept = probabilities[possible]
        return all_patterns(self.n)[possible], kept / kept.sum()

    def pattern_probabilities(self) -> Tensor:
        """Probability of each row of :func:`all_patterns`, float64 ``[2**n]``; only for few features."""
        raise UserError(f"data.sampling: {type(self).__name__} cannot be enumerated for 'population'; use 'samples'")

    def rates(self) -> Tensor | None:
        """Probability that each feature fires, float64 ``[n]``; None where it is not known in closed form."""
        try:
            states, probabilities = self.enumerate()
        except UserError:
            return None
        return probabilities @ states.double()

    def magnitudes(self) -> Tensor | None:
        """Firing magnitudes that come with the firing, ``[n]``; None where it has none of its own."""
        return None

    def magnitude_spreads(self) -> Tensor | None:
        """Standard deviations of magnitudes that come with the firing, ``[n]``; None where it has none of its own."""
        return None


class IndependentFiring(Firing):
    """Every feature fires by itself.

    Args:
        probabilities: Probability that each feature fires.
    """

    def __init__(self, probabilities: list[float]) -> None:
        if not probabilities:
            raise UserError("data.firing.probabilities: needs at least one feature")
        for i, probability in enumerate(probabilities):
            check_probability(f"data.firing.probabilities[{i}]", probability)
        self.n, self._rates = len(probabilities), torch.tensor(probabilities, dtype=torch.float64)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent firing patterns, bool ``[count, n]``."""
        return torch.rand(count, self.n, generator=generator) < self._rates.float()

    def pattern_probabilities(self) -> Tensor:
        """Probability of each pattern: the product over features, ``[2**n]``."""
        return torch.where(all_patterns(self.n), self._rates, 1 - self._rates).prod(1)

    def rates(self) -> Tensor:
        """Probability that each feature fires, ``[n]``."""
        return self._rates.clone()
