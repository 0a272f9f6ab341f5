"""The work of ``hedgelab sweep``: check every cell, train what is not finished, draw, and tell what failed."""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Sequence
from dataclasses import replace

from tqdm import tqdm

from hedgelab.config.tree import config_files, opening_comment
from hedgelab.errors import Stopped, UserError
from hedgelab.identity import SCHEME, stable_id
from hedgelab.protocols.group_checkpoints import GroupCheckpoints
from hedgelab.protocols.sweep.axes import is_number
from hedgelab.protocols.sweep.cells import Parse, Unit, check_sweep, packed
from hedgelab.protocols.sweep.config import Sweep, read_sweep
from hedgelab.protocols.sweep.executors import ONE_PROCESS, InProcess, Outcome
from hedgelab.protocols.sweep.job import BUSY, Job, do, say
from hedgelab.protocols.sweep.members import CELL_TAG, SCHEME_TAG
from hedgelab.protocols.sweep.report import (
    DEFAULT_METRICS,
    Row,
    as_csv,
    as_json,
    figure,
    finished_run,
    rows_of,
    summary,
)
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.provenance import provenance_tags
from hedgelab.tracking.runs import search_runs
from hedgelab.tracking.store import ensure_store, runs_dir, tracking_uri
from hedgelab.training.checkpoints import stop_at_once

FAILED = 1
_SWEEP_TAG = "sweep"


def run_sweep(words: list[str], parse: Parse) -> int:
    """Run the whole, with what parses the configs of its cells; 1 where cells failed."""
    _refuse_several()
    listing, retrain = "--list" in words, "--retrain" in words
    sweep = read_sweep(words)
    units = check_sweep(sweep, parse)
    uri = units[0].tracking[1] or tracking_uri()
    finished = set() if retrain else {unit.id for unit in units if finished_run(ensure_store(uri), unit.id) is not None}
    groups = packed(units, sweep.options.pack) if retrain else _groups(sweep, units, finished, uri)
    if not retrain and (older := _of_another_scheme(uri, {unit.name for group in groups for unit in group})):
        say(
            f"sweep: {older} cells have finished under an earlier release, which did not keep all that decides their numbers; "
            "they are trained anew"
        )
    if listing:
        say("\n".join(listed(units, groups)))
        return 0
    tracker = _parent(sweep, units, uri, opening_comment(config_files(words)))
    try:
        with stop_at_once():
            if finished:
                say(f"sweep: {len(finished)} of {len(units)} cells are finished already")
            failures = _train(sweep, groups, tracker, uri, parse, retrain)
            rows = _rows(units, uri, failures)
            lines = _report(sweep, tracker, rows, failures, len(units))
    except Stopped as stop:
        tracker.finalize("killed")
        raise Stopped(stop.number, "before its end; run the same command again to go on") from stop
    except BaseException:
        tracker.finalize("failed")
        raise
    tracker.finalize("failed" if failures else "success")
    say("\n".join(lines))
    for name, reason in failures.items():
        sys.stderr.write(f"hedgelab: cell '{name}' failed: {reason}\n")
    return FAILED if failures else 0


def _groups(sweep: Sweep, units: Sequence[Unit], finished: Container[str], uri: str) -> list[list[Unit]]:
    """What is trained together: fits that were being trained together when something stopped them, then the others.

    The former hold cells that have finished, where the sweep was stopped just as its runs were being ended.
    """
    begun: list[list[Unit]] = []
    if sweep.options.command == "fit":
        by_name = {unit.name: unit for unit in units}
        root = runs_dir(uri) / "checkpoints"
        for group in GroupCheckpoints.all_unfinished(root, {unit.name: unit.id for unit in units}):
            begun.append([by_name[name] for name in group.members])
    begun = [group for group in begun if any(unit.id not in finished for unit in group)]
    taken = {unit.id for group in begun for unit in group}
    missing = [unit for unit in units if unit.id not in finished and unit.id not in taken]
    return [*begun, *packed(missing, sweep.options.pack)]


def _of_another_scheme(uri: str, names: Container[str]) -> int:
    """How many of the cells with these names have runs that finished under an id made by other rules."""
    query = f"tags.{CELL_TAG} LIKE '%' and attributes.status = 'FINISHED'"
    runs = search_runs(ensure_store(uri), query)
    older = {run.info.run_name for run in runs if run.data.tags.get(SCHEME_TAG) != SCHEME}
    return sum(1 for name in older if name in names)


def _refuse_several() -> None:
    """See that no launcher has started this command several times.

    Raises:
        UserError: One has.
    """
    counts = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if any(count.isdecimal() and int(count) > 1 for count in counts):
        raise UserError(
            "sweep: was started in several processes (by torchrun or srun); start it once: it starts the trainer.devices "
            "processes of each job itself"
        )


def listed(units: Sequence[Unit], groups: Sequence[Sequence[Unit]]) -> list[str]:
    """The cells with their ids and the job that each would run in."""
    place = {unit.id: f"job {number}" for number, group in enumerate(groups, start=1) for unit in group}
    width = max(len(unit.name) for unit in units)
    lines = [f"{unit.id}  {unit.name:<{width}}  {place.get(unit.id, 'finished')}" for unit in units]
    return [*lines, f"{len(units)} cells, {len(place)} to be trained in {len(groups)} jobs"]


