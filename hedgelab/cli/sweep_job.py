"""One job of a sweep, wherever it runs: makes its members from their configs and trains them together."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from hedgelab.cli.hedging import outcome_of
from hedgelab.cli.sweep_cells import HedgeCell, Unit, parse_cell
from hedgelab.errors import UserError, one_line
from hedgelab.kernels.allocator import keep_large_blocks
from hedgelab.protocols.ranks import on_every_rank
from hedgelab.protocols.sweep import CELL_TAG, Member, measure_hedging, train_fits
from hedgelab.protocols.sweep_executors import ONE_PROCESS, Processes
from hedgelab.protocols.sweep_report import finished_run, interrupted_run
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.store import ensure_store

_MOST_NAMES = 4


@dataclass(frozen=True)
class Job:
    """Units that are trained together.

    Attributes:
        command: ``fit`` or ``hedge``.
        units: What is trained.
        parent: Id of the sweep's run.
        uri: Tracking URI.
        experiment: MLflow experiment.
        processes: How many do the job together; each of them gets all of it.
    """

    command: str
    units: tuple[Unit, ...]
    parent: str
    uri: str
    experiment: str
    processes: Processes = ONE_PROCESS


def do(job: Job) -> dict[str, str]:
    """Train a job's units; why those failed that did, by name.

    Where units that are trained together fail, each half of them is tried again, down to the ones that are to blame; but not
    where several processes train them, for one may have failed while the others went on.
    """
    keep_large_blocks()
    if not job.processes.several and _all_finished(job):  # by the job of a sweep that was killed
        return {}
    return _attempt(job, job.units)


def _all_finished(job: Job) -> bool:
    client = ensure_store(job.uri)
    return all(finished_run(client, unit.id) is not None for unit in job.units)


def _attempt(job: Job, units: Sequence[Unit]) -> dict[str, str]:
    try:
        return _train(job, units)
    except Exception as error:
        if len(units) == 1:
            return {units[0].name: _reason(error)}
        if job.processes.several:
            reason = f"{_reason(error)} (trained together with others; --sweep.pack 1 tells which is to blame)"
            return {unit.name: reason for unit in units}
        _announce(f"{len(units)} cells failed together ({_reason(error)}); trying half of them at a time")
    half = len(units) // 2
    return _attempt(job, units[:half]) | _attempt(job, units[half:])


def _train(job: Job, units: Sequence[Unit]) -> dict[str, str]:
    members: list[Member] = []
    for unit in units:
        cell = parse_cell(job.command, unit.tree, unit.said)
        cell.make()
        if not members:
            data, trainer = cell.datamodule, cell.trainer
        tags = {"mlflow.parentRunId": job.parent, CELL_TAG: unit.id}
        tracker = MLflowTracker(job.experiment, unit.name, tags, uri=job.uri, system_metrics=not members)
        if (run_id := interrupted_run(ensure_store(job.uri), unit.id, job.parent)) is not None:
            tracker.go_on_with(run_id)
        resolved = cell.resolved()
        options = cell.config_init[job.command].hedge if isinstance(cell, HedgeCell) else None
        members.append(
            Member(
                unit.name,
                unit.id,
                cell.model,
                tracker,
                cell.text(),
                resolved,
                outcome_of(resolved),
                options,
                unit.seeds,
            )
        )
    _announce(f"training {', '.join(unit.name for unit in units)}")
    factory = trainer.phase_trainer
    if job.command == "hedge":
        return on_every_rank(trainer, lambda: measure_hedging(members, data, factory, trainer.max_steps, _announce))
    on_every_rank(trainer, lambda: train_fits(members, data, factory))
    return {}


def _reason(error: Exception) -> str:
    if not isinstance(error, UserError) or os.environ.get("HEDGELAB_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    text = one_line(str(error))
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _announce(line: str) -> None:
    """Say what happens, of long lists of names the first only."""
    names = line.split(", ")
    shown = ", ".join(names if len(names) <= _MOST_NAMES else [*names[:_MOST_NAMES], f"… ({len(names)} in all)"])
    print(f"sweep: {shown}", flush=True)
