"""Flags and callbacks of Lightning's Trainer that SAEs do not train with: each refused before anything costly begins.

``hedgelab/training/README.md`` has the table of all flags and callbacks, and a test that tries each.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks as stock
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from hedgelab.errors import UserError
from hedgelab.training.optimizers import check_optimization

INSTEAD = {
    stock.StochasticWeightAveraging: "averages over epochs, and a stream of activations has one; use WeightAveraging or "
    "EMAWeightAveraging of lightning.pytorch.callbacks, which average over steps",
    stock.GradientAccumulationScheduler: "would change how many batches a step has; set data.batch_size",
    stock.BatchSizeFinder: "would change what the SAE learns from; set data.batch_size",
    stock.LearningRateFinder: "sets an attribute that SAEs do not have; compare rates with hedgelab sweep",
    stock.ModelPruning: "would replace the SAE's weights by masked ones; lower model.d_sae",
}
"""Callbacks that are refused, and why."""
_STOCK = ("hedgelab.", "lightning.", "torch.", "builtins", "abc", "typing")


def check_trainer(trainer: L.Trainer) -> None:
    """See that a trainer's flags and callbacks can be obeyed in a fit.

    Raises:
        UserError: One cannot; names what to use instead.
    """
    if trainer.gradient_clip_val:
        raise UserError(
            f"trainer.gradient_clip_val: set model.gradient_clip_norm to {trainer.gradient_clip_val} instead: each SAE "
            "of a group clips its own gradients"
        )
    if trainer.accumulate_grad_batches != 1:
        raise UserError(
            "trainer.accumulate_grad_batches: must be 1, because what is counted over a batch (BatchTopK's selection, dead "
            f"latents) is counted over a step; make data.batch_size {trainer.accumulate_grad_batches} times as large"
        )
    for flag in ("limit_train_batches", "overfit_batches", "val_check_interval"):
        value = getattr(trainer, flag, None)  # an interval in time leaves no val_check_interval
        if isinstance(value, float) and value not in (0.0, 1.0):
            raise UserError(
                f"trainer.{flag}: a stream has no length of its own, so give steps (a whole number), not {value}"
            )
    every = trainer.check_val_every_n_epoch or 1
    if every > 1 and every > (trainer.max_epochs or 1) and trainer.limit_val_batches:
        raise UserError(
            f"trainer.check_val_every_n_epoch: must be 1, because a stream has one epoch, not {every}; set "
            "trainer.val_check_interval to a number of steps"
        )
    if trainer.precision == "16-true":
        raise UserError(
            "trainer.precision: 16-true cannot hold the small numbers that Adam divides by; use bf16-true or 16-mixed"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for refused, reason in INSTEAD.items():
            if isinstance(callback, refused):
                raise UserError(f"trainer.callbacks: {type(callback).__name__} {reason}")
        by_time = getattr(callback, "_train_time_interval", None) is not None
        if by_time and not type(callback).__module__.startswith("hedgelab."):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} saves by time under automatic optimisation only; use "
                "hedgelab.training.checkpoints.RunCheckpoint with train_time_interval, or every_n_train_steps"
            )


def check_sae(sae: Any, trainer: L.Trainer) -> None:
    """See that an SAE's optimiser and schedule can work in a fit.

    Raises:
        UserError: One cannot.
    """
    check_optimization(sae, trainer.max_steps)


def accelerator(asked: Any) -> Any:
    """What ``trainer.accelerator`` means: ``auto`` is CUDA where it is there and else the CPU, never a Mac's MPS."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def check_device(device: torch.device) -> None:
    """See that SAEs can be measured on a device.

    Raises:
        UserError: It is a Mac's GPU.
    """
    if device.type == "mps":
        raise UserError("trainer.accelerator: MPS has no float64, in which SAEs are measured; set it to cpu")


def check_monitors(trainer: L.Trainer, shell: Any) -> None:
    """See that what callbacks monitor will be there, unless a module or callback from outside may log it.

    Raises:
        UserError: It will not; names what will.
    """
    watching = [callback for callback in trainer.callbacks if _monitor(callback)]  # type: ignore[attr-defined]
    if not watching or _others_log(trainer, shell):
        return
    known = _numbers_to_come(trainer, shell)
    for callback in watching:
        monitor = _monitor(callback)
        if monitor not in known and not monitor.split("/")[-1].startswith("absorption"):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} monitors '{monitor}', which is never logged; there are "
                f"{', '.join(sorted(known))}"
            )


def _monitor(callback: Any) -> str:
    """What a callback cannot do without; empty for nothing."""
    lenient = isinstance(callback, EarlyStopping) and not callback.strict
    watches = isinstance(callback, (EarlyStopping, ModelCheckpoint)) and not lenient
    return (getattr(callback, "monitor", None) or "") if watches else ""


def _others_log(trainer: L.Trainer, shell: Any) -> bool:
    """Whether code from outside hedgelab and Lightning may log numbers of its own: whether its source speaks of logging."""
    parts = [*trainer.callbacks, shell, *(trainee.sae for trainee in shell.trainees)]  # type: ignore[attr-defined]
    classes = {cls for part in parts for cls in type(part).__mro__ if not cls.__module__.startswith(_STOCK)}
    return any(_speaks_of_logging(cls) for cls in classes)


def _speaks_of_logging(cls: type) -> bool:
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # defined where no source is kept
        return True
    return re.search(r"\.log(_dict|_metrics)?\(|callback_metrics\[[^]]*\] *=", source) is not None


@torch.no_grad()
def _numbers_to_come(trainer: L.Trainer, shell: Any) -> set[str]:
    """Names of the numbers that a step and a validation pass log, found by trying one batch of each."""
    data: Any = getattr(trainer, "datamodule", None)
    names = {"train/loss"}
    measured = bool(trainer.limit_val_batches)
    for trainee in shell.trainees:
        found = []
        for stage in ("train", "val") if measured else ("train",):
            batch = data.slice_for_rank(data.batch(stage, 0)).to(shell.device)
            batch = trainer.precision_plugin.convert_input(batch)
            with trainer.precision_plugin.forward_context():
                if stage == "train":
                    found += [f"train/{term}" for term in trainee.sae.loss(batch).terms] + ["train/loss"]
                else:
                    trainee.start_measuring(getattr(data, "feature_directions", None), shell.device)
                    trainee.measure(batch)
                    found += trainee.measurements("val")
        names |= {trainee.prefix + name for name in found}
    return names
