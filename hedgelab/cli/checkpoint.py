"""Checkpoints of a run, in a folder of its own beside the store."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` under ``runs/checkpoints/<run id>/``, up to date when training ends, well or badly.

    Takes ModelCheckpoint's arguments; ``dirpath`` replaces the folder.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Name the folder after the run."""
        if self.dirpath is None and stage == "fit" and trainer.logger is not None:
            root = Path(trainer.logger.save_dir or trainer.default_root_dir)
            self.dirpath = str(root / "checkpoints" / str(trainer.logger.version))
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step too, where it is no multiple of the interval (Lightning itself leaves it out)."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
