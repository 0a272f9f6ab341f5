"""Optimisers and schedules of SAEs: made fused where that is faster, and refused early where they cannot work."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from hedgelab.errors import UserError, one_line, whole_number
from hedgelab.training.trainee import OptimizerFactory, SchedulerFactory

_REFUSED: dict[type, str] = {
    LBFGS: "evaluates the loss several times a step; use Adam, AdamW or SGD",
    SparseAdam: "takes sparse gradients, and those of SAEs are dense; use Adam",
    ReduceLROnPlateau: "follows a metric, and SAEs' schedules follow steps; use CosineAnnealingLR, LinearLR or others",
}


def lr_factors(module: nn.Module) -> dict[str, float]:
    """Parameters whose learning rate is a multiple of the optimiser's, by full name: what ``lr_factors`` of classes say."""
    return {
        f"{path}.{name}".lstrip("."): factor
        for path, part in module.named_modules()
        for name, factor in getattr(type(part), "lr_factors", {}).items()
    }


def make_optimizer(
    factory: OptimizerFactory, parameters: Iterable[Any], fused: bool = True, factors: Iterable[tuple[Any, float]] = ()
) -> Optimizer:
    """The optimiser of some parameters, fused where its factory leaves that open and ``fused`` allows it.

    Parameters with a factor get a group of their own, behind the others, whose learning rate is that many times as large.
    """
    optimizer: Optimizer = _made("model.optimizer", factory, parameters)
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("foreach"):
            raise UserError("model.optimizer: fused and foreach exclude each other; set one of them")
        if fused and "fused" in group and group["fused"] is None and not group.get("foreach"):
            group["fused"] = True
    for parameter, factor in factors:
        first = optimizer.param_groups[0]
        first["params"] = [one for one in first["params"] if one is not parameter]
        optimizer.add_param_group({**first, "params": [parameter], "lr": factor * first["lr"]})
    return optimizer


def make_schedule(factory: SchedulerFactory, optimizer: Optimizer, max_steps: int = -1) -> LRScheduler:
    """The learning-rate schedule of an optimiser, stepped once an optimiser step; ``max_steps`` of -1 is unknown."""
    schedule: LRScheduler = _made("model.lr_scheduler", factory, optimizer)
    if isinstance(schedule, OneCycleLR) and schedule.total_steps < max_steps:
        ends = f"OneCycleLR ends after {schedule.total_steps} steps, the run after {max_steps}"
        raise UserError(f"model.lr_scheduler: {ends}; set model.lr_scheduler.total_steps to {max_steps}")
    return schedule


def _made(key: str, factory: Callable[[Any], Any], argument: Any) -> Any:
    try:
        made = factory(argument)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{key}: {one_line(str(error))}") from error
    for kind, reason in _REFUSED.items():
        if isinstance(made, kind):
            raise UserError(f"{key}: {kind.__name__} {reason}")
    return made


class LateDecay(LRScheduler):
    """A constant rate that falls linearly to zero over the last steps: ``lr · min(1, (total_steps - step) / decay_steps)``.

    Args:
        optimizer: Whose rates it sets.
        total_steps: Step at which the rate is zero, the run's ``trainer.max_steps``.
        decay_steps: Steps over which it falls.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    >>> schedule, rates = LateDecay(optimizer, total_steps=4, decay_steps=2), []
    >>> for _ in range(4):
    ...     rates += schedule.get_last_lr()
    ...     optimizer.step()
    ...     schedule.step()
    >>> rates
    [0.5, 0.5, 0.5, 0.25]
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, decay_steps: int) -> None:
        self.total_steps = whole_number("model.lr_scheduler.total_steps", total_steps)
        self.decay_steps = whole_number("model.lr_scheduler.decay_steps", decay_steps)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the step to come."""
        share = min(1.0, max(0, self.total_steps - self.last_epoch) / self.decay_steps)
        return [share * rate for rate in self.base_lrs]


class MemberOptimizers(Optimizer):
    """The optimisers of several SAEs, and the schedules of those that have one, by name, stepping as one.

    Lightning counts a step for every optimiser that steps; this one keeps ``global_step`` the number of batches.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], schedules: Mapping[str, LRScheduler]) -> None:
        self.parts: dict[str, dict[str, Any]] = {"optimizers": dict(optimizers), "schedules": dict(schedules)}
        groups = self._groups()
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self.param_groups = groups  # the very groups whose learning rates the schedules set

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.parts["optimizers"].values() for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every optimiser, then its schedule."""
        result = None if closure is None else closure()
        for part in self.parts.values():
            for one in part.values():
                one.step()
        return result

    def state_dict(self) -> dict[str, Any]:
        """States of all optimisers and schedules, by member."""
        return {part: {name: one.state_dict() for name, one in own.items()} for part, own in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved states."""
        for part, own in self.parts.items():
            for name, one in own.items():
                one.load_state_dict(state_dict[part][name])
        self.param_groups = self._groups()
