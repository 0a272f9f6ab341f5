"""Optimisers and schedules of SAEs: made fused where that is faster, and refused early where they cannot work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from hedgelab.errors import UserError
from hedgelab.training.trainee import OptimizerFactory, SchedulerFactory


def make_optimizer(factory: OptimizerFactory, parameters: Iterable[Any], fused: bool = True) -> Optimizer:
    """The optimiser of some parameters, fused unless told otherwise.

    Args:
        factory: Makes it.
        parameters: What it updates.
        fused: Whether to use the fused implementation where the factory leaves that open.

    Raises:
        UserError: It refuses its arguments, or cannot train an SAE.
    """
    try:
        optimizer = factory(parameters)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"model.optimizer: {' '.join(str(error).split())}") from error
    if isinstance(optimizer, LBFGS):
        raise UserError("model.optimizer: LBFGS evaluates the loss several times a step; use Adam, AdamW or SGD")
    if isinstance(optimizer, SparseAdam):
        raise UserError("model.optimizer: SparseAdam takes sparse gradients, and those of SAEs are dense; use Adam")
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("foreach"):
            raise UserError("model.optimizer: fused and foreach exclude each other; set one of them")
        if fused and "fused" in group and group["fused"] is None and not group.get("foreach"):
            group["fused"] = True
    return optimizer


def make_schedule(factory: SchedulerFactory, optimizer: Optimizer, max_steps: int = -1) -> LRScheduler:
    """The learning-rate schedule of an optimiser, stepped once an optimiser step.

    Args:
        factory: Makes it.
        optimizer: Whose learning rate it sets.
        max_steps: Optimiser steps of the run; -1 where that is unknown.

    Raises:
        UserError: It refuses its arguments, follows a metric, or is shorter than the run.
    """
    try:
        schedule = factory(optimizer)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.lr_scheduler: {' '.join(str(error).split())}") from error
    if isinstance(schedule, ReduceLROnPlateau):
        raise UserError(
            "model.lr_scheduler: ReduceLROnPlateau follows a metric, and SAEs' schedules follow steps; use "
            "CosineAnnealingLR, LinearLR or another of torch.optim.lr_scheduler"
        )
    if isinstance(schedule, OneCycleLR) and schedule.total_steps < max_steps:
        raise UserError(
            f"model.lr_scheduler: OneCycleLR ends after {schedule.total_steps} steps, the run after {max_steps}; set "
            f"model.lr_scheduler.total_steps to {max_steps}"
        )
    return schedule


def check_optimization(sae: Any, max_steps: int) -> None:
    """Try optimiser and schedule on a stand-in parameter, before anything costly begins.

    Raises:
        UserError: One of them cannot work.
    """
    optimizer = make_optimizer(sae.optimizer, [nn.Parameter(torch.zeros(1))])
    if sae.lr_scheduler is not None:
        make_schedule(sae.lr_scheduler, optimizer, max_steps)


class MemberOptimizers(Optimizer):
    """The optimisers of several SAEs, and their schedules, stepping as one.

    Lightning counts a step for every optimiser that steps; this one keeps ``global_step`` the number of batches.

    Args:
        optimizers: Each member's optimiser, by name.
        schedules: Schedules of those members that have one.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], schedules: Mapping[str, LRScheduler]) -> None:
        self.members, self.schedules = dict(optimizers), dict(schedules)
        groups = [group for optimizer in self.members.values() for group in optimizer.param_groups]
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self.param_groups = groups  # the very groups whose learning rates the schedules set

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every optimiser, then its schedule."""
        result = None if closure is None else closure()
        for name, optimizer in self.members.items():
            optimizer.step()
            if name in self.schedules:
                self.schedules[name].step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of every member."""
        for optimizer in self.members.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """States of all optimisers and schedules, by member."""
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.members.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self.schedules.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved states."""
        for name, optimizer in self.members.items():
            optimizer.load_state_dict(state_dict["optimizers"][name])
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state_dict["schedules"][name])
        self.param_groups = [group for optimizer in self.members.values() for group in optimizer.param_groups]
