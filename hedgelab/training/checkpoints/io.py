"""How Lightning writes and reads checkpoints here: atomically, checked, and without executing anything."""

from __future__ import annotations

import io
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.training.checkpoints.files import fault, is_remote, local_path, write_atomically

_PLAIN = (bool, int, float, complex, str, bytes, torch.device, torch.dtype)


class VerifiedCheckpointIO(TorchCheckpointIO):
    """PyTorch checkpoints: tensors and plain values only; on a local disk whole or not there, and verified when read.

    Other places (``s3://…``) are written and read by fsspec, as Lightning does, and are as reliable as they are.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint that :meth:`load_checkpoint` will read.

        Raises:
            UserError: A callback's state, or another part, is more than tensors and plain values.
            OSError: It cannot be written; an older file of that name stays as it was.
        """
        checkpoint = readable(checkpoint)
        if is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_atomically(Path(local_path(path)), lambda file: _save(checkpoint, file))

    def load_checkpoint(
        self, path: _PATH, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, whoever wrote it: tensors and plain values only, whatever is asked for.

        Raises:
            UserError: It is missing, damaged, holds anything that would have to be executed, or is no checkpoint.
        """
        trouble = None if is_remote(path) else fault(Path(local_path(path)))
        if trouble is not None:
            raise UserError(f"ckpt_path: cannot use '{path}': {trouble}")
        try:
            checkpoint: Any = super().load_checkpoint(path, map_location, weights_only=True)
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


def readable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that can be read without executing anything: numpy's scalars become Python's.

    Raises:
        UserError: Something in it is neither a tensor nor a plain value; names the callback whose state it is.
    """
    checkpoint = apply_to_collection(checkpoint, np.generic, lambda value: value.item())
    for key, value in checkpoint.items():
        parts = value.items() if key == "callbacks" else [(key, value)]
        for name, part in parts:
            if found := _unreadable(part):
                whose = f"the state of callback {name}" if key == "callbacks" else f"'{name}'"
                raise UserError(
                    f"checkpoint: {whose} holds a {found}, which no checkpoint may hold, because reading it would execute "
                    "code; let its state_dict return tensors, numbers, text, lists and dicts"
                )
    return checkpoint


def _unreadable(value: Any) -> str | None:
    """Name of the first type within a value that PyTorch does not read by itself; None where there is none."""
    if isinstance(value, dict) and type(value) in (dict, OrderedDict, defaultdict):
        return next((found for pair in value.items() for one in pair if (found := _unreadable(one))), None)
    if type(value) in (list, tuple, set, torch.Size):
        return next((found for one in value if (found := _unreadable(one))), None)
    if value is None or isinstance(value, Tensor) or type(value) in _PLAIN:
        return None
    with io.BytesIO() as file:  # rare types, some of which PyTorch does read
        try:
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception:  # whatever it is that cannot be written or read
            return type(value).__qualname__
    return None


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
