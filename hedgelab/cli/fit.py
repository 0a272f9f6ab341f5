"""``hedgelab fit|validate|test|hedge``: what can be said before torch is imported, then LightningCLI; and the last lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hedgelab.cli.startup import begin

if TYPE_CHECKING:
    import lightning as L

_FIRST = ("loss", "mse", "explained_variance", "l0", "dead_latents", "mcc")


def run(command: str, words: list[str]) -> int:
    """Run one of LightningCLI's subcommands.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``hedge``.
        words: Its options.

    Raises:
        UserError: Anything the user can mend.
    """
    begin(words)
    if command == "hedge":
        from hedgelab.cli.hedge import run_hedge

        return run_hedge(command, words)
    from hedgelab.cli.lightning import run_lightning

    return run_lightning(command, words)


def summary(trainer: L.Trainer) -> str:
    """Name of the run, its key numbers, and where the rest is."""
    from hedgelab.protocols.training_phases import was_cut

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
