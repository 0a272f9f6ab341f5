"""One job of a sweep, wherever it runs: makes its members from their configs and trains them together."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from hedgelab.errors import UserError, one_line
from hedgelab.identity import SCHEME
from hedgelab.kernels.allocator import keep_large_blocks
from hedgelab.protocols.hedge import Hedge, measure_hedging
from hedgelab.protocols.ranks import decided_by_rank_zero, on_every_rank, ranks_at_work, say, say_names
from hedgelab.protocols.study import Bench
from hedgelab.protocols.sweep.cells import Parse, Unit
from hedgelab.protocols.sweep.executors import ONE_PROCESS, Processes
from hedgelab.protocols.training_phases import CutShortError, GroupCheckpoints, PhaseRunner, fit_group, outcome_of
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.params import searchable
from hedgelab.tracking.provenance import provenance_tags
from hedgelab.tracking.runs import search_runs
from hedgelab.tracking.store import ensure_store, runs_dir

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

BUSY = "another process is training it"
"""Why a unit was not trained: another process is at it, and may be waited for."""
CELL_TAG = "sweep_cell"
"""The tag that says which cell a run is of: its stable id."""
SCHEME_TAG = "identity_scheme"
"""The tag that says by which rules that id was made (:data:`hedgelab.identity.SCHEME`)."""
_FOREVER = -1.0
_PATIENCE_OF_RANKS = 1200.0  # other ranks wait for what rank zero says, half an hour at most


@dataclass(frozen=True)
class Job:
    """Units that are trained together, below the run ``parent`` of a store; each of several processes gets all of it.

    ``retrain`` trains units that have finished too, all from their beginning. A job that ``waits`` does so for another process
    that is training some of its units.
    """

    command: str
    units: tuple[Unit, ...]
    parent: str
    uri: str
    experiment: str
    parse: Parse
    processes: Processes = ONE_PROCESS
    retrain: bool = False
    waits: bool = False


def finished_run(client: MlflowClient, cell_id: str) -> Run | None:
    """The latest finished run of a cell; None without one."""
    return next(search_runs(client, f"tags.{CELL_TAG} = '{cell_id}' and attributes.status = 'FINISHED'"), None)


def interrupted_run(client: MlflowClient, cell_id: str, parent: str) -> Run | None:
    """The run of a cell below a sweep's that was begun and has come to no end; None without one."""
    below = f"tags.{CELL_TAG} = '{cell_id}' and tags.mlflow.parentRunId = '{parent}'"
    return next(search_runs(client, f"{below} and attributes.status != 'FINISHED'"), None)


def take_locks(folder: Path, ids: Sequence[str], patience: float) -> ExitStack | None:
    """Lock cells, so that no two processes train one at once; None where another process holds one of them.

    The operating system gives them back when this process ends, however that ends. Waits ``patience`` seconds for each that
    another process holds; below zero, for ever.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for name in sorted(ids):  # in one order everywhere, so that two processes never wait in a circle
            try:
                held.enter_context(FileLock(folder / f"{name}.lock").acquire(timeout=patience))
            except Timeout:
                return None
            except (OSError, NotImplementedError):  # a file system without locks
                continue
        return held.pop_all()


def do(job: Job) -> dict[str, str]:
    """Train a job's units; why those failed that did, by name; all :data:`BUSY` where another process is training some.

    Where units that are trained together fail, each half of them is tried again, down to the ones that are to blame; but not
    where several processes train them, for one may have failed while the others went on.
    """
    keep_large_blocks()
    return _attempt(job, job.units)


def _attempt(job: Job, units: Sequence[Unit]) -> dict[str, str]:
    try:
        first = _made(job, units[0])
        return on_every_rank(first.trainer, lambda: _train(job, units, first))
    except CutShortError as cut:
        return {unit.name: str(cut) for unit in units}
    except Exception as error:
        if len(units) == 1:
            return {units[0].name: _reason(error)}
        if job.processes.several:
            reason = f"{_reason(error)} (trained together with others; --sweep.pack 1 tells which is to blame)"
            return {unit.name: reason for unit in units}
        say(f"sweep: {len(units)} cells failed together ({_reason(error)}); trying half of them at a time")
    # What they had reached together is of no use to the halves, and must not make a later sweep train all of them again.
    GroupCheckpoints.forget(runs_dir(job.uri) / "checkpoints", [unit.name for unit in units])
    half = len(units) // 2
    return _attempt(job, units[:half]) | _attempt(job, units[half:])


def _train(job: Job, units: Sequence[Unit], first: Any) -> dict[str, str]:
    """Train units on this rank, as one group; ``first`` is the parsed config of the first of them."""
    with ExitStack() as locks:
        missing = decided_by_rank_zero(lambda: _missing(job, units, locks))
        if missing is None:
            return {unit.name: BUSY for unit in units}
        if not missing:
            return {}
        members = {unit.name: unit for unit in units if unit.name in missing}
        parsed = {name: first if unit is units[0] else _made(job, unit) for name, unit in members.items()}
        trackers = {name: _tracker(job, unit, system_metrics=unit is units[0]) for name, unit in members.items()}
        say_names("sweep: training", missing)

        def begin() -> None:
            for name, tracker in trackers.items():
                tracker.log_config(parsed[name].text())
                tracker.log_hyperparams(searchable(parsed[name].resolved()))

        if job.command == "fit":
            saes, ids = (
                {name: one.model for name, one in parsed.items()},
                {name: one.id for name, one in members.items()},
            )
            fit_group(first.trainer, saes, trackers, first.datamodule, begin, ids)
            return {}
        runner = PhaseRunner(first.trainer, next(iter(trackers.values())), retrain=job.retrain)
        try:
            studies = [
                Hedge(
                    one.model, first.datamodule, first.trainer, one.hedge_options(), outcome_of(one.resolved()),
                    seeds=members[name].seeds, tracker=trackers[name], label=f"{name}/",
                )
                for name, one in parsed.items()
            ]  # fmt: skip
            begin()
            for tracker in trackers.values():
                tracker.log_tags({"protocol": "hedge", **provenance_tags(ranks_at_work())})
            outcomes = measure_hedging(studies, runner)
        except BaseException:
            for tracker in trackers.values():
                tracker.finalize("failed")
            raise
        for tracker, study, outcome in zip(trackers.values(), studies, outcomes, strict=True):
            Bench(tracker=tracker).keep(outcome)
            tracker.log_metrics(_quality(study, runner, tracker), outcome.step)
            tracker.finalize("success" if outcome.failure is None else "failed")
        return {name: one.failure for name, one in zip(members, outcomes, strict=True) if one.failure is not None}


def _made(job: Job, unit: Unit) -> Any:
    """A unit's config, parsed, with its data, model and trainer made."""
    parsed = job.parse(job.command, unit.tree, unit.said)
    parsed.make()
    return parsed


