"""A progress bar in optimiser steps."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar

_LINES_WITHOUT_TERMINAL = 20


class StepProgressBar(TQDMProgressBar):
    """Shows optimiser steps, their rate, the time left and the training loss.

    On a terminal it is redrawn at most ``per_second`` times a second. Elsewhere (a log file, a batch job) about twenty lines
    tell the whole of a run.

    Args:
        per_second: Most redraws a second.
    """

    def __init__(self, per_second: float = 5.0) -> None:
        super().__init__()
        self._interval = 1.0 / per_second
        self._drawn_at = self._started_at = 0.0
        self._next_line = self._first_step = 0
        self._terminal = sys.stdout.isatty()

    def init_validation_tqdm(self) -> Tqdm:
        """No bar for validation passes inside a fit, which are short; the stock bar otherwise."""
        if self.trainer.state.fn == "fit" or not self._terminal:
            return Tqdm(disable=True)
        return super().init_validation_tqdm()

    init_sanity_tqdm = init_validation_tqdm

    def on_train_start(self, *_: Any) -> None:
        """Starts at the trainer's step, which is not zero where a run is resumed."""
        self._started_at = time.monotonic()
        self._first_step = self._next_line = self.trainer.global_step
        self.train_progress_bar = Tqdm(
            desc="Training", unit="step", initial=self._first_step, dynamic_ncols=True, smoothing=0, mininterval=0,
            total=self.trainer.max_steps if self.trainer.max_steps > 0 else None, file=sys.stdout,
            disable=self.is_disabled or not self._terminal,
        )  # fmt: skip

    def on_train_epoch_start(self, *_: Any) -> None:
        """Epochs mean nothing to an endless stream."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Moves on, and redraws if the last time was long enough ago."""
        now = time.monotonic()
        if self.is_enabled and now - self._drawn_at >= self._interval:
            self._drawn_at = now
            self._show(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Shows the last step."""
        if self.is_enabled:
            self._next_line = min(self._next_line, trainer.global_step)
            self._show(trainer)

    def on_validation_end(self, *_: Any) -> None:
        """Closes the bar of a validation pass that had one."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    def _show(self, trainer: L.Trainer) -> None:
        loss, step, total = trainer.callback_metrics.get("train/loss"), trainer.global_step, trainer.max_steps
        text = "" if loss is None else f"loss {float(loss):.4g}"
        if self._terminal:
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix_str(text)
        elif step >= self._next_line:
            self._next_line = step + max(1, total // _LINES_WITHOUT_TERMINAL)
            rate = (step - self._first_step) / max(time.monotonic() - self._started_at, 1e-9)
            left = f"{(total - step) / rate:.0f} s left" if rate and step < total else ""
            line = ", ".join(filter(None, [f"step {step}/{total}", f"{rate:.1f} steps/s", left, text]))
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
