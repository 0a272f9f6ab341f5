"""The bases of every metric here: float64 sums that add up over batches and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.metadata import entry_points
from inspect import signature
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from hedgelab.metrics.functional.accumulate import NO_FLOAT64
from hedgelab.tracking.glossary import GROUP


class ShapedMetric(Metric):
    """A metric whose results keep their shapes: torchmetrics squeezes ``[1]``, all that an SAE of one latent has."""

    is_differentiable = False
    full_state_update = False

    def _wrap_compute(self, compute: Callable[[], Any]) -> Callable[[], Any]:
        @wraps(compute)
        def boxed() -> SimpleNamespace:  # which torchmetrics does not look into; copies, as it makes them of states
            return SimpleNamespace(value=apply_to_collection(compute(), Tensor, Tensor.clone))

        computed = super()._wrap_compute(boxed)
        return wraps(compute)(lambda: computed().value)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Self:
        self._computed = None
        super()._apply(fn, exclude_state)
        return self


class AdditiveMetric(ShapedMetric):
    """A metric whose states are sums, so that it is the same on one rank or many.

    ``update`` takes an optional ``weight [batch]``: the probability of each example (population mode). Without it each
    example weighs 1. The states are not part of a ``state_dict``, stay float64 whatever precision the module gets, and stay on
    the CPU where the module's device has no float64 (MPS).
    """

    def add_sum(self, name: str, *shape: int) -> None:
        """Declare a state: zeros of the given shape in float64, summed over ranks."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add_to(self, **amounts: Tensor | float) -> None:
        """Add the sums of a batch to the states of those names, in place: some are large."""
        for name, amount in amounts.items():
            state = getattr(self, name)
            state.add_(torch.as_tensor(amount, device=state.device))

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Self:
        on_cpu = fn(torch.zeros(1)).device.type in NO_FLOAT64
        return super()._apply(fn, tuple(self._defaults) if on_cpu else exclude_state)


class FunctionMetric(AdditiveMetric):
    """A metric made of two pure functions.

    ``sums_of`` takes what ``update`` takes, ``weight`` last, and returns the sums of a batch in a NamedTuple; ``result_of``
    makes the result of all sums, None leaves them as they are. ``empty`` is a batch without examples: its sums are the first
    states.
    """

    def __init__(
        self, sums_of: Callable[..., Any], result_of: Callable[[Any], Any] | None, *empty: Tensor, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.sums_of, self.result_of = sums_of, result_of
        zero = sums_of(*empty, torch.zeros(0))
        self.sums = type(zero)
        for name, value in zero._asdict().items():
            self.add_state(name, value.clone(), dist_reduce_fx="sum")

    def update(self, *batch: Any, **named: Any) -> None:
        """Add a batch; arguments as the function of sums takes them."""
        self.add_to(**self.sums_of(*batch, **named)._asdict())

    def _filter_kwargs(self, **kwargs: Any) -> dict[str, Any]:  # what a MetricCollection passes on
        return {name: kwargs[name] for name in signature(self.sums_of).parameters if name in kwargs}

    def compute(self) -> Any:
        """The result over everything seen."""
        sums = self.sums(*(getattr(self, name) for name in self.sums._fields))
        return sums if self.result_of is None else self.result_of(sums)


class ValidationMetric(AdditiveMetric):
    """A metric of one's own, which every validation pass reports beside the others.

    A subclass that gives itself a ``name`` is known from when it is imported: by an entry point of the group
    ``hedgelab.metrics``, or because a config names it. It declares its sums in ``__init__`` (:meth:`add_sum`), adds to them in
    ``update(batch, x_hat, codes)`` and returns a scalar, or scalars by name (logged as ``name/...``), from ``compute``.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    name: ClassVar[str] = ""
    declared: ClassVar[dict[str, type[ValidationMetric]]] = {}

    def __init__(self, d_in: int, d_sae: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.d_in, self.d_sae = d_in, d_sae

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("name"):
            ValidationMetric.declared[cls.name] = cls

    @classmethod
    def known(cls) -> list[type[ValidationMetric]]:
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
