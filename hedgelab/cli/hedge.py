"""``hedgelab hedge``: how much an SAE hedges, from its training to the number."""

from __future__ import annotations

from hedgelab.cli.fit import start_store


def run(command: str, words: list[str]) -> int:
    """Train all phases of the hedging degree, measure it, and print it.

    Args:
        command: ``hedge``.
        words: Its options: those of ``fit``, and ``--hedge.*``.

    Raises:
        UserError: Anything the user can mend.
    """
    start_store(words)
    from hedgelab.cli.hedging import run_hedge

    return run_hedge(command, words)
