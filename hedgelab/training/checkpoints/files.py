"""Checkpoint files: complete or not there, checked when read (by the CRC-32 of each part), and read without executing code."""

import io
import logging
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import lightning as L
import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from hedgelab.errors import UserError, one_line

LAST, PREVIOUS, NEXT = "last.ckpt", "previous.ckpt", ".next.ckpt"
_OLD, _NEW = "log_threshold", "theta"
_logger = logging.getLogger(__name__)


def is_remote(path: object) -> bool:
    """Whether a path names another place than this machine's file system, such as ``s3://bucket/folder``."""
    return get_protocol(str(path)) not in ("file", "local")


def local_path(path: object) -> Path:
    """A path of this machine's file system without the protocol that it may be written with (``file://``)."""
    return Path(LocalFileSystem._strip_protocol(str(path)) if "://" in str(path) else str(path))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Make a file, and its folder, that replaces an older one of its name only when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name.lstrip('.')}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def promote(folder: Path) -> None:
    """Make the checkpoint just written the last one, and the last one the one before it; one is complete at any moment."""
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / PREVIOUS)
    (folder / NEXT).replace(folder / LAST)


def fault(path: Path) -> str | None:
    """Why a checkpoint cannot be used; None where it can. Reads every part and executes nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.compress_type != zipfile.ZIP_STORED:
                    return f"{part.filename} is compressed, which PyTorch never does"
            torn = archive.testzip()
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # a damaged archive can fail in any way
        return one_line(str(error)) or type(error).__name__
    return None if torn is None else f"the checksum of {torn} is wrong"


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a run that can be used; None without one. Damaged ones are passed over with a warning."""
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            if (trouble := fault(path)) is None:
                return path
            _logger.warning("%s is damaged (%s) and passed over", path, trouble)
    return None


class VerifiedCheckpointIO(TorchCheckpointIO):
    """PyTorch checkpoints of tensors and plain values only; on a local disk complete or not there, and verified when read.

    Other places (``s3://…``) are written and read by fsspec, as Lightning does, and are as reliable as they are.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint that :meth:`load_checkpoint` will read, or refuse it."""
        checkpoint = apply_to_collection(checkpoint, np.generic, lambda value: value.item())
        parts = {f"'{key}'": value for key, value in checkpoint.items() if key != "callbacks"}
        parts |= {f"the state of callback {name}": state for name, state in checkpoint.get("callbacks", {}).items()}
        for name, part in parts.items():
            if not _is_readable(part):
                fix = "let its state_dict return tensors, numbers, text, lists and dicts"
                raise UserError(f"checkpoint: {name} holds what cannot be read without executing code; {fix}")
        if is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_atomically(local_path(path), lambda file: torch.save(checkpoint, file))
        except RuntimeError as error:  # what PyTorch makes of any error of the disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def load_checkpoint(
        self, path: _PATH, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, whoever wrote it: tensors and plain values only, whatever is asked for."""
        if not is_remote(path) and (trouble := fault(local_path(path))) is not None:
            raise UserError(f"ckpt_path: cannot use '{path}': {trouble}")
        try:
            checkpoint: Any = super().load_checkpoint(path, map_location, weights_only=True)
        except Exception as error:  # whatever a hostile or foreign file provokes
            reason = one_line(str(error).partition(".")[0]) or type(error).__name__
            raise UserError(f"ckpt_path: '{path}' is refused, it holds more than plain values ({reason})") from error
        if not isinstance(checkpoint, dict) or not {"state_dict", "global_step", "loops"} <= checkpoint.keys():
            raise UserError(f"ckpt_path: '{path}' is no checkpoint of a fit; give runs/checkpoints/<run id>/last.ckpt")
        return upgraded(checkpoint)


def upgraded(checkpoint: dict[str, Any], rate_factor: float = 10.0) -> dict[str, Any]:
    """A checkpoint in which JumpReLU SAEs have thresholds θ; releases up to 0.2 trained and kept their logarithms.

    θ gets the group of its own that its learning rate, ``rate_factor`` times the others', needs. Its optimiser state, which
    is of gradients to the logarithm, is left out, so that it starts anew.
    """
    state = checkpoint["state_dict"]
    old = [name for name in state if name.rpartition(".")[2] == _OLD]
    if not old:
        return checkpoint
    for name in old:
        state[name.removesuffix(_OLD) + _NEW] = state.pop(name).exp()
    members = {name.split(".")[1] for name in old if name.startswith("members.")}
    for optimizer in checkpoint.get("optimizer_states", []):
        parts, schedules = [optimizer], checkpoint.get("lr_schedulers", [])
        if "optimizers" in optimizer:  # of a group of SAEs
            states = (optimizer["optimizers"], optimizer["schedules"])
            parts, schedules = ([part for name, part in own.items() if name in members] for own in states)
        for part in parts:
            (group,) = part["param_groups"]
            *others, theta = group["params"]  # the last parameter of its SAE
            rates = {key: rate_factor * group[key] for key in ("lr", "initial_lr") if key in group}
            part["param_groups"] = [{**group, "params": others}, {**group, **rates, "params": [theta]}]
            part["state"].pop(theta, None)
        for schedule in schedules:
            for key in ("base_lrs", "_last_lr"):
                schedule[key] = [*schedule[key], rate_factor * schedule[key][-1]]
            if "lr_lambdas" in schedule:
                schedule["lr_lambdas"] = 2 * schedule["lr_lambdas"]
    return checkpoint


def use_verified_io(trainer: L.Trainer) -> None:
    """Let a trainer write and read checkpoints by :class:`VerifiedCheckpointIO`, unless its strategy has ways of its own."""
    with suppress(NotImplementedError):
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = VerifiedCheckpointIO()


def _is_readable(value: Any) -> bool:
    """Whether PyTorch reads a value without executing code, tried without its tensors, which it always does."""
    with io.BytesIO() as file:
        try:
            torch.save(apply_to_collection(value, Tensor, lambda _: None), file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception:  # whatever it is that cannot be written or read
            return False
    return True
