"""Phases: fits with a stable id, trained together, and not again where a finished run of them is in the store."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, Timer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError
from hedgelab.identity import deciding, stable_id
from hedgelab.protocols.group_checkpoints import GroupCheckpoints
from hedgelab.protocols.phase_data import PhaseData
from hedgelab.protocols.ranks import decided_by_rank_zero, found_by_rank_zero
from hedgelab.saes import SAE, SAEGroup, load_sae, weights_sha256
from hedgelab.saes.io import gathered
from hedgelab.tracking import MemberRecord, MLflowTracker, RunRecord, StepProgressBar
from hedgelab.tracking.params import searchable
from hedgelab.tracking.runs import search_runs
from hedgelab.training.checkpoints import RunCheckpoint, use_verified_io
from hedgelab.training.guard import FiniteGuard


class CutShortError(UserError):
    """``max_time`` has ended a training before its last step; what it has reached is in a checkpoint."""


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


class TrainerFactory:
    """Makes the trainers of several fits from one set of trainer arguments.

    Every trainer gets copies of the user's callbacks and loggers. The callbacks that every run has (record, progress bar,
    checkpoints) are replaced by those of each fit.

    Args:
        settings: Lightning's trainer arguments.

    Attributes:
        one_at_a_time: Whether SAEs are trained one after the other: the user's callbacks and loggers are made for one SAE.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        callbacks = settings.get("callbacks") or []
        given = callbacks if isinstance(callbacks, list) else [callbacks]
        loggers = settings.get("logger")
        own = (RunRecord, ProgressBar, RunCheckpoint, SaveConfigCallback)
        self._kept = [callback for callback in given if not isinstance(callback, own)]
        self._loggers = [
            logger
            for logger in (loggers if isinstance(loggers, list) else [loggers])
            if isinstance(logger, Logger) and not isinstance(logger, MLflowTracker)
        ]
        self._saving = next((callback for callback in given if isinstance(callback, RunCheckpoint)), None)
        # A strategy that no trainer has set up.
        self._settings = {**settings, "strategy": copy.deepcopy(settings.get("strategy", "auto"))}
        self.one_at_a_time = bool(self._loggers) or any(not isinstance(one, FiniteGuard) for one in self._kept)

    def __call__(
        self, trackers: Sequence[MLflowTracker], callbacks: Sequence[L.Callback], checkpoints: bool = False
    ) -> L.Trainer:
        """A trainer.

        Args:
            trackers: The runs that it logs to, beside the user's other loggers.
            callbacks: Callbacks of this fit.
            checkpoints: Whether it saves checkpoints, as often as the settings say.
        """
        bars: list[L.Callback] = [StepProgressBar()] if self._settings.get("enable_progress_bar", True) else []
        saving = [RunCheckpoint(**self._saving.interval)] if checkpoints and self._saving is not None else []
        options: dict[str, Any] = {
            "logger": [*trackers, *copy.deepcopy(self._loggers)] or False,
            "callbacks": [*bars, *copy.deepcopy(self._kept), *callbacks, *saving],
            "enable_checkpointing": bool(saving) or any(isinstance(one, Checkpoint) for one in self._kept),
            "strategy": copy.deepcopy(self._settings["strategy"]),
        }
        trainer = L.Trainer(**{**self._settings, **options})
        use_verified_io(trainer)
        start_time_limit_anew(trainer)
        return trainer


