"""Phases: fits with a stable id, trained together, gone on with where they were cut short, and not again once finished."""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, Timer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError
from hedgelab.identity import deciding, stable_id
from hedgelab.protocols.layer_data import LayerData
from hedgelab.protocols.phase_data import PhaseData
from hedgelab.protocols.ranks import decided_by_rank_zero, say_names
from hedgelab.saes import SAE, SAEGroup, load_sae, weights_sha256
from hedgelab.saes.io import gathered
from hedgelab.tracking import MemberRecord, MLflowTracker, RunRecord, StepProgressBar
from hedgelab.tracking.params import searchable
from hedgelab.tracking.runs import SAE_TAG, search_runs
from hedgelab.training.checkpoints import RunCheckpoint, RunFolder, newest_whole
from hedgelab.training.flags import accelerator
from hedgelab.training.guard import FiniteGuard

_PATIENCE = 60.0


class CutShortError(UserError):
    """``max_time`` has ended a training before its last step; what it has reached is in a checkpoint."""


@dataclass(frozen=True)
class Phase:
    """One SAE to be trained."""

    name: str
    config: Mapping[str, Any]  # plain values that together determine its outcome
    start: Callable[[], SAE]  # makes the SAE as it is before its first step
    tracker: MLflowTracker | None = None  # the run below which its own stands; None: nothing is tracked or found again

    @cached_property
    def id(self) -> str:
        """Hash of the config and of hedgelab's version."""
        return stable_id(self.config)


class PhaseTrainer(L.Trainer):
    """A trainer that makes the trainers of several fits from its own arguments.

    SAEs are trained ``one_at_a_time`` where there are callbacks and loggers of the user's, which are made for one SAE.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs["accelerator"] = accelerator(kwargs.get("accelerator", "auto"))
        self._remember(kwargs)
        super().__init__(**kwargs)

    def _remember(self, settings: dict[str, Any]) -> None:
        """Keep the arguments as they are before a trainer sets up its strategy."""
        self._given = {**settings, "strategy": copy.deepcopy(settings.get("strategy", "auto"))}
        callbacks, loggers = (
            given if isinstance(given, list) else [given] for given in (settings.get("callbacks"), settings.get("logger"))
        )
        of_every_run = (RunRecord, ProgressBar, RunCheckpoint, SaveConfigCallback)
        self._own_callbacks = [one for one in callbacks if one is not None and not isinstance(one, of_every_run)]
        self._own_loggers = [one for one in loggers if isinstance(one, Logger) and not isinstance(one, MLflowTracker)]
        self._saving = next((one for one in callbacks if isinstance(one, RunCheckpoint)), None)
        watching = [one for one in self._own_callbacks if not isinstance(one, FiniteGuard)]
        self.one_at_a_time = bool(self._own_loggers or watching)

    def another(self, trackers: Sequence[MLflowTracker], callbacks: Sequence[L.Callback], checkpoints: bool) -> L.Trainer:
        """A trainer with copies of the user's callbacks and loggers, and those of one fit."""
        bars: list[L.Callback] = [StepProgressBar()] if self._given.get("enable_progress_bar", True) else []
        saving = [RunCheckpoint(**self._saving.interval)] if checkpoints and self._saving is not None else []
        own: dict[str, Any] = {
            "logger": [*trackers, *copy.deepcopy(self._own_loggers)] or False,
            "callbacks": [*bars, *copy.deepcopy(self._own_callbacks), *callbacks, *saving],
            "enable_checkpointing": bool(saving) or any(isinstance(one, Checkpoint) for one in self._own_callbacks),
            "strategy": copy.deepcopy(self._given["strategy"]),
        }
        trainer = L.Trainer(**{**self._given, **own})
        start_time_limit_anew(trainer)
        return trainer


