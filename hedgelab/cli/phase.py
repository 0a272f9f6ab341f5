"""``hedgelab phase``: a quantity of trained toy SAEs over two axes, as figures and a table in one run."""

from __future__ import annotations

from hedgelab.tracking.store import prepare_store_in_background


def run(command: str, words: list[str]) -> int:
    """Train and measure a phase diagram.

    Args:
        command: ``phase``.
        words: Its options.

    Raises:
        UserError: Anything the user can mend.
    """
    if not any(word in ("-h", "--help") or word.startswith("--print_config") for word in words):
        prepare_store_in_background()
    from hedgelab.cli.phase_run import run_phase_command

    return run_phase_command(words)