class PhaseRunner:
    """Trains phases that share a stream as one group, each in a run of its own below the experiment's.

    Args:
        trainer: Makes the trainer of a group.
        tracker: The parent run; None tracks nothing, and nothing is found again.
        reuse: Take phases that the store has from there, and go on with those that were cut short.
        announce: Told what happens, in lines.
        retrain: Train every phase from its beginning, whatever the store has.

    Attributes:
        run_ids: The run of every phase that was trained or found, by the phase's name.
    """

    def __init__(
        self,
        trainer: TrainerFactory,
        tracker: MLflowTracker | None = None,
        reuse: bool = True,
        announce: Callable[[str], None] = lambda line: None,
        retrain: bool = False,
    ) -> None:
        self.trainer, self.tracker, self.reuse, self.announce = trainer, tracker, reuse, announce
        self.retrain = retrain
        self.run_ids: dict[str, str] = {}

    def train(self, phases: Sequence[Phase], data: ActivationDataModule) -> dict[str, SAE]:
        """The trained SAE of every phase, by name: from the store where it is there, else trained now."""
        if self.trainer.one_at_a_time:
            return {name: sae for phase in phases for name, sae in self._train_group([phase], data).items()}
        return self._train_group(phases, data)

    def _train_group(self, phases: Sequence[Phase], data: ActivationDataModule) -> dict[str, SAE]:
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
        ids = {phase.name: phase.id for phase in phases}
        if self.retrain:
            for group in GroupCheckpoints.all_unfinished(checkpoints_root(self.tracker), ids):
                group.end()
        begun = GroupCheckpoints.unfinished(checkpoints_root(self.tracker), ids)
        return [] if begun is None else list(begun.members)

    def _fit(self, phases: Sequence[Phase], data: ActivationDataModule) -> dict[str, SAE]:
        saes = {phase.name: phase.start() for phase in phases}
        trackers: dict[str, MLflowTracker] = {}
        for phase in phases:
            if (above := phase.tracker or self.tracker) is not None:
                trackers[phase.name] = above.child(phase.name, {"phase": phase.name, "phase_id": phase.id})
        ids = {phase.name: phase.id for phase in phases} if self.reuse else None

        def begin() -> None:
            for phase in phases if trackers else []:
                trackers[phase.name].log_hyperparams(searchable(phase.config))
                self._link(phase, trackers[phase.name].run_id)

        return fit_group(self.trainer, saes, trackers, data, begin, ids)

    def share(self, phase: Phase, trained: Phase) -> None:
        """Let a phase have the run of another that is the same."""
        self._link(phase, self.run_ids.get(trained.name))

    def _finished(self, phase: Phase) -> SAE | None:
        """The SAE of the phase's latest finished run whose weights are whole; None without one."""
        tracker = phase.tracker or self.tracker
        if tracker is None or not self.reuse or self.retrain:
            return None
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        client = tracker.experiment
        for run in islice(search_runs(client, f"tags.phase_id = '{phase.id}' and attributes.status = 'FINISHED'"), 5):
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


def outcome_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved config decides the outcome of training, the number of steps left out (:mod:`hedgelab.identity`)."""
    facts = deciding({key: value for key, value in resolved.items() if key != "hedge"})
    return {**facts, "trainer": {key: value for key, value in facts.get("trainer", {}).items() if key != "max_steps"}}


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

    Raises:
        CutShortError: ``max_time`` has ended training before the last step.
    """
    lone = trainer.one_at_a_time and len(saes) == 1
    keys = {name: name.replace(".", "_") for name in saes}  # a module's name must not contain a dot
    if len(set(keys.values())) < len(keys):
        keys = {name: str(number) for number, name in enumerate(saes)}
    group = None
    if ids is not None and trackers:
        group = GroupCheckpoints(checkpoints_root(next(iter(trackers.values()))), ids, lone)
        for name, run_id in group.runs.items():
            trackers[name].go_on_with(run_id)
    records: list[L.Callback] = [MemberRecord("" if lone else keys[name], one) for name, one in trackers.items()]
    made = trainer(list(trackers.values()), [_ReachesTheEnd(), *records], checkpoints=group is not None)
    begin()
    checkpoint = None
    if group is not None:
        runs = {name: tracker.run_id for name, tracker in trackers.items()}
        checkpoint = decided_by_rank_zero(partial(group.begin, made, runs))
        group.use(made)
    if lone:
        ((name, sae),) = saes.items()
        module: L.LightningModule = sae
        data = data.only(name) if isinstance(data, PhaseData) else data
    else:
        loggers = {keys[name]: tracker for name, tracker in trackers.items()}
        module = SAEGroup({keys[name]: sae for name, sae in saes.items()}, loggers)
    made.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
    if group is not None and made.is_global_zero:
        group.end()
    return {name: gathered(sae) for name, sae in saes.items()}


class _ReachesTheEnd(L.Callback):
    """Has a training that ``max_time`` has cut end as one that goes on later, before anything is recorded of its end."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called after the last checkpoint.

        Raises:
            CutShortError: The last step was not reached.
        """
        if was_cut(trainer):
            raise CutShortError(
                f"trainer.max_time: ended training at step {trainer.global_step} of {trainer.max_steps}; run the same command "
                "again to go on from there"
            )


def was_cut(trainer: L.Trainer) -> bool:
    """Whether ``max_time`` has ended training before its last step."""
    left = [timer.time_remaining() for timer in _timers(trainer)]
    return any(seconds is not None and seconds <= 0 for seconds in left) and trainer.global_step != trainer.max_steps


def start_time_limit_anew(trainer: L.Trainer) -> None:
    """Let ``max_time`` count from this start on, where training goes on from a checkpoint: else it would end at once."""
    for timer in _timers(trainer):
        timer.load_state_dict = lambda state_dict: None  # type: ignore[method-assign]


def _timers(trainer: L.Trainer) -> Iterator[Timer]:
    return (callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]


def checkpoints_root(tracker: MLflowTracker) -> Path:
    """Where checkpoints are kept: beside the store."""
    return Path(tracker.save_dir) / "checkpoints"
