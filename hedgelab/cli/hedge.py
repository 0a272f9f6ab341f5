"""``hedgelab hedge``: the config of ``fit`` and one section more, for a study that trains several SAEs."""

from lightning.pytorch.cli import LightningArgumentParser

from hedgelab.cli.lightning import TYPES
from hedgelab.cli.resume import ResumableCLI
from hedgelab.cli.studies import conduct
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.protocols.hedge import Hedge, HedgeOptions
from hedgelab.protocols.ranks import say
from hedgelab.protocols.study import Bench
from hedgelab.protocols.training_phases import PhaseTrainer, outcome_of
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker

_DEFAULTS = HedgeOptions()


class HedgeTrainer(PhaseTrainer):
    """A trainer with the command as a method, from whose signature LightningCLI takes the section ``hedge``."""

    def measure_hedging(self, model: SAE, datamodule: ActivationDataModule, hedge: HedgeOptions = _DEFAULTS) -> None:
        """Measure how much an SAE hedges: train it, widen it, train on with and without the new latents."""

    hedge = measure_hedging  # jsonargparse has a group of the method's own name, and one of its argument's


class HedgeCLI(ResumableCLI):
    """The sections of ``fit`` and ``hedge``; ``trainer.max_steps`` are the steps of each phase."""

    trainer_type = HedgeTrainer
    types = {**TYPES, "hedge": HedgeOptions}  # noqa: RUF012 (read only)
    trainer: PhaseTrainer

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The study alone."""
        return {self.command: {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of ``fit``, and whether to train what is there already."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--retrain", type=bool, default=False, help="Train all phases, those too that the store has already."
        )

    def hedge(self, model: SAE, datamodule: ActivationDataModule, hedge: HedgeOptions) -> None:
        """Run the study in the trainer's MLflow run, if it has one, and print the numbers."""
        tracker = next((logger for logger in self.trainer.loggers if isinstance(logger, MLflowTracker)), None)
        outcome = self.begin(tracker, outcome_of(self.resolved()))
        study = Hedge(model, datamodule, self.trainer, hedge, outcome, bool(self.section.retrain))
        say("\n".join(conduct(study, Bench(tracker=tracker), self.text())))
        self.finish()