class PhaseRunner:
    """Trains phases that share a stream as one group, each in a run of its own.

    With ``reuse``, phases that the store has are taken from there, and those that were cut short are gone on with; with
    ``retrain`` every phase is trained from its beginning all the same. ``run_ids`` are the runs of all phases so far, by name.
    """

    def __init__(self, trainer: PhaseTrainer, reuse: bool = True, retrain: bool = False) -> None:
        self.trainer, self.reuse, self.retrain = trainer, reuse, retrain
        self.run_ids: dict[str, str] = {}

    @classmethod
    def of_study(cls, steps: int, checkpoint_steps: int) -> Self:
        """A runner for studies that have no trainer in their configs: phases of so many steps."""
        saving = RunCheckpoint(save_last=True, save_top_k=0, every_n_train_steps=checkpoint_steps)
        trainer = PhaseTrainer(
            max_steps=steps, logger=False, callbacks=[saving], devices=1, num_sanity_val_steps=0, use_distributed_sampler=False,
            enable_model_summary=False, log_every_n_steps=max(1, min(100, steps // 4)),
        )  # fmt: skip
        return cls(trainer)

    def train(self, phases: Sequence[Phase], data: ActivationDataModule) -> dict[str, SAE]:
        """The trained SAE of every phase, by name: from the store where it is there, else trained now; equal ones once."""
        first: dict[str, Phase] = {}
        for phase in phases:
            first.setdefault(phase.id, phase)
        trained: dict[str, SAE] = {}
        for group in [[one] for one in first.values()] if self.trainer.one_at_a_time else [list(first.values())]:
            trained |= self._train_group(group, data)
        for phase in phases:
            if (same := first[phase.id]) is not phase:
                trained[phase.name] = trained[same.name]
                self._link(phase, self.run_ids.get(same.name))
        return trained

    def _train_group(self, phases: Sequence[Phase], data: ActivationDataModule) -> dict[str, SAE]:
        names = decided_by_rank_zero(partial(self._begun, phases))
        begun = [phase for phase in phases if phase.name in names]
        others = [phase for phase in phases if phase.name not in names]
        found = {phase.name: decided_by_rank_zero(partial(self._finished, phase)) for phase in others}
        missing = [phase for phase in others if found[phase.name] is None]
        trained = {name: sae for name, sae in found.items() if sae is not None}
        if trained:
            say_names("already trained:", list(trained))
        for what, some in (("going on with", begun), ("training", missing)):
            if some:
                say_names(what, [phase.name for phase in some])
                trained |= self._fit(some, data)
        return trained

    def _begun(self, phases: Sequence[Phase]) -> list[str]:
        """Names of the phases that were being trained together when something stopped them, not all of them finished."""
        if (tracker := phases[0].tracker) is None or not self.reuse:
            return []
        ids = {phase.name: phase.id for phase in phases}
        groups = GroupCheckpoints.all_unfinished(Path(tracker.save_dir) / "checkpoints", ids)
        if not self.retrain:
            return list(groups[0].members) if groups else []
        for group in groups:
            group.end()
        return []

    def _finished(self, phase: Phase) -> SAE | None:
        """The SAE of the phase's latest finished run whose weights are whole; None without one."""
        if phase.tracker is None or not self.reuse or self.retrain:
            return None
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        client = phase.tracker.experiment
        for run in islice(search_runs(client, f"tags.phase_id = '{phase.id}' and attributes.status = 'FINISHED'"), 5):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    path = client.download_artifacts(run.info.run_id, "sae", folder)
                    whole = weights_sha256(path) == run.data.tags.get(SAE_TAG)
                except Exception:  # artifacts that are gone are as good as a phase that was never run
                    continue
                if whole:
                    self._link(phase, run.info.run_id)
                    return load_sae(path)
        return None

    def _fit(self, phases: Sequence[Phase], data: ActivationDataModule) -> dict[str, SAE]:
        trackers = {
            phase.name: phase.tracker.child(phase.name, {"phase": phase.name, "phase_id": phase.id})
            for phase in phases
            if phase.tracker is not None
        }

        def begin() -> None:
            for phase in phases if trackers else []:
                trackers[phase.name].log_hyperparams(searchable(phase.config))
                self._link(phase, trackers[phase.name].run_id)

        saes = {phase.name: phase.start() for phase in phases}
        ids = {phase.name: phase.id for phase in phases} if self.reuse else None
        return fit_group(self.trainer, saes, trackers, data, begin, ids)

    def _link(self, phase: Phase, run_id: str | None) -> None:
        """Say in the run above where the phase's run is; it may stand below another."""
        if run_id is not None:
            self.run_ids[phase.name] = run_id
        if phase.tracker is not None:
            phase.tracker.log_tags({f"phase.{phase.name}": run_id})


def outcome_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved config decides the outcome of training, the number of steps left out (:mod:`hedgelab.identity`)."""
    facts = deciding({key: value for key, value in resolved.items() if key != "hedge"})
    return {**facts, "trainer": {key: value for key, value in facts.get("trainer", {}).items() if key != "max_steps"}}


def fit_group(
    trainer: PhaseTrainer,
    saes: Mapping[str, SAE],
    trackers: Mapping[str, MLflowTracker],
    data: ActivationDataModule,
    begin: Callable[[], None] = lambda: None,
    ids: Mapping[str, str] | None = None,
) -> dict[str, SAE]:
    """Train SAEs on one stream, each recorded in the run of its name, which ends with the training, well or badly.

    The SAEs that are returned are complete on every rank. Runs begin with ``begin()``, when the trainer is there that ends
    them. A tracked training of the same ``ids`` that was cut short is gone on with, in the same runs. On several ranks all of
    them call this, within :func:`~hedgelab.protocols.ranks.on_every_rank`.
    """
    lone = trainer.one_at_a_time and len(saes) == 1
    keys = {name: "" if lone else name.replace(".", "_") for name in saes}  # a module's name must not contain a dot
    if len(set(keys.values())) < len(keys):
        keys = {name: str(number) for number, name in enumerate(saes)}
    group = None
    if ids is not None and trackers:
        root = Path(next(iter(trackers.values())).save_dir) / "checkpoints"  # beside the store
        group = GroupCheckpoints(root, ids, lone)
        for name, run_id in group.folder.members.items():
            if run_id is not None:
                trackers[name].go_on_with(run_id)
    records: list[L.Callback] = [MemberRecord(keys[name], tracker) for name, tracker in trackers.items()]
    made = trainer.another(list(trackers.values()), [_ReachesTheEnd(), *records], checkpoints=group is not None)
    begin()
    checkpoint = None
    saving = next((one for one in made.checkpoint_callbacks if isinstance(one, RunCheckpoint)), None)
    if group is not None and saving is not None:
        checkpoint = decided_by_rank_zero(partial(group.begin, {name: one.run_id for name, one in trackers.items()}))
        saving.folder, saving.dirpath = group.folder, str(group.folder.path)
    if isinstance(data, (PhaseData, LayerData)):
        data = data.renamed(keys)
    members, loggers = {keys[name]: saes[name] for name in saes}, {keys[name]: trackers[name] for name in trackers}
    module = members[""] if lone else SAEGroup(members, loggers)
    made.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
    if group is not None and made.is_global_zero:
        group.end()
    return {name: gathered(sae) for name, sae in saes.items()}


class GroupCheckpoints:
    """The checkpoints of SAEs that are trained together, found again by what is trained: their stable ids by name.

    They are in ``runs/checkpoints/group-<hash>/``. Those of a ``lone`` member are an SAE's and not a group's.
    """

    def __init__(self, root: Path, members: Mapping[str, str], lone: bool = False) -> None:
        self.members = dict(members)
        digest = hashlib.sha256(json.dumps(self.members, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = RunFolder(root / f"group-{digest}{'-lone' if lone else ''}")

    @classmethod
    def all_in(cls, root: Path) -> list[Self]:
        """All groups that have left checkpoints."""
        abouts = ((path, RunFolder(path).about.get("group")) for path in sorted(root.glob("group-*/")))
        return [cls(root, group, path.name.endswith("-lone")) for path, group in abouts if isinstance(group, dict)]

    @classmethod
    def all_unfinished(cls, root: Path, members: Mapping[str, str]) -> list[Self]:
        """The groups of some of these members whose training was cut short."""
        return [group for group in cls.all_in(root) if group.members and group.members.items() <= members.items()]

    @classmethod
    def forget(cls, root: Path, names: Sequence[str]) -> None:
        """Remove the checkpoints of all groups whose members are these, or phases of these (``name/...``)."""
        own = tuple(f"{name}/" for name in names)
        for group in cls.all_in(root):
            if all(f"{member}/".startswith(own) for member in group.members):
                shutil.rmtree(group.folder.path, ignore_errors=True)

    def begin(self, runs: Mapping[str, str | None]) -> Path | None:
        """Claim the folder, on rank zero; the checkpoint to go on from, None to start from the beginning."""
        if self.folder.claim(_PATIENCE) and not self.folder.about:
            self.folder.release()
            raise UserError(f"another process has just trained {', '.join(self.members)}; run the same command again")
        self.folder.note(group=self.members, members=dict(runs))
        return newest_whole(self.folder.path)

    def end(self) -> None:
        """Training has ended well, and what came of it is kept elsewhere."""
        self.folder.release()
        shutil.rmtree(self.folder.path, ignore_errors=True)


class _ReachesTheEnd(L.Callback):
    """Has a training that ``max_time`` has cut end as one that goes on later, before anything is recorded of its end."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called after the last checkpoint."""
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
