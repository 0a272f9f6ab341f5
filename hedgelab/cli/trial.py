"""``hedgelab trial``: measures of hedging that need no ground truth, judged where there is one."""

from __future__ import annotations

from hedgelab.tracking.store import prepare_store_in_background


def run(command: str, words: list[str]) -> int:
    """Train and measure every SAE of a trial.

    Args:
        command: ``trial``.
        words: Its options.

    Raises:
        UserError: Anything the user can mend.
    """
    if not any(word in ("-h", "--help") or word.startswith("--print_config") for word in words):
        prepare_store_in_background()
    from hedgelab.cli.trial_run import run_trial_command

    return run_trial_command(words)
