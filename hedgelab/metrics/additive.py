"""The base of every metric here: float64 sums that add up over batches and over ranks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class AdditiveMetric(Metric):
    """A metric whose states are sums, so that it is the same on one rank or many.

    ``update`` takes an optional ``weight [batch]``: the probability of each example (population mode). Without it each
    example weighs 1. The states are not part of a ``state_dict``, and stay float64 whatever precision the module gets.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def add_sum(self, name: str, *shape: int) -> None:
        """Declare a state: zeros of the given shape, summed over ranks."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add_to(self, **amounts: Tensor) -> None:
        """Add the sums of a batch to the states of those names, in place: some are large."""
        for name, amount in amounts.items():
            getattr(self, name).add_(amount)
