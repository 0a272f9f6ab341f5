"""Phases: fits with a stable id, trained together, and not again where a finished run of them is in the store."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L

from hedgelab import __version__
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.protocols.group_checkpoints import GroupCheckpoints
from hedgelab.protocols.ranks import decided_by_rank_zero, found_by_rank_zero
from hedgelab.saes import SAE, SAEGroup, load_sae, weights_sha256
from hedgelab.saes.io import gathered
from hedgelab.tracking import MemberRecord, MLflowTracker, StepProgressBar
from hedgelab.tracking.runs import search_runs
from hedgelab.training.checkpoints import RunCheckpoint, use_verified_io

TrainerFactory = Callable[..., L.Trainer]
"""Makes a trainer; called with ``logger``, ``callbacks`` and ``enable_checkpointing``."""


@dataclass(frozen=True)
class Phase:
    """One SAE to be trained.

    Attributes:
        name: Name of its run, such as ``control/seed0``.
        config: Plain values that, together, determine its outcome.
        start: Makes the SAE as it is before its first step.
        tracker: The run below which its own stands; None is the runner's.
    """

    name: str
    config: Mapping[str, Any]
    start: Callable[[], SAE]
    tracker: MLflowTracker | None = None

    @cached_property
    def id(self) -> str:
        """Hash of the config and of hedgelab's version."""
        return stable_id(self.config)


