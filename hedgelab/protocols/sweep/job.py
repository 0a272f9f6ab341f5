"""One job of a sweep, wherever it runs: makes its members from their configs and trains them together."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from hedgelab.errors import UserError, one_line
from hedgelab.identity import SCHEME
from hedgelab.kernels.allocator import keep_large_blocks
from hedgelab.protocols.ranks import decided_by_rank_zero, on_every_rank, say, say_names
from hedgelab.protocols.sweep.cells import Parse, ParsedCell, Unit
from hedgelab.protocols.sweep.executors import ONE_PROCESS, Processes
from hedgelab.protocols.sweep.locks import FOREVER, CellLocks
from hedgelab.protocols.sweep.members import CELL_TAG, SCHEME_TAG, Member, measure_hedging, train_fits
from hedgelab.protocols.sweep.report import finished_run, interrupted_run
from hedgelab.protocols.training_phases import CutShortError, GroupCheckpoints, outcome_of
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.store import ensure_store, runs_dir

BUSY = "another process is training it"
"""Why a unit was not trained: another process is at it, and may be waited for."""
_PATIENCE_OF_RANKS = 1200.0  # other ranks wait for what rank zero says, half an hour at most


@dataclass(frozen=True)
class Job:
    """Units that are trained together.

    Attributes:
        command: ``fit`` or ``hedge``.
        units: What is trained.
        parent: Id of the sweep's run.
        uri: Tracking URI.
        experiment: MLflow experiment.
        parse: Parses their configs, in whatever process does the job.
        processes: How many do the job together; each of them gets all of it.
        retrain: Train units that have finished too, all from their beginning.
        waits: Whether to wait for another process that is training some of the units.
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


def do(job: Job) -> dict[str, str]:
    """Train a job's units; why those failed that did, by name; all :data:`BUSY` where another process is training some.

    Where units that are trained together fail, each half of them is tried again, down to the ones that are to blame; but not
    where several processes train them, for one may have failed while the others went on.
    """
    keep_large_blocks()
    return _attempt(job, job.units)


def _attempt(job: Job, units: Sequence[Unit]) -> dict[str, str]:
    try:
        return _train(job, units)
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


def _train(job: Job, units: Sequence[Unit]) -> dict[str, str]:
    first = job.parse(job.command, units[0].tree, units[0].said)
    first.make()
    return on_every_rank(first.trainer, lambda: _train_on_this_rank(job, units, first))


def _train_on_this_rank(job: Job, units: Sequence[Unit], first: ParsedCell) -> dict[str, str]:
    with CellLocks(runs_dir(job.uri) / "locks", [unit.id for unit in units]) as locks:
        missing = decided_by_rank_zero(lambda: _missing(job, units, locks))
        if missing is None:
            return {unit.name: BUSY for unit in units}
        if not missing:
            return {}
        members = [_member(job, unit, first if unit is units[0] else None) for unit in units if unit.name in missing]
        say_names("sweep: training", missing)
        data, trainer = first.datamodule, first.trainer
        if job.command == "hedge":
            return measure_hedging(members, data, trainer, job.retrain)
        train_fits(members, data, trainer)
        return {}


def _missing(job: Job, units: Sequence[Unit], locks: CellLocks) -> list[str] | None:
    """Names of the units that have to be trained, once this process alone may; None where another process is at them.

    Fits that were being trained together stay together, the finished ones too: their common checkpoint holds all of them.
    """
    if not locks.take(0 if not job.waits else _PATIENCE_OF_RANKS if job.processes.several else FOREVER):
        if job.waits:
            raise UserError("another process is training it; run the same command again when that has ended")
        return None
    root, ids = runs_dir(job.uri) / "checkpoints", {unit.name: unit.id for unit in units}
    if job.retrain:
        GroupCheckpoints.forget(root, list(ids))
        return list(ids)
    client = ensure_store(job.uri)
    missing = [unit.name for unit in units if finished_run(client, unit.id) is None]
    begun = missing and any(group.members == ids for group in GroupCheckpoints.all_unfinished(root, ids))
    return list(ids) if begun else missing


def _member(job: Job, unit: Unit, parsed: ParsedCell | None) -> Member:
    """An SAE with its run, which is the one that an earlier job of the same sweep has begun, if there is one."""
    system_metrics = parsed is not None  # of the first alone
    if parsed is None:
        parsed = job.parse(job.command, unit.tree, unit.said)
        parsed.make()
    tags = {"mlflow.parentRunId": job.parent, CELL_TAG: unit.id, SCHEME_TAG: SCHEME}
    tracker = MLflowTracker(job.experiment, unit.name, tags, uri=job.uri, system_metrics=system_metrics)
    if not job.retrain and (run_id := interrupted_run(ensure_store(job.uri), unit.id, job.parent)) is not None:
        tracker.go_on_with(run_id)
    resolved = parsed.resolved()
    return Member(
        unit.name,
        unit.id,
        parsed.model,
        tracker,
        parsed.text(),
        resolved,
        outcome_of(resolved),
        parsed.hedge_options(),
        unit.seeds,
    )


def _reason(error: Exception) -> str:
    if not isinstance(error, UserError) or os.environ.get("HEDGELAB_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    text = one_line(str(error))
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
