"""What the user did wrong, in one line on stderr; what we did wrong, as a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator

from hedgelab.errors import Stopped, UserError

MISTAKE, BUG, INTERRUPTED = 2, 1, 130


def guarded(run: Callable[[], int]) -> int:
    """Run a command; turn whatever it raises into an exit code, and a user's mistake into one line on stderr."""
    try:
        return run()
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except Stopped as stop:
        return _say(str(stop), int(stop.code or 0))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else _say(str(stop.code), BUG)
    except Exception as error:
        mistake = user_error(error)
        if mistake is None or os.environ.get("HEDGELAB_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        return BUG if mistake is None else _say(one_line(str(mistake)), MISTAKE)


def user_error(error: BaseException) -> BaseException | None:
    """The user's mistake that an exception is or was raised from; None where it is a bug."""
    kinds: tuple[type[BaseException], ...] = (UserError,)
    if lightning := sys.modules.get("lightning.fabric.utilities.exceptions"):  # raised only by what is loaded
        kinds += (lightning.MisconfigurationException,)
    return next((cause for cause in causes(error) if isinstance(cause, kinds)), None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def one_line(text: str) -> str:
    """The text with its line breaks and indents folded into single spaces."""
    return " ".join(text.split())


def _say(message: str, code: int) -> int:
    print(f"hedgelab: {message}", file=sys.stderr)
    return code