class PhaseRunner:
    """Trains phases that share a stream as one group, each in a run of its own below the experiment's.

    Args:
        trainer: Makes the trainer of a group.
        tracker: The parent run; None tracks nothing, and nothing is found again.
        reuse: Take phases that the store has from there.
        announce: Told what happens, in lines.

    Attributes:
        run_ids: The run of every phase that was trained or found, by the phase's name.
    """

    def __init__(
        self,
        trainer: TrainerFactory,
        tracker: MLflowTracker | None = None,
        reuse: bool = True,
        announce: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.trainer, self.tracker, self.reuse, self.announce = trainer, tracker, reuse, announce
        self.run_ids: dict[str, str] = {}

    def train(self, phases: Sequence[Phase], data: ActivationDataModule) -> dict[str, SAE]:
        """The trained SAE of every phase, by name: from the store where it is there, else trained now."""
        begun = decided_by_rank_zero(partial(self._begun, phases))
        found: dict[str, SAE] = {}
        for phase in phases:
            if phase.name not in begun and (sae := found_by_rank_zero(partial(self._finished, phase))) is not None:
                found[phase.name] = sae
        if begun:
            self.announce(f"going on with {', '.join(begun)}")
            found |= self._fit([phase for phase in phases if phase.name in begun], data)
        missing = [phase for phase in phases if phase.name not in found]
        if found.keys() - begun:
            self.announce(f"already trained: {', '.join(name for name in found if name not in begun)}")
        if missing:
            self.announce(f"training {', '.join(phase.name for phase in missing)}")
            found |= self._fit(missing, data)
        return {phase.name: found[phase.name] for phase in phases}

    def _begun(self, phases: Sequence[Phase]) -> list[str]:
        """Names of the phases that were being trained together when something stopped them, not all of them finished."""
        if self.tracker is None or not self.reuse:
            return []
        group = GroupCheckpoints.unfinished(checkpoints_root(self.tracker), {phase.name: phase.id for phase in phases})
        return [] if group is None else list(group.members)

    def _fit(self, phases: Sequence[Phase], data: ActivationDataModule) -> dict[str, SAE]:
        saes = {phase.name: phase.start() for phase in phases}
        trackers: dict[str, MLflowTracker] = {}
        for phase in phases:
            if (above := phase.tracker or self.tracker) is not None:
                trackers[phase.name] = above.child(phase.name, {"phase": phase.name, "phase_id": phase.id})
        ids = {phase.name: phase.id for phase in phases} if self.reuse else None

        def begin() -> None:
            for phase in phases if trackers else []:
                trackers[phase.name].log_hyperparams(dict(phase.config))
                self._link(phase, trackers[phase.name].run_id)

        return fit_group(self.trainer, saes, trackers, data, begin, ids)

    def share(self, phase: Phase, trained: Phase) -> None:
        """Let a phase have the run of another that is the same."""
        self._link(phase, self.run_ids.get(trained.name))

    def _finished(self, phase: Phase) -> SAE | None:
        """The SAE of the phase's latest finished run whose weights are whole; None without one."""
        tracker = phase.tracker or self.tracker
        if tracker is None or not self.reuse:
            return None
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        client = tracker.experiment
        runs = search_runs(client, f"tags.phase_id = '{phase.id}' and attributes.status = 'FINISHED'")
        for run in islice(runs, 5):
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
        if run_id is not None:
            self.run_ids[phase.name] = run_id
        tracker = phase.tracker or self.tracker
        if tracker is not None:
            tracker.log_tags({f"phase.{phase.name}": run_id})


def stable_id(config: Mapping[str, Any]) -> str:
    """Hash of plain values and of hedgelab's version."""
    text = json.dumps({"hedgelab": __version__, **config}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fit_group(
    trainer: TrainerFactory,
    saes: Mapping[str, SAE],
    trackers: Mapping[str, MLflowTracker],
    data: ActivationDataModule,
    begin: Callable[[], None] = lambda: None,
    ids: Mapping[str, str] | None = None,
) -> dict[str, SAE]:
    """Train SAEs on one stream, each recorded in its own run, which ends with the training, well or badly.

    On several ranks all of them call this, from within :func:`~hedgelab.protocols.ranks.on_every_rank`.

    Args:
        trainer: Makes the trainer.
        saes: The SAEs, by name; trained in place, where ranks do not split their latents.
        trackers: Their runs, by the same names; empty for none.
        data: Where activations come from.
        begin: Called when the trainer is there, which from then on ends the runs; they begin no earlier.
        ids: Stable ids of what is trained: a training of the same that was cut short is gone on with, in the same runs.
            None for one that cannot be gone on with; untracked ones cannot either.

    Returns:
        The trained SAEs, whole on every rank, by name.
    """
    keys = {name: name.replace(".", "_") for name in saes}  # a module's name must not contain a dot
    if len(set(keys.values())) < len(keys):
        keys = {name: str(number) for number, name in enumerate(saes)}
    group = None
    if ids is not None and trackers:
        group = GroupCheckpoints(checkpoints_root(next(iter(trackers.values()))), ids)
        for name, run_id in group.runs.items():
            trackers[name].go_on_with(run_id)
    made = trainer(
        logger=list(trackers.values()) or False,
        callbacks=[MemberRecord(keys[name], tracker) for name, tracker in trackers.items()],
        enable_checkpointing=group is not None,
    )
    begin()
    checkpoint = None
    if group is not None:
        runs = {name: tracker.run_id for name, tracker in trackers.items()}
        checkpoint = decided_by_rank_zero(partial(group.begin, made, runs))
        group.use(made)
    loggers = {keys[name]: tracker for name, tracker in trackers.items()}
    module = SAEGroup({keys[name]: sae for name, sae in saes.items()}, loggers)
    made.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
    if group is not None and made.is_global_zero:
        group.end()
    return {name: gathered(sae) for name, sae in saes.items()}


def checkpoints_root(tracker: MLflowTracker) -> Path:
    """Where checkpoints are kept: beside the store."""
    return Path(tracker.save_dir) / "checkpoints"


def trainer_factory(settings: Mapping[str, Any]) -> TrainerFactory:
    """Trainers with the given settings, a progress bar and (where wanted) checkpoints unless those say otherwise."""
    settings = {
        **settings,
        "strategy": copy.deepcopy(settings.get("strategy", "auto")),
    }  # one that no trainer has set up
    kept = next((found for found in settings.get("callbacks") or [] if isinstance(found, RunCheckpoint)), None)

    def make(*, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
        bars: list[L.Callback] = [StepProgressBar()] if settings.get("enable_progress_bar", True) else []
        wanted = options.get("enable_checkpointing", False) and kept is not None
        saving = [RunCheckpoint(**kept.interval)] if wanted and kept is not None else []
        options |= {"enable_checkpointing": bool(saving), "strategy": copy.deepcopy(settings["strategy"])}
        trainer = L.Trainer(**{**settings, **options, "callbacks": [*bars, *callbacks, *saving]})
        use_verified_io(trainer)
        return trainer

    return make
