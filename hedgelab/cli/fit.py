"""``hedgelab fit|validate|test|hedge``: what can be said before torch is imported, then LightningCLI."""

from hedgelab.cli.startup import defer_torchmetrics
from hedgelab.config.tree import compose


def run(command: str, words: list[str]) -> int:
    """Run one of LightningCLI's subcommands."""
    compose(words)  # a file that cannot be read is told before torch is imported
    defer_torchmetrics()
    from hedgelab.cli.lightning import HedgelabCLI, run_cli, summary
    from hedgelab.cli.resume import ResumableCLI
    from hedgelab.kernels.allocator import keep_large_blocks

    if command == "hedge":
        from hedgelab.cli.hedge import HedgeCLI

        run_cli(HedgeCLI, command, words)
        return 0
    keep_large_blocks()
    cli = run_cli(ResumableCLI if command == "fit" else HedgelabCLI, command, words)
    if cli.trainer.is_global_zero:
        print(summary(cli.trainer))
    return 0
