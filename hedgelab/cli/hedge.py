"""``hedgelab hedge``: LightningCLI with the hedging protocol as a command."""

from __future__ import annotations

from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from hedgelab.cli.lightning import TYPES, HedgelabCLI, run_cli
from hedgelab.cli.resume import say
from hedgelab.metrics.functional.degree import DegreeScores
from hedgelab.protocols.hedge import HedgeOptions
from hedgelab.protocols.hedge_report import summary_numbers
from hedgelab.protocols.hedge_trainer import HedgeTrainer
from hedgelab.protocols.training_phases import outcome_of
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.params import searchable

_SHOWN = (
    "residual_hedging", "degree", "live_degree", "covariance_degree", "foreign_degree", "projection", "baseline",
    "baseline_std", "noise_floor", "delta_norm", "live_new_latents",
)  # fmt: skip


class HedgeCLI(HedgelabCLI):
    """The sections of ``fit`` and ``hedge``; ``trainer.max_steps`` are the steps of each phase."""

    trainer_type = HedgeTrainer
    types = {**TYPES, "hedge": HedgeOptions, "retrain": bool}  # noqa: RUF012 (read only)
    trainer: HedgeTrainer
    scores: dict[int, DegreeScores]

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The protocol alone."""
        return {self.command: {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of ``fit``, and whether to train what is there already."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--retrain", type=bool, default=False, help="Train all phases, those too that the store has already."
        )

    def before_hedge(self) -> None:
        """Record the resolved config, and by what phases are known again."""
        parser, config = self._parser(self.command), self.config[self.command]
        text = parser.dump(config, skip_none=False)
        resolved = yaml.safe_load(text)
        resolved.pop("config", None)
        self.trainer.outcome_config = self.resumption.outcome(outcome_of(resolved))
        self.resumption.begin(self.trainer)
        self.trainer.retrain = bool(config.retrain)
        self.trainer.announce = lambda line: say(f"hedge: {line}")
        for logger in self.trainer.loggers:
            if isinstance(logger, MLflowTracker):
                logger.log_config(text)
                logger.log_hyperparams(searchable(resolved))

    def after_hedge(self) -> None:
        """The run is over; nothing is left to go on with."""
        self.resumption.finish()

    def hedge(self, model: SAE, datamodule: Any, hedge: HedgeOptions) -> None:
        """Run the protocol and keep what it gives."""
        self.scores = self.trainer.hedge(model, datamodule, hedge)


def run_hedge(command: str, words: list[str]) -> int:
    """Parse, make everything, run, and print the numbers."""
    cli = run_cli(HedgeCLI, command, words)
    assert isinstance(cli, HedgeCLI)
    if cli.trainer.is_global_zero:
        print("\n".join(result_lines(cli.scores, cli.trainer)))
    return 0


def result_lines(scores: dict[int, DegreeScores], trainer: HedgeTrainer) -> list[str]:
    """Name of the run, its key numbers with their spread over seeds, and where the rest is."""
    numbers = summary_numbers(scores)
    logger = trainer.logger
    lines = [f"run {logger.version}" if logger is not None else "untracked run"]
    width = max(map(len, _SHOWN)) + len("hedging/")
    for name in _SHOWN:
        if (value := numbers.get(f"hedging/{name}")) is not None:
            spread = numbers.get(f"hedging/{name}_seed_std")
            lines.append(
                f"  {f'hedging/{name}':<{width}}  {value:.4g}" + ("" if spread is None else f" ± {spread:.2g}")
            )
    if logger is not None:
        lines.append("look at it: hedgelab ui    compare: hedgelab runs")
    return lines
