"""Phases: fits with a stable id, trained together, and not again where a finished run of them is in the store."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L

from hedgelab import __version__
from hedgelab.protocols.phase_data import PhaseData
from hedgelab.saes import SAE, SAEGroup, load_sae, weights_sha256
from hedgelab.tracking import MemberRecord, MLflowTracker, StepProgressBar

TrainerFactory = Callable[..., L.Trainer]
"""Makes a trainer; called with ``logger``, ``callbacks`` and ``enable_checkpointing``."""


@dataclass(frozen=True)
class Phase:
    """One SAE to be trained.

    Attributes:
        name: Name of its run, such as ``control/seed0``.
        config: Plain values that, together, determine its outcome.
        start: Makes the SAE as it is before its first step.
    """

    name: str
    config: Mapping[str, Any]
    start: Callable[[], SAE]

    @cached_property
    def id(self) -> str:
        """Hash of the config and of hedgelab's version."""
        text = json.dumps({"hedgelab": __version__, **self.config}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class PhaseRunner:
    """Trains phases that share a stream as one group, each in a run of its own below the experiment's.

    Args:
        trainer: Makes the trainer of a group.
        tracker: The parent run; None tracks nothing, and nothing is found again.
        reuse: Take phases that the store has from there.
        announce: Told what happens, in lines.
    """

    def __init__(
        self,
        trainer: TrainerFactory,
        tracker: MLflowTracker | None = None,
        reuse: bool = True,
        announce: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.trainer, self.tracker, self.reuse, self.announce = trainer, tracker, reuse, announce

    def train(self, phases: Sequence[Phase], data: PhaseData) -> dict[str, SAE]:
        """The trained SAE of every phase, by name: from the store where it is there, else trained now."""
        found = {phase.name: sae for phase in phases if (sae := self._finished(phase)) is not None}
        missing = [phase for phase in phases if phase.name not in found]
        if found:
            self.announce(f"already trained: {', '.join(found)}")
        if missing:
            self.announce(f"training {', '.join(phase.name for phase in missing)}")
            found |= self._fit(missing, data)
        return {phase.name: found[phase.name] for phase in phases}

    def _fit(self, phases: Sequence[Phase], data: PhaseData) -> dict[str, SAE]:
        saes = {phase.name: phase.start() for phase in phases}
        trackers: dict[str, MLflowTracker] = {}
        if self.tracker is not None:
            trackers = {p.name: self.tracker.child(p.name, {"phase": p.name, "phase_id": p.id}) for p in phases}
        trainer = self.trainer(
            logger=list(trackers.values()) or False,
            callbacks=[MemberRecord(name, tracker) for name, tracker in trackers.items()],
            enable_checkpointing=False,
        )
        for phase in phases if trackers else []:  # from here on the trainer ends the runs, well or badly
            trackers[phase.name].log_hyperparams(dict(phase.config))
            self._link(phase, trackers[phase.name].run_id)
        trainer.fit(SAEGroup(saes, trackers), datamodule=data)
        return saes

    def _finished(self, phase: Phase) -> SAE | None:
        """The SAE of the phase's latest finished run whose weights are whole; None without one."""
        if self.tracker is None or not self.reuse:
            return None
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        client = self.tracker.experiment
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(
            experiments, f"tags.phase_id = '{phase.id}' and attributes.status = 'FINISHED'", max_results=5
        )
        for run in runs:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    path = client.download_artifacts(run.info.run_id, "sae", folder)
                    whole = weights_sha256(path) == run.data.tags.get("weights_sha256")
                except Exception:  # artifacts that are gone are as good as a phase that was never run
                    continue
                if whole:
                    self._link(phase, run.info.run_id)
                    return load_sae(path)
        return None

    def _link(self, phase: Phase, run_id: str | None) -> None:
        """Say in the parent run where the phase's run is; it may stand below another parent."""
        if self.tracker is not None:
            self.tracker.log_tags({f"phase.{phase.name}": run_id})


def trainer_factory(settings: Mapping[str, Any]) -> TrainerFactory:
    """Trainers with the given settings, and a progress bar unless those say otherwise."""

    def make(*, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
        bars: list[L.Callback] = [StepProgressBar()] if settings.get("enable_progress_bar", True) else []
        return L.Trainer(**{**settings, **options, "callbacks": [*bars, *callbacks]})

    return make
