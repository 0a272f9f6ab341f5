"""What a step costs, and what follows from it: how many steps Lightning gets as one batch, and how many CPU threads they take.

Lightning spends half a millisecond on a batch, and so does a step of a tiny toy: its steps travel in lists, unless somebody
looks at single ones. The numbers are the same either way.
"""

import math
import os
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

from hedgelab.batch import Batch
from hedgelab.errors import whole_number

TINY = 2**22  # products a step, batch_size · d_in · d_sae, up to which Lightning's own cost is worth avoiding
PRODUCTS_A_THREAD = 2**22  # from which a further thread saves more than it costs (tests/benchmarks/threads.py)
STEP_HOOKS = (
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step",
)  # fmt: skip
MODULE_HOOKS = (*STEP_HOOKS, "training_step", "optimizer_step", "lr_scheduler_step", "configure_gradient_clipping")
_GIVEN_ELSEWHERE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_TRUSTED = ("hedgelab.", "lightning.pytorch.core.", "lightning.pytorch.callbacks.callback", "torch.")


class StepBatches(NamedTuple):
    """The batches of one step where some members of a group (``own``, by name) see other data than the rest (``shared``)."""

    shared: Batch
    own: dict[str, Batch]

    @property
    def x(self) -> torch.Tensor:
        """The shared activations, ``[batch, d_in]``."""
        return self.shared.x

    def to(self, device: torch.device | str) -> "StepBatches":
        """The same batches on another device."""
        return StepBatches(self.shared.to(device), {name: batch.to(device) for name, batch in self.own.items()})


def steps_a_batch(trainer: Any, most: int, products: int) -> int:
    """How many steps one batch of Lightning's may hold: the largest number up to ``most`` that divides all intervals, or 1."""
    someone_looks_at_steps = (
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
    if most == 1 or products > TINY or someone_looks_at_steps:
        return 1
    intervals = [int(getattr(trainer, "log_every_n_steps", 0))]
    intervals += [getattr(callback, "_every_n_train_steps", 0) for callback in trainer.checkpoint_callbacks]
    return max(d for d in range(1, most + 1) if math.gcd(*intervals) % d == 0)


def batches_of(batch: Any) -> list[Any]:
    """The steps' batches in what Lightning calls a batch: a list of them, or the one itself."""
    return batch if isinstance(batch, list) else [batch]


def batch_of(batch: Any, member: str) -> Batch:
    """What a member of a group sees of a step's batch."""
    return batch.own.get(member, batch.shared) if isinstance(batch, StepBatches) else batch


def batch_rows(batch: Any) -> int:
    """Rows of activations in what Lightning calls a batch."""
    return sum(len(one.x) for one in batches_of(batch))


def watches_steps(watcher: Any, hooks: tuple[str, ...] = STEP_HOOKS) -> bool:
    """Whether a callback (or module) has a hook of its own that Lightning calls once a batch."""
    if isinstance(watcher, ModelCheckpoint):
        return bool(watcher.save_top_k) or not type(watcher).__module__.startswith("hedgelab.")
    methods = (getattr(type(watcher), hook, watches_steps) for hook in hooks)
    return any(not method.__module__.startswith(_TRUSTED) for method in methods)


def count_batches_as_steps(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint's counters say what they would if each batch had been one step, so that any mode can go on from it."""
    step: int = checkpoint["global_step"]
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    if progress["total"]["ready"] != step:
        begun = progress["total"]["ready"] - progress["total"]["completed"]
        for counts in (progress["total"], progress["current"]):
            counts.update(ready=step, started=step, processed=step, completed=step - begun)
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - begun


def use_threads(trainer: Any, products: int) -> int | None:
    """Set the number of threads for a fit on the CPU; the number of before, or None where nothing was changed.

    A tiny toy gets one, so its results do not depend on the number of cores. Products of 0 are not known.
    """
    before = torch.get_num_threads()
    if given := os.environ.get("HEDGELAB_THREADS"):
        wanted = whole_number("HEDGELAB_THREADS", int(given) if given.isdecimal() else given)
    elif not products or trainer.strategy.root_device.type != "cpu" or any(map(os.environ.get, _GIVEN_ELSEWHERE)):
        return None
    else:
        wanted = max(1, min(before, products // PRODUCTS_A_THREAD))
    torch.set_num_threads(wanted)
    return before
