"""``hedgelab sync``: send to the tracking store what an outage kept from it."""

from __future__ import annotations

from hedgelab.cli.light import LightParser
from hedgelab.errors import UserError
from hedgelab.tracking.sync import sync


def run(command: str, words: list[str]) -> int:
    """Send what waits, and say what was sent and what had to stay.

    Args:
        command: ``sync``.
        words: Its options.

    Raises:
        UserError: The store cannot be reached, or does not take all of it.
    """
    parser = LightParser(
        command,
        "Send to the tracking store (MLFLOW_TRACKING_URI) what an outage kept from it: metrics, tags, files and ends of runs "
        "that wait under runs/spool/, and runs that went on in the local store (trainer.logger.on_unreachable: local). What "
        "has been sent already is not sent twice.",
    )
    parser.parse(words)
    sent = sync(announce=lambda line: print(f"sync: {line}", flush=True))
    if sent.left:
        raise UserError(f"sync: {len(sent.left)} left: {'; '.join(sent.left)}")
    runs = len(sent.runs)
    print(f"sync: sent what waited of {runs} run{'s' * (runs != 1)}" if runs else "sync: nothing waits")
    return 0