def _parent(sweep: Sweep, units: Sequence[Unit], uri: str, description: str | None) -> MLflowTracker:
    """The sweep's run: the one that it has already, where it was run before."""
    client = ensure_store(uri)
    identity = stable_id({"name": sweep.name, "cells": [unit.id for unit in units]})
    before = next(search_runs(client, f"tags.{_SWEEP_TAG} = '{identity}'"), None)
    experiment = units[0].tracking[0]
    if before is not None:
        tracker = MLflowTracker(experiment, uri=uri, run_id=before.info.run_id)
    else:
        tracker = MLflowTracker(experiment, sweep.name, {_SWEEP_TAG: identity}, description, uri)
    tracker.log_config(sweep.text)
    tracker.log_tags({"protocol": f"sweep {sweep.options.command}", **provenance_tags(1)})
    return tracker


def _train(
    sweep: Sweep, groups: Sequence[Sequence[Unit]], tracker: MLflowTracker, uri: str, parse: Parse, retrain: bool
) -> dict[str, str]:
    """Run the jobs; why cells failed, by name. Those that another process is training come last, and are waited for."""
    failures: dict[str, str] = {}
    jobs = [
        Job(
            sweep.options.command,
            tuple(group),
            tracker.run_id or "",
            uri,
            tracker.name,
            parse,
            group[0].processes,
            retrain,
        )
        for group in groups
    ]
    executor, processes = sweep.options.executor, jobs[0].processes if jobs else ONE_PROCESS
    quiet = isinstance(executor, InProcess) and not processes.several  # where every job has a bar of its own
    cells = sum(map(len, groups))
    with tqdm(total=cells, desc="Cells", unit="cell", disable=not jobs or quiet, miniters=1) as bar:
        done = 0
        for waits in (False, True):
            busy: list[Job] = []

            def ended(outcome: Outcome, jobs: Sequence[Job] = jobs, busy: list[Job] = busy) -> None:
                nonlocal done
                job = jobs[outcome.job]
                reasons = outcome.failures
                if reasons is not None and BUSY in reasons.values():
                    busy.append(replace(job, waits=True))
                    return
                failures.update({unit.name: outcome.error for unit in job.units} if reasons is None else reasons)
                done += len(job.units)
                bar.update(len(job.units))
                bar.set_postfix(failed=len(failures))
                if quiet:
                    say(f"sweep: {done} of {cells} cells done, {len(failures)} failed")

            if jobs:
                executor.run(do, jobs, ended, processes)
            if busy and not waits:
                names = sum(len(job.units) for job in busy)
                say(f"sweep: another process is training {names} cells; waiting for it")
            jobs = busy
    return failures


def _rows(units: Sequence[Unit], uri: str, failures: dict[str, str]) -> list[Row]:
    """What every finished cell gave; one without a finished run has failed."""
    rows: list[Row] = []
    client = ensure_store(uri)
    for unit in units:
        run = finished_run(client, unit.id)
        if run is not None:
            rows += rows_of(unit.cells[0], run)
        else:
            failures.setdefault(unit.name, "its run did not finish")
    return rows


def _report(
    sweep: Sweep, tracker: MLflowTracker, rows: Sequence[Row], failures: dict[str, str], cells: int
) -> list[str]:
    """Log table, numbers and figure; what to tell the user."""
    options = sweep.options.figure
    metrics = options.y or DEFAULT_METRICS[sweep.options.command]
    tracker.log_metrics({"cells": cells, "failed_cells": len(failures)}, 0)
    tracker.log_text(as_json(rows, failures), "sweep.json")
    lines = [f"run {tracker.run_id}: {cells - len(failures)} of {cells} cells"]
    if not rows:
        return lines
    tracker.log_text(as_csv(rows), "sweep.csv")
    drawn = figure(rows, options.x, metrics, sweep.name, options.log_x, options.log_y)
    if drawn is not None:
        tracker.log_figure(drawn, "figures/sweep.png")
    lines += _table(rows, metrics[:4])
    folder = tracker.experiment.get_run(tracker.run_id).info.artifact_uri
    return [*lines, f"figure and table: {folder} (figures/sweep.png, sweep.csv, sweep.json)"]


def _table(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """Means over seeds with their spread, aligned."""
    table = [["line", *dict.fromkeys(key.rsplit(".", 1)[-1] for row in rows for key in row.values), *metrics]]
    axes = list(dict.fromkeys(key for row in rows for key in row.values))
    for place in summary(rows):
        shown = [str(place["line"]), *(_short(place.get(key, "")) for key in axes)]
        for name in metrics:
            found = place["metrics"].get(name)
            spread = "" if found is None or found["std"] is None else f" ± {found['std']:.2g}"
            shown.append("" if found is None else f"{found['mean']:.4g}{spread}")
        table.append(shown)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]


def _short(value: object) -> str:
    return f"{value:g}" if is_number(value) else str(value)
