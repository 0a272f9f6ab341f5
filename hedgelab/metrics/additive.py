"""The base of every metric here: float64 sums that add up over batches and over ranks."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.metadata import entry_points
from typing import Any, ClassVar, Self

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from hedgelab.metrics.functional.accumulate import NO_FLOAT64
from hedgelab.tracking.glossary import GROUP


class ShapedMetric(Metric):
    """A metric whose results keep their shapes: torchmetrics squeezes ``[1]``, all that an SAE of one latent has.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.result_shapes: list[torch.Size] = []

    def _wrap_compute(self, compute: Callable[[], Any]) -> Callable[[], Any]:
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


class AdditiveMetric(ShapedMetric):
    """A metric whose states are sums, so that it is the same on one rank or many.

    ``update`` takes an optional ``weight [batch]``: the probability of each example (population mode). Without it each
    example weighs 1. The states are not part of a ``state_dict``, stay float64 whatever precision the module gets, and stay on
    the CPU where the module's device has no float64 (MPS).

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Declare a state: zeros of the given shape, summed over ranks."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def add_to(self, **amounts: Tensor) -> None:
        """Add the sums of a batch to the states of those names, in place: some are large."""
        for name, amount in amounts.items():
            state = getattr(self, name)
            state.add_(amount.to(state.device))

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Self:
        if fn(torch.zeros(1)).device.type in NO_FLOAT64:
            self._computed, exclude_state = None, tuple(self._defaults)
        super()._apply(fn, exclude_state)
        return self


class ValidationMetric(AdditiveMetric):
    """A metric of one's own, which every validation pass reports beside the others.

    A subclass that gives itself a ``name`` is known from when it is imported: by an entry point of the group
    ``hedgelab.metrics``, or because a config names it. It declares its sums in ``__init__`` (:meth:`add_sum`), adds to them in
    ``update`` and returns a scalar, or scalars by name (logged as ``name/...``), from ``compute``.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    name: ClassVar[str] = ""
    declared: ClassVar[dict[str, type["ValidationMetric"]]] = {}

    def __init__(self, d_in: int, d_sae: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.d_in, self.d_sae = d_in, d_sae

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("name"):
            ValidationMetric.declared[cls.name] = cls

    @classmethod
    def known(cls) -> list[type["ValidationMetric"]]:
        """Those that have been imported, and those of entry points."""
        for point in entry_points(group=GROUP):
            point.load()
        return list(cls.declared.values())

    def results(self) -> dict[str, Tensor]:
        """What is logged, by name."""
        value = self.compute()
        if isinstance(value, Mapping):
            return {f"{self.name}/{key}": number for key, number in value.items()}
        return {self.name: value}
