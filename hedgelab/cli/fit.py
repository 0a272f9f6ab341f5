"""``hedgelab fit|validate|test``: what can be said before torch is imported, then LightningCLI."""

from __future__ import annotations

from hedgelab.config.tree import compose
from hedgelab.tracking.store import prepare_store_in_background


def run(command: str, words: list[str]) -> int:
    """Run one of LightningCLI's subcommands.

    Args:
        command: ``fit``, ``validate`` or ``test``.
        words: Its options.

    Raises:
        UserError: Anything the user can mend.
    """
    start_store(words)
    from hedgelab.cli.lightning import run_lightning

    return run_lightning(command, words)


def start_store(words: list[str]) -> None:
    """Have an absent tracking store made while torch is imported, if these options lead to a tracked run."""
    only_shows = any(word in ("-h", "--help") or word.startswith(("--help", "--print_config")) for word in words)
    trainer = compose(words).get("trainer")
    tracked = not isinstance(trainer, dict) or trainer.get("logger") is not False
    if tracked and not only_shows:
        prepare_store_in_background()
