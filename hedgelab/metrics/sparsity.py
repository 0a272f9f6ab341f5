"""L0, dead latents and firing densities, accumulated over batches of codes."""

from typing import Any, NamedTuple

from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.additive import AdditiveMetric
from hedgelab.metrics.functional.sparsity import (
    LOG_DENSITY_EDGES,
    DensityHistogram,
    density_histogram,
    firing_update,
    l0_update,
)


class DeadCount(NamedTuple):
    """Latents that fired on no example seen.

    Attributes:
        number: How many, int64 scalar.
        fraction: Of all latents, float64 scalar.
    """

    number: Tensor
    fraction: Tensor


class FiringDensities(NamedTuple):
    """How often latents fire.

    Attributes:
        rates: Fraction of examples each latent fires on, ``[d_sae]``.
        histogram: Latents by log10 of that rate.
    """

    rates: Tensor
    histogram: DensityHistogram


class L0(AdditiveMetric):
    """Mean number of active latents an example."""

    higher_is_better = None
    active: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("active")
        self.add_sum("weight")

    def update(self, codes: Tensor | Codes, weight: Tensor | None = None) -> None:
        """Add a batch of codes; ``weight``: ``[batch]``."""
        active, count = l0_update(codes, weight)
        self.add_to(active=active, weight=count)

    def compute(self) -> Tensor:
        """Mean over everything seen, a float64 scalar."""
        return self.active / self.weight


class FiringRates(AdditiveMetric):
    """What :class:`DeadLatents` and :class:`FiringDensity` share: the weight of examples each latent fires on.

    Args:
        d_sae: Number of latents.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better: bool | None = None
    fired: Tensor
    weight: Tensor

    def __init__(self, d_sae: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("fired", d_sae)
        self.add_sum("weight")

    def update(self, codes: Tensor | Codes, weight: Tensor | None = None) -> None:
        """Add a batch of codes; ``weight``: ``[batch]``."""
        fired, count = firing_update(codes, weight)
        self.add_to(fired=fired, weight=count)


class DeadLatents(FiringRates):
    """Count and fraction of latents that fired on no example seen."""

    higher_is_better = False

    def compute(self) -> DeadCount:
        """Dead latents over everything seen."""
        dead = self.fired == 0
        return DeadCount(dead.sum(), dead.double().mean())


class FiringDensity(FiringRates):
    """Firing rate of each latent, and their histogram.

    Args:
        d_sae: Number of latents.
        edges: Ascending edges of the histogram's bins, in log10 of the rate.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    def __init__(self, d_sae: int, edges: tuple[float, ...] = LOG_DENSITY_EDGES, **kwargs: Any) -> None:
        super().__init__(d_sae, **kwargs)
        self.edges = edges

    def compute(self) -> FiringDensities:
        """Rates and histogram over everything seen."""
        rates = self.fired / self.weight
        return FiringDensities(rates, density_histogram(rates, self.edges))
