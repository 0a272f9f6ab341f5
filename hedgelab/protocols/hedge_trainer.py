"""The trainer behind ``hedgelab hedge``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.errors import UserError
from hedgelab.metrics.functional.degree import DegreeScores
from hedgelab.protocols.case_study import LLMProbe, report
from hedgelab.protocols.hedge import Continuations, HedgeOptions, HedgeProtocol, check_live
from hedgelab.protocols.hedge_report import record
from hedgelab.protocols.ranks import on_every_rank
from hedgelab.protocols.training_phases import PhaseRunner, TrainerFactory
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.provenance import provenance_tags
from hedgelab.training.checkpoints.stopping import stopped


class HedgeTrainer(L.Trainer):
    """A trainer that can also measure the hedging degree; ``max_steps`` are the steps of each of its two phases.

    Takes Trainer's arguments. Every phase gets a trainer with the same ones, but for loggers and callbacks. Its
    :class:`~hedgelab.tracking.MLflowTracker`, if it has one, becomes the parent of the phases' runs.

    Attributes:
        outcome_config: Plain values that determine what training gives; phases found in the store with the same ones
            are not trained again. None trains all.
        retrain: Train all phases from their beginning, whatever the store has.
        announce: Told what happens, in lines.
        phase_trainer: Makes the trainers of the phases.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.phase_trainer = TrainerFactory(kwargs)
        super().__init__(**kwargs)
        self.outcome_config: Mapping[str, Any] | None = None
        self.retrain = False
        self.announce: Callable[[str], None] = lambda line: None

    def measure_hedging(
        self,
        model: SAE,
        datamodule: ActivationDataModule,
        hedge: HedgeOptions = HedgeOptions(),  # noqa: B008 (frozen)
    ) -> dict[int, DegreeScores]:
        """Measure how much an SAE hedges: train it, widen it, train on with and without the new latents.

        Args:
            model: The SAE to be trained.
            datamodule: Where activations come from.
            hedge: How the hedging degree is measured.

        Raises:
            UserError: No number of steps, more new latents than directions, or no new latent that ever fires.
        """
        if self.max_steps < 1:
            raise UserError("trainer.max_steps: must be set: it is the number of steps of each phase")
        tracker = next((logger for logger in self.loggers if isinstance(logger, MLflowTracker)), None)
        try:
            scores = on_every_rank(self, lambda: self._hedge(model, datamodule, hedge, tracker))
        except BaseException:
            if tracker is not None:
                tracker.finalize("killed" if stopped() else "failed")
            raise
        if tracker is not None:
            tracker.finalize("success")
        return scores

    hedge = measure_hedging  # the command's name, which the section of its options has as well

    def _hedge(
        self, model: SAE, data: ActivationDataModule, options: HedgeOptions, tracker: MLflowTracker | None
    ) -> dict[int, DegreeScores]:
        if tracker is not None:
            tracker.log_tags({"protocol": "hedge", **provenance_tags(self.world_size)})
        runner = PhaseRunner(self.phase_trainer, tracker, self.outcome_config is not None, self.announce, self.retrain)
        protocol = HedgeProtocol(model, data, self.max_steps, options, runner, self.outcome_config or {})
        try:
            trained = protocol.train()
            self.announce("measuring")
            scores = protocol.measure(trained)
            if tracker is not None:
                record(tracker, scores, 2 * self.max_steps)
                if options.n_new == 1:
                    log_case_studies(tracker, trained, data)
        finally:
            data.teardown("fit")
        check_live(scores, options.n_new)
        return scores


def log_case_studies(tracker: MLflowTracker, trained: Mapping[int, Continuations], data: ActivationDataModule) -> None:
    """A page for every seed: what its one new latent took from the old ones."""
    probe = LLMProbe(data) if isinstance(data, LLMDataModule) else None
    for seed, saes in trained.items():
        tracker.log_text(report(saes.control, saes.extended, probe), f"case_study/seed{seed}.html")
