"""What ends a command early: the user's mistakes, one line naming the key and the fix; and signals."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a command to stop: preemption, and a scheduler's warning."""


class UserError(ValueError):
    """A mistake in a config, a file or a call; the command line prints it as one line and exits with code 2."""


def one_line(text: str) -> str:
    """The text with its line breaks and indents folded into single spaces."""
    return " ".join(text.split())


def whole_number(key: str, value: Any, least: int = 1) -> int:
    """The value, if it is an integer of at least ``least``; booleans and floats are none, though Python lets them pass.

    >>> whole_number("model.k", 4)
    4
    >>> whole_number("model.k", True)
    Traceback (most recent call last):
    hedgelab.errors.UserError: model.k: expected a whole number of at least 1, got True
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise UserError(f"{key}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def positive(key: str, value: float, or_zero: bool = False) -> float:
    """The value, if it is above 0, or with ``or_zero`` at least 0."""
    if value < 0 or (value == 0 and not or_zero):
        raise UserError(f"{key}: must {'not be negative' if or_zero else 'be above 0'}, got {value}")
    return value


class Stopped(SystemExit):
    """A signal has stopped the command: the exit code is 128 + its number, ``state`` says what became of the run."""

    def __init__(self, number: int, state: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.state = number, state

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}" + (f" {self.state}" if self.state else "")


def stopped_by_signal() -> bool:
    """Whether the exception under way is, or came of, a signal that stopped the command."""
    error = sys.exception()
    while error is not None and not isinstance(error, (KeyboardInterrupt, Stopped)):
        error = error.__context__
    return error is not None


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise :class:`Stopped`, so that runs are ended as killed instead of never."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler or signal.SIG_DFL)
