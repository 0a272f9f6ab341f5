"""A population: finitely many activations with their probabilities, on which every expectation is exact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hedgelab.batch import Batch
from hedgelab.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Population:
    """The support of a distribution of activations.

    Attributes:
        states: Activations, ``[s, d_in]``.
        probabilities: Their probabilities, ``[s]``, all positive, summing to 1.
    """

    states: Array
    probabilities: Array

    @classmethod
    def from_batch(cls, batch: Batch) -> Population:
        """The population behind a weighted batch; states of probability 0 are left out.

        Raises:
            UserError: The batch has no weights.
        """
        if batch.weight is None:
            raise UserError("data.sampling: closed forms need the whole population, set it to 'population'")
        possible = batch.weight > 0
        weight = batch.weight[possible].double()
        return cls(batch.x[possible].double().numpy(), (weight / weight.sum()).numpy())

    @classmethod
    def of_pair(cls, rate: float, given: float, otherwise: float) -> Population:
        """Two orthonormal features of magnitude 1 in the plane, by ``P(f0)``, ``P(f1 | f0)`` and ``P(f1 | not f0)``.

        >>> Population.of_pair(0.25, 0.2, 0.0).probabilities  # both, f0 alone, neither
        array([0.05, 0.2 , 0.75])

        Raises:
            UserError: A number that is no probability.
        """
        for name, value in (("rate", rate), ("given", given), ("otherwise", otherwise)):
            if not 0 <= value <= 1:
                raise UserError(f"{name}: must be a probability between 0 and 1, got {value}")
        first, second = np.array([rate, 1 - rate]), np.array([[given, 1 - given], [otherwise, 1 - otherwise]])
        probabilities = (first[:, None] * second).ravel()
        states = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        possible = probabilities > 0
        return cls(states[possible], probabilities[possible])

    @cached_property
    def mean(self) -> Array:
        """``[d_in]``."""
        return np.asarray(self.probabilities @ self.states)

    @cached_property
    def covariance(self) -> Array:
        """``[d_in, d_in]``."""
        return scatter(self.states, self.probabilities)


def scatter(states: Array, probabilities: Array) -> Array:
    """Covariance of states whose probabilities need not sum to 1, times their sum, ``[d_in, d_in]``."""
    deviations = states - probabilities @ states / probabilities.sum()
    return np.asarray(deviations.T @ (probabilities[:, None] * deviations))
