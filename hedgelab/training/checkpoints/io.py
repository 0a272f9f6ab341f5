"""How Lightning writes and reads checkpoints here: atomically, checked, and without executing anything."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH

from hedgelab.errors import UserError
from hedgelab.training.checkpoints.files import fault, write_atomically


class VerifiedCheckpointIO(TorchCheckpointIO):
    """PyTorch checkpoints on a local disk: whole or not there, verified when read, data and nothing else."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: It cannot be written; an older file of that name stays as it was.
        """
        write_atomically(Path(path), lambda file: _save(checkpoint, file))

    def load_checkpoint(
        self, path: _PATH, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, whoever wrote it: tensors and plain values only, whatever is asked for.

        Raises:
            UserError: It is missing, damaged, holds anything that would have to be executed, or is no checkpoint.
        """
        trouble = fault(Path(path))
        if trouble is not None:
            raise UserError(f"ckpt_path: cannot use '{path}': {trouble}")
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # whatever a hostile or foreign file provokes
            reason = " ".join(str(error).split(".")[0].split()) or type(error).__name__
            raise UserError(
                f"ckpt_path: '{path}' holds more than tensors and plain values ({reason}); refused"
            ) from error
        if not isinstance(checkpoint, dict) or not {"state_dict", "global_step", "loops"} <= checkpoint.keys():
            raise UserError(
                f"ckpt_path: '{path}' is no checkpoint of a fit; expected runs/checkpoints/<run id>/last.ckpt"
            )
        return checkpoint


def use_verified_io(trainer: L.Trainer) -> None:
    """Let a trainer write and read checkpoints by :class:`VerifiedCheckpointIO`, unless its strategy has ways of its own."""
    with suppress(NotImplementedError):
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = VerifiedCheckpointIO()


def _save(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    """``torch.save`` that fails as the disk does: PyTorch's writer says RuntimeError whatever happened."""
    recorder = _Recorder(file)
    try:
        torch.save(checkpoint, recorder)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise recorder.failure or error from error


class _Recorder:
    """A file that remembers why a write failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._write: Callable[[Any], int] = file.write
        self.flush = file.flush
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, and remember what goes wrong."""
        try:
            return self._write(data)
        except OSError as error:
            self.failure = error
            raise