def _tracker(job: Job, unit: Unit, system_metrics: bool) -> MLflowTracker:
    """A unit's run, which is the one that an earlier job of the same sweep has begun, if there is one."""
    tags = {"mlflow.parentRunId": job.parent, CELL_TAG: unit.id, SCHEME_TAG: SCHEME}
    tracker = MLflowTracker(job.experiment, unit.name, tags, uri=job.uri, system_metrics=system_metrics)
    if not job.retrain and (begun := interrupted_run(ensure_store(job.uri), unit.id, job.parent)) is not None:
        tracker.go_on_with(begun.info.run_id)
    return tracker


def _missing(job: Job, units: Sequence[Unit], locks: ExitStack) -> list[str] | None:
    """Names of the units that have to be trained, once this process alone may; None where another process is at them.

    Fits that were being trained together stay together, the finished ones too: their common checkpoint holds all of them.
    """
    ids = {unit.name: unit.id for unit in units}
    patience = 0.0 if not job.waits else _PATIENCE_OF_RANKS if job.processes.several else _FOREVER
    held = take_locks(runs_dir(job.uri) / "locks", list(ids.values()), patience)
    if held is None:
        if job.waits:
            raise UserError("another process is training it; run the same command again when that has ended")
        return None
    locks.enter_context(held)
    root = runs_dir(job.uri) / "checkpoints"
    if job.retrain:
        GroupCheckpoints.forget(root, list(ids))
        return list(ids)
    client = ensure_store(job.uri)
    missing = [name for name, cell_id in ids.items() if finished_run(client, cell_id) is None]
    begun = missing and any(group.members == ids for group in GroupCheckpoints.all_unfinished(root, ids))
    return list(ids) if begun else missing


def _quality(study: Hedge, runner: PhaseRunner, tracker: MLflowTracker) -> dict[str, float]:
    """How well trained the compared SAEs are, from their own runs: ``control/explained_variance``, and so on.

    Means over seeds; with several seeds every seed's own as well (``control/seed0/explained_variance``).
    """
    numbers: dict[str, float] = {}
    for role in ("control", "extended"):
        by_seed = {
            seed: tracker.experiment.get_run(runner.run_ids[f"{study.label}{role}/seed{seed}"]).data.metrics
            for seed in study.seeds
        }
        shared = set.intersection(*(set(metrics) for metrics in by_seed.values()))
        for name in sorted(name.removeprefix("val/") for name in shared if name.startswith("val/")):
            values = {seed: metrics[f"val/{name}"] for seed, metrics in by_seed.items()}
            numbers[f"{role}/{name}"] = sum(values.values()) / len(values)
            if len(values) > 1:
                numbers |= {f"{role}/seed{seed}/{name}": value for seed, value in values.items()}
    return numbers


def _reason(error: Exception) -> str:
    if not isinstance(error, UserError) or os.environ.get("HEDGELAB_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    text = one_line(str(error))
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
