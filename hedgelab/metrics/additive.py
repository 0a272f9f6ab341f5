"""The base of every metric here: float64 sums that add up over batches and over ranks."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
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
        self.result_shapes: list[torch.Size] = []

    def add_sum(self, name: str, *shape: int) -> None:
        """Declare a state: zeros of the given shape, summed over ranks."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add_to(self, **amounts: Tensor) -> None:
        """Add the sums of a batch to the states of those names, in place: some are large."""
        for name, amount in amounts.items():
            getattr(self, name).add_(amount)

    def _wrap_compute(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        """Undo torchmetrics' squeezing of one-element results, which takes an SAE of one latent its dimension."""

        def recording() -> Any:
            value = compute()
            self.result_shapes = []
            apply_to_collection(value, Tensor, lambda tensor: self.result_shapes.append(tensor.shape))
            return value

        squeezing = super()._wrap_compute(wraps(compute)(recording))

        @wraps(compute)
        def restored() -> Any:
            value, shapes = squeezing(), iter(self.result_shapes)
            return apply_to_collection(value, Tensor, lambda tensor: tensor.reshape(next(shapes)))

        return restored
