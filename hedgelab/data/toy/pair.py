"""Two features of given rates and given correlation."""

from __future__ import annotations

import math

from hedgelab.data.toy.conditional import ConditionalFiring
from hedgelab.data.toy.firing import check_probability
from hedgelab.errors import UserError


class CorrelatedPair(ConditionalFiring):
    """Two features whose rates stay fixed while their correlation varies.

    Args:
        rates: P(f0) and P(f1), both between 0 and 1 (exclusive).
        correlation: Pearson's correlation of the two firings, ``Cov / sqrt(Var f0 · Var f1)``.

    Raises:
        UserError: Impossible rates, or a correlation that two features of these rates cannot have.
    """

    def __init__(self, rates: list[float], correlation: float) -> None:
        if len(rates) != 2:
            raise UserError(f"data.firing.rates: expected two probabilities, got {len(rates)}")
        for i, rate in enumerate(rates):
            check_probability(f"data.firing.rates[{i}]", rate)
            if rate in (0, 1):
                raise UserError(f"data.firing.rates[{i}]: must lie between 0 and 1 for a correlation, got {rate}")
        first, second = rates
        deviations = math.sqrt(first * (1 - first) * second * (1 - second))
        low = (max(0.0, first + second - 1) - first * second) / deviations
        high = (min(first, second) - first * second) / deviations
        if not low - 1e-12 <= correlation <= high + 1e-12:
            raise UserError(
                f"data.firing.correlation: features of rates {first:g} and {second:g} have correlations between "
                f"{low:.4g} and {high:.4g}, got {correlation:g}"
            )
        both = first * second + correlation * deviations
        given, otherwise = (min(1.0, max(0.0, p)) for p in (both / first, (second - both) / (1 - first)))
        super().__init__([first, {"f0": given, "not f0": otherwise}])
