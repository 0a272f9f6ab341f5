"""``hedgelab balance``: which weighting of a matryoshka SAE's levels leaves a hierarchy's parent clean?"""

from __future__ import annotations

from hedgelab.tracking.store import prepare_store_in_background


def run(command: str, words: list[str]) -> int:
    """Compare fixed, searched and adaptive weights and the credit of outer levels on one toy.

    Args:
        command: ``balance``.
        words: Its options.

    Raises:
        UserError: Anything the user can mend.
    """
    if not any(word in ("-h", "--help") or word.startswith("--print_config") for word in words):
        prepare_store_in_background()
    from hedgelab.cli.balance_run import run_balance_command

    return run_balance_command(words)
