"""What ends a command early: the user's mistakes, one line naming the key and the fix; and signals."""

import signal


class UserError(ValueError):
    """A mistake in a config, a file or a call; the command line prints it as one line and exits with code 2."""


class Stopped(SystemExit):
    """A signal has stopped the command, which ends with the exit code that shells give such an end.

    Args:
        number: The signal; the exit code is 128 + it: 143 for SIGTERM, 138 for SIGUSR1, 130 for Ctrl-C.
        state: What became of the run, for the line that tells of the end.
    """

    def __init__(self, number: int, state: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.state = number, state

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}" + (f" {self.state}" if self.state else "")
