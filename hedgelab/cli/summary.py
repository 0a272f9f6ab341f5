"""The last lines of a run: what came out, and where to look."""

from __future__ import annotations

import lightning as L

from hedgelab.protocols.training_phases import was_cut

_FIRST = ("loss", "mse", "explained_variance", "l0", "dead_latents", "mcc")


def summary(trainer: L.Trainer) -> str:
    """Name of the run, its key numbers, and where the rest is."""
    logger = trainer.logger
    run = f"run {logger.version}" if logger is not None else "untracked run"
    checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "")
    cut = f" of {trainer.max_steps}, cut by max_time; go on with --resume" if was_cut(trainer) else ""
    lines = [f"{run}: {trainer.global_step} steps{cut}", *key_numbers(trainer)]
    if checkpoint:
        lines.append(f"checkpoint: {checkpoint}")
    if logger is not None:
        lines.append("look at it: hedgelab ui    compare: hedgelab runs")
    return "\n".join(lines)


def key_numbers(trainer: L.Trainer) -> list[str]:
    """The best-known metrics, aligned; nothing where none was logged."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    shown = [name for last in _FIRST for name in metrics if name.rsplit("/", 1)[-1] == last]
    width = max(map(len, shown), default=0)
    return [f"  {name:<{width}}  {metrics[name]:.4g}" for name in shown]
