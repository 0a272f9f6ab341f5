"""Flags and callbacks of Lightning's Trainer that SAEs do not train with: each refused before anything costly begins.

``hedgelab/training/README.md`` has the table of all flags and callbacks, and a test that tries each.
"""

import inspect
import re
from typing import Any

import torch
from lightning.pytorch import callbacks as stock

from hedgelab.errors import UserError
from hedgelab.training.checkpoints import RunCheckpoint

NARROW = ("bf16-true", "16-true")
INSTEAD = {
    stock.StochasticWeightAveraging: "averages over epochs; use WeightAveraging or EMAWeightAveraging, which do over steps",
    stock.GradientAccumulationScheduler: "would change how many batches a step has; set data.batch_size",
    stock.BatchSizeFinder: "would change what the SAE learns from; set data.batch_size",
    stock.LearningRateFinder: "sets an attribute that SAEs do not have; compare rates with hedgelab sweep",
    stock.ModelPruning: "would replace the SAE's weights by masked ones; lower model.d_sae",
}
"""Callbacks that are refused, and why."""


def check_trainer(trainer: Any) -> None:
    """Raise a UserError if a trainer's flag or callback cannot be obeyed in a fit; it names what to use instead."""
    clip, accumulated = trainer.gradient_clip_val, trainer.accumulate_grad_batches
    too_rare = (trainer.check_val_every_n_epoch or 1) > max(1, trainer.max_epochs or 1) and trainer.limit_val_batches
    refusals = {
        f"gradient_clip_val: set model.gradient_clip_norm to {clip} instead: each SAE of a group clips its own": clip,
        f"accumulate_grad_batches: must be 1; make data.batch_size {accumulated} times as large": accumulated != 1,
        "check_val_every_n_epoch: must be 1, for a stream has one epoch; set val_check_interval in steps": too_rare,
        "precision: Adam's steps are rounded away in weights of 16 bits; use bf16-mixed": trainer.precision in NARROW,
    }
    for flag in ("limit_train_batches", "overfit_batches", "val_check_interval"):
        value = getattr(trainer, flag, None)  # an interval in time leaves no val_check_interval
        reason = f"{flag}: a stream has no length of its own, so give steps (a whole number), not {value}"
        refusals[reason] = isinstance(value, float) and value not in (0.0, 1.0)
    for callback in trainer.callbacks:
        name = f"callbacks: {type(callback).__name__}"
        refusals |= {f"{name} {reason}": isinstance(callback, kind) for kind, reason in INSTEAD.items()}
        by_time = getattr(callback, "_train_time_interval", None) and not isinstance(callback, RunCheckpoint)
        instead = "hedgelab.training.checkpoints.RunCheckpoint with train_time_interval, or every_n_train_steps"
        refusals[f"{name} saves by time under automatic optimisation only; use {instead}"] = by_time
    for reason, is_refused in refusals.items():
        if is_refused:
            raise UserError(f"trainer.{reason}")


def accelerator(asked: Any) -> Any:
    """What ``trainer.accelerator`` means: ``auto`` is CUDA where it is there and else the CPU, never a Mac's MPS."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def check_device(device: torch.device) -> None:
    """Raise a UserError for a Mac's GPU, on which SAEs cannot be measured."""
    if device.type == "mps":
        raise UserError("trainer.accelerator: MPS has no float64, in which SAEs are measured; set it to cpu")


def check_monitors(trainer: Any, shell: Any) -> None:
    """Raise a UserError if a callback monitors what is never logged, unless a module or callback from outside may log it."""
    watching = {
        callback.monitor: type(callback).__name__
        for callback in trainer.callbacks
        if isinstance(callback, (stock.EarlyStopping, stock.ModelCheckpoint)) and getattr(callback, "strict", True)
    }
    parts = [*trainer.callbacks, shell, *(trainee.sae for trainee in shell.trainees)]
    if not any(watching) or any(map(_may_log, {cls for part in parts for cls in type(part).__mro__})):
        return
    known = _numbers_to_come(trainer, shell)
    for monitor, name in watching.items():
        if monitor and monitor not in known and not monitor.split("/")[-1].startswith("absorption"):
            there = ", ".join(sorted(known))
            raise UserError(f"trainer.callbacks: {name} monitors '{monitor}', which is never logged; there are {there}")


def _may_log(cls: type) -> bool:
    """Whether a class from outside hedgelab and Lightning may log numbers of its own: whether its source speaks of logging."""
    if cls.__module__.startswith(("hedgelab.", "lightning.", "torch.", "builtins", "abc", "typing")):
        return False
    try:
        return re.search(r"\.log(_dict|_metrics)?\(|callback_metrics\[[^]]*\] *=", inspect.getsource(cls)) is not None
    except (OSError, TypeError):  # defined where no source is kept
        return True


@torch.no_grad()
def _numbers_to_come(trainer: Any, shell: Any) -> set[str]:
    """Names of the numbers that a step and a validation pass log, found by trying one batch of each."""
    data, names = trainer.datamodule, {"train/loss"}
    for stage in ("train", "val") if trainer.limit_val_batches else ("train",):
        batch = trainer.precision_plugin.convert_input(data.slice_for_rank(data.batch(stage, 0)).to(shell.device))
        with trainer.precision_plugin.forward_context():
            for trainee in shell.trainees:
                if stage == "train":
                    found = [f"train/{term}" for term in (*trainee.sae.loss(batch).terms, "loss")]
                else:
                    trainee.start_measuring(data, shell.device, last=False)
                    trainee.measure(batch)
                    found = [*trainee.measurements("val")]
                names |= {trainee.prefix + name for name in found}
    return names
