"""Signals that ask a run to stop: Ctrl-C, SIGTERM (preemption, a node that goes down), SIGUSR1 (a scheduler's warning).

Between steps the run is stopped at once; within training a flag is raised, and looked at between steps, where a
checkpoint can be written that loses nothing. Lightning's own handlers are not used: they act in the middle of a step.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from hedgelab.errors import SIGNALS, Stopped


class StopFlag:
    """Holds the number of the signal that came, None as long as none did. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._former = ExitStack()

    def install(self, forward: Callable[[int], None]) -> None:
        """Listen from here on, in the main thread only (others cannot); ``forward`` passes a signal on to other processes.

        SIGUSR2 counts where somebody listens to it already: submitit, which submits a job again that SLURM is about to end.
        """

        def listen(number: int, frame: Any) -> None:
            if self.number is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            if self.number is None:
                self.number = number
                forward(number)

        if threading.current_thread() is threading.main_thread():
            awaited = signal.getsignal(signal.SIGUSR2) not in (signal.SIG_DFL, signal.SIG_IGN, None)
            for number in (*SIGNALS, signal.SIGINT, *([signal.SIGUSR2] if awaited else [])):
                self._former.callback(signal.signal, number, signal.signal(number, listen) or signal.SIG_DFL)

    def remove(self) -> None:
        """Let the signals do what they did before."""
        self._former.close()


def stopped(error: BaseException | None = None) -> bool:
    """Whether an exception (by default the one under way) is, or came of, a signal that stopped the command."""
    error = sys.exception() if error is None else error
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            return True
        error = error.__context__
    return False
