"""``hedgelab figures``: the paper's toy and theory figures, redrawn from exact populations into one run."""

from __future__ import annotations

from hedgelab.tracking.store import prepare_store_in_background


def run(command: str, words: list[str]) -> int:
    """Draw the figures that a config lists.

    Args:
        command: ``figures``.
        words: Its options.

    Raises:
        UserError: Anything the user can mend.
    """
    if not any(word in ("-h", "--help") or word.startswith("--print_config") for word in words):
        prepare_store_in_background()
    from hedgelab.cli.figures_run import run_figures_command

    return run_figures_command(words)
