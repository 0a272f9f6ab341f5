"""Optimisers and schedules of SAEs: made fused where that is faster, and refused early where they cannot work."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from hedgelab.errors import UserError, one_line
from hedgelab.training.trainee import OptimizerFactory, SchedulerFactory

_REFUSED: dict[type, str] = {
    LBFGS: "evaluates the loss several times a step; use Adam, AdamW or SGD",
    SparseAdam: "takes sparse gradients, and those of SAEs are dense; use Adam",
    ReduceLROnPlateau: "follows a metric, and SAEs' schedules follow steps; use CosineAnnealingLR, LinearLR or others",
}


def make_optimizer(factory: OptimizerFactory, parameters: Iterable[Any], fused: bool = True) -> Optimizer:
    """The optimiser of some parameters, fused where its factory leaves that open and ``fused`` allows it."""
    optimizer: Optimizer = _made("model.optimizer", factory, parameters)
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("foreach"):
            raise UserError("model.optimizer: fused and foreach exclude each other; set one of them")
        if fused and "fused" in group and group["fused"] is None and not group.get("foreach"):
            group["fused"] = True
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
