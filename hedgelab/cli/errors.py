"""What the user did wrong, in one line on stderr; what we did wrong, as a traceback."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator

from hedgelab.errors import Stopped, UserError, one_line

MISTAKE, BUG, INTERRUPTED, UNREAD = 2, 1, 130, 141
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_MEMORY = re.compile(
    r"can't allocate memory: you tried to allocate (\d+ bytes)|out of memory\. Tried to allocate ([\d.]+ \w+)"
    r"|Storage size calculation overflowed"
)


def guarded(run: Callable[[], int]) -> int:
    """Run a command; turn whatever it raises into an exit code, and a user's mistake into one line on stderr."""
    try:
        code = run()
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read what is printed, such as `head`, has seen enough
        _print_no_more()
        return UNREAD
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except Stopped as stop:
        return _say(str(stop), int(stop.code or 0))
    except SystemExit as stop:
        return _say(stop.code, BUG) if isinstance(stop.code, str) else stop.code or 0
    except Exception as error:
        mistake = user_error(error)
        if isinstance(error, OSError) and error.errno in _FULL:
            _print_no_more()
        if mistake is None or os.environ.get("HEDGELAB_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        if mistake is None:
            return BUG
        peers = sys.modules.get("hedgelab.training.checkpoints.peers")  # there in every rank
        said = peers is not None and peers.main_process_ends()  # it has found the same mistake and says so
        return MISTAKE if said else _say(one_line(str(mistake)), MISTAKE)


def user_error(error: BaseException) -> BaseException | None:
    """The user's mistake that an exception is or was raised from; None where it is a bug."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # raises only what is loaded
    kinds = (UserError, lightning.MisconfigurationException) if lightning else (UserError,)
    chain = list(causes(error))
    foreseen = next((cause for cause in chain if isinstance(cause, kinds)), None)
    return foreseen or next(filter(None, map(_of_the_machine, chain)), None)


def _of_the_machine(error: BaseException) -> UserError | None:
    """What a machine without the memory, a place without the room or the rights, or the tracking store has refused."""
    refused = _NO_MEMORY.search(str(error))
    if refused or isinstance(error, MemoryError):
        asked = f" ({refused[1] or refused[2]} at once)" if refused and refused.lastindex else ""
        return UserError(f"not enough memory{asked}: lower model.d_sae, data.batch_size, or what else makes it large")
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"'{error.filename}': {error.strerror}; name another file or folder, or mend this one")
    if isinstance(error, OSError) and error.errno in _FULL:
        return UserError("no space is left where this writes; free some, or write elsewhere")
    mlflow = sys.modules.get("mlflow.exceptions")
    if mlflow is not None and isinstance(error, mlflow.MlflowException):
        from hedgelab.tracking.store import reason_of, tracking_uri, unusable

        return UserError(unusable(tracking_uri(), reason_of(error)))
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _print_no_more() -> None:
    """Have what waits to be printed go nowhere: at its end Python would try again."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str, code: int) -> int:
    print(f"hedgelab: {message}", file=sys.stderr)
    return code
