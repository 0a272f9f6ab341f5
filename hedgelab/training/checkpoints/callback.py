"""The callback that keeps the two newest checkpoints of a run, and answers signals between steps."""

import logging
import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import Logger
from torch import Tensor

from hedgelab.errors import SIGNALS, Stopped, UserError
from hedgelab.training.checkpoints.files import LAST, NEXT, is_remote, local_path, promote
from hedgelab.training.checkpoints.folder import RunFolder

_logger = logging.getLogger(__name__)


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` and, one interval older, ``previous.ckpt`` under ``runs/checkpoints/<run id>/``.

    Written between steps, after a validation that was due, and when training ends, so a run that goes on from one repeats
    nothing and leaves nothing out. SIGTERM, SIGUSR1 and Ctrl-C have one written and end the run. What is logged up to a
    checkpoint is sent, or on the disk, before it appears. A full disk costs checkpoints, not the run.

    Args:
        dirpath: A local folder instead of the run's own.
        **kwargs: Other arguments of ModelCheckpoint.
    """

    def __init__(self, dirpath: str | Path | None = None, **kwargs: Any) -> None:
        if dirpath is not None:
            if is_remote(dirpath):
                raise UserError(f"checkpoint.dirpath: '{dirpath}' is not a folder of this machine; choose one that is")
            dirpath = local_path(dirpath)  # Lightning takes "file:///kept" for a folder "file:" below the current one
        super().__init__(dirpath, **kwargs)
        self.folder: RunFolder | None = None  # of the run that the fit goes on with, or else claimed when it starts
        self.facts: Callable[[], dict[str, Any]] | None = None  # what the folder is to say, so that --resume finds it
        self._signal: int | None = None
        self._former_handlers = ExitStack()
        self._saving = self._warned = False
        self._unaveraged: dict[str, Tensor] | None = None

    @property
    def interval(self) -> dict[str, Any]:
        """Arguments of another callback that saves as often."""
        by = {"every_n_train_steps": self._every_n_train_steps, "train_time_interval": self._train_time_interval}
        return {"save_last": self.save_last, "save_top_k": 0, **by}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Name the folder after the run."""
        if stage == "fit" and self.dirpath is None:
            self.dirpath = str(default_folder(trainer))
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Claim the folder, unless it holds another run's checkpoints, and say in it what the run is."""
        if not trainer.is_global_zero:
            return
        if self.folder is None:
            path = Path(str(self.dirpath))
            if (path / LAST).exists() and trainer.ckpt_path is None:
                found = f"checkpoint.dirpath: '{path}' holds checkpoints of another run"
                raise UserError(f"{found}; choose another folder, or go on with that run by --resume")
            self.folder = RunFolder(path)
            self.folder.claim()
        if self.facts is not None:
            tracker = _tracker(trainer)
            self.folder.note(**self.facts(), run_id=tracker and str(tracker.version), finished=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals."""
        super().on_train_start(trainer, pl_module)
        self._saved_at = trainer.global_step
        self._interval_began = time.monotonic()
        self._unaveraged = self._signal = None
        self._forward = getattr(trainer.strategy.launcher, "kill", lambda number: None)
        # SIGUSR2 counts where submitit listens to it, which submits a job again that SLURM is about to end.
        awaited = signal.getsignal(signal.SIGUSR2) not in (signal.SIG_DFL, signal.SIG_IGN, None)
        if threading.current_thread() is threading.main_thread():  # no other can listen
            for number in (*SIGNALS, signal.SIGINT, *([signal.SIGUSR2] if awaited else [])):
                former = signal.signal(number, self._keep_signal) or signal.SIG_DFL
                self._former_handlers.callback(signal.signal, number, former)

    def _keep_signal(self, number: int, frame: Any) -> None:
        """Keep a signal until the step has ended (Lightning's handlers act within it); a second Ctrl-C stops at once."""
        if self._signal is None:
            self._signal = number
            self._forward(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Between two steps: stop if a signal has come to any rank, and save where an interval has ended."""
        stop = self._signal is not None
        if trainer.world_size > 1:  # every step; one process under DDP has nobody to ask
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if self._is_due(trainer) or stop:
            self._save(trainer)
        if stop:
            self._former_handlers.close()
            state = f"; saved in {self.last_model_path or self.dirpath}, go on with --resume"
            if self._saved_at != trainer.global_step:
                state = ", which could not be saved; --resume goes on from the checkpoint before it"
            raise Stopped(self._signal or signal.SIGTERM, f"after step {trainer.global_step}{state}")

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Whether an interval has ended: of steps, or of time, by the clock of rank zero."""
        if self._train_time_interval is None:
            return self._every_n_train_steps >= 1 and trainer.global_step % self._every_n_train_steps == 0
        over = time.monotonic() - self._interval_began >= self._train_time_interval.total_seconds()
        if over := bool(trainer.strategy.broadcast(over)):
            self._interval_began = time.monotonic()
        return over

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the weights as training left them: weight averaging puts its own in their place before the last save."""
        super().on_train_epoch_end(trainer, pl_module)
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self._unaveraged = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step too, after its validation."""
        self._former_handlers.close()
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Listen no longer; what is in the middle of a step is not worth saving."""
        self._former_handlers.close()
        super().on_exception(trainer, pl_module, exception)
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let others have the run."""
        if self.folder is not None:
            self.folder.release()

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Not at the moments that Lightning chooses: some come before a validation that would then be left out."""

    def _save(self, trainer: L.Trainer) -> None:
        """Make a new ``last.ckpt`` unless this step has one; a disk that does not take it costs a warning."""
        step = trainer.global_step
        if not self.save_last or step <= self._saved_at or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if (check := getattr(trainer.lightning_module, "check_finite", None)) is not None:
            check(step)
        for logger in trainer.loggers:
            logger.save()
        folder = Path(str(self.dirpath))
        self._saving = True
        try:
            trainer.save_checkpoint(folder / NEXT, weights_only=False)
            if trainer.is_global_zero:
                promote(folder)
            self._saved_at, self._warned = step, False
        except OSError as error:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # the other ranks wait there
            if not self._warned:
                self._warned = True
                _logger.warning(
                    "no checkpoint could be written at step %d in %s (%s); training goes on, the one before it is kept",
                    step, folder, error.strerror or error,
                )  # fmt: skip
        finally:
            self._saving = False
        self.last_model_path = str(folder / LAST)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count the step that is about to start as not begun (Lightning's counters would be one ahead for good)."""
        if not self._saving:
            return
        if self._unaveraged is not None and "current_model_state" in checkpoint:
            checkpoint["current_model_state"] = self._unaveraged
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts["ready"] = counts["started"] = counts["processed"] = counts["completed"]
        progress["is_last_batch"] = False


def default_folder(trainer: L.Trainer) -> Path:
    """Where a run's checkpoints go by default: beside the MLflow store, or without a tracker below the trainer's folder."""
    tracker = _tracker(trainer)
    if is_remote(root := str(trainer.default_root_dir if tracker is None else tracker.save_dir)):
        raise UserError(f"checkpoint.dirpath: must be set to a local folder, since the run's own, '{root}', is not one")
    if tracker is None:
        return local_path(root) / "runs" / "checkpoints" / f"untracked-{uuid.uuid4().hex[:12]}"
    return local_path(root) / "checkpoints" / str(tracker.version)


def folder_of(trainer: L.Trainer) -> Path | None:
    """The folder of the run's checkpoints; None where neither checkpoints nor anything else of it is kept."""
    kept = next((found for found in trainer.checkpoint_callbacks if isinstance(found, RunCheckpoint)), None)
    if kept is not None:
        return Path(str(kept.dirpath))
    return None if trainer.logger is None or trainer.fast_dev_run else default_folder(trainer)  # type: ignore[attr-defined]


def _tracker(trainer: L.Trainer) -> Logger | None:
    """The logger whose runs can be gone on with."""
    return next((logger for logger in trainer.loggers if hasattr(logger, "go_on_with")), None)
