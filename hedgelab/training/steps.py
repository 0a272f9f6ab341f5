"""What a batch is to Lightning: one step, or for tiny toys that nobody watches step by step several at once.

Lightning spends about half a millisecond on a batch. A step of an SAE of one latent costs as much, so its steps travel in
lists ("chunks"). A batch is one step wherever a step costs more, and wherever a callback, a flag or an overridden hook looks
at single steps; the numbers are the same either way.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

from hedgelab.batch import Batch

TINY = 2**22
"""Products a step, ``batch_size · d_in · d_sae``, up to which Lightning's own cost is worth avoiding."""
STEP_HOOKS = (
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step",
)  # fmt: skip
MODULE_HOOKS = (*STEP_HOOKS, "training_step", "optimizer_step", "lr_scheduler_step", "configure_gradient_clipping")
_TRUSTED = ("hedgelab.", "lightning.pytorch.core.", "lightning.pytorch.callbacks.callback", "torch.")


class StepBatches(NamedTuple):
    """The batches of one step where some members of a group (``own``, by name) see other data than the rest (``shared``)."""

    shared: Batch
    own: dict[str, Batch]

    @property
    def x(self) -> torch.Tensor:
        """The shared activations, ``[batch, d_in]``."""
        return self.shared.x

    def of(self, name: str) -> Batch:
        """The batch that a member sees."""
        return self.own.get(name, self.shared)

    def to(self, device: torch.device | str) -> StepBatches:
        """The same batches on another device."""
        return StepBatches(self.shared.to(device), {name: batch.to(device) for name, batch in self.own.items()})


def steps_a_batch(trainer: Any, most: int, products: int) -> int:
    """How many steps one batch of Lightning's may hold, at most ``most``: the largest number that divides all intervals, or 1.

    The trainer's callbacks, flags and module decide, and the products of a step (:data:`TINY`).
    """
    if most == 1 or products > TINY or _looks_at_steps(trainer):
        return 1
    intervals = [int(getattr(trainer, "log_every_n_steps", 0))]
    intervals += [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    return max(d for d in range(1, most + 1) if math.gcd(*intervals) % d == 0)


def batches_of(batch: Any) -> list[Any]:
    """The steps' batches in what Lightning calls a batch: a list of them, or the one itself."""
    return batch if isinstance(batch, list) else [batch]


def batch_rows(batch: Any) -> int:
    """Rows of activations in what Lightning calls a batch."""
    return sum(len(one.x) for one in batches_of(batch))


def watches_steps(watcher: Any, hooks: tuple[str, ...] = STEP_HOOKS) -> bool:
    """Whether a callback (or module) has a hook of its own that Lightning calls once a batch."""
    if isinstance(watcher, ModelCheckpoint):
        return bool(watcher.save_top_k) or not type(watcher).__module__.startswith("hedgelab.")
    owners = [next((c for c in type(watcher).__mro__ if hook in vars(c)), None) for hook in hooks]
    return any(owner is not None and not owner.__module__.startswith(_TRUSTED) for owner in owners)


def _looks_at_steps(trainer: Any) -> bool:
    """Whether anything about a trainer needs each batch to be one step."""
    return (
        bool(trainer.fast_dev_run or trainer.overfit_batches)
        or isinstance(trainer.limit_train_batches, int)
        or not isinstance(getattr(trainer, "val_check_interval", None), float)  # a number of steps, or a time
        or trainer.check_val_every_n_epoch is None
        or not isinstance(trainer.profiler, PassThroughProfiler)
        or not isinstance(trainer.strategy, SingleDeviceStrategy)
        or type(trainer.precision_plugin) not in (Precision, DoublePrecision)
        or any(watches_steps(callback) for callback in trainer.callbacks)
        or watches_steps(trainer.lightning_module, MODULE_HOOKS)
    )


def count_batches_as_steps(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint's counters say what they would if each batch had been one step, so that any mode can go on from it."""
    step: int = checkpoint["global_step"]
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    if progress["total"]["ready"] != step:
        begun = progress["total"]["ready"] - progress["total"]["completed"]
        for counts in (progress["total"], progress["current"]):
            counts["ready"] = counts["started"] = counts["processed"] = step
            counts["completed"] = step - begun
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - begun
