"""``hedgelab sweep``: check every cell, train what is not finished, draw, and say what failed."""

import os
from collections.abc import Container, Sequence
from contextlib import closing
from dataclasses import replace

from hedgelab.config.tree import config_files, opening_comment
from hedgelab.errors import Stopped, UserError
from hedgelab.glossary import title
from hedgelab.identity import SCHEME, stable_id
from hedgelab.protocols.ranks import say
from hedgelab.protocols.study import Bench, Outcome, Study
from hedgelab.protocols.sweep import report
from hedgelab.protocols.sweep.config import FigureOptions, read_sweep
from hedgelab.protocols.sweep.job import BUSY, CELL_TAG, SCHEME_TAG, Job, Parse, Unit, check_sweep, do, packed, run_of
from hedgelab.protocols.sweep.report import SAMPLES, Row
from hedgelab.protocols.training_phases import GroupCheckpoints
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.listing import aligned
from hedgelab.tracking.provenance import provenance_tags
from hedgelab.tracking.runs import search_runs
from hedgelab.tracking.store import ensure_store, runs_dir, tracking_uri


class Sweep(Study):
    """Run a grid of fits or hedging degrees, packed onto shared activations.

    ``words`` are the options of the command; ``parse`` parses the config of a cell.
    """

    tracked = False  # its run is the one that it had before, where it is run again

    def __init__(self, words: list[str], parse: Parse) -> None:
        counts = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
        if any(count.isdecimal() and int(count) > 1 for count in counts):
            advice = "start it once, it starts its own"
            raise UserError(f"sweep: was started in several processes (by torchrun or srun); {advice}")
        self.lists, self.retrain, self.parse = "--list" in words, "--retrain" in words, parse
        self.grid, self.description = read_sweep(words), opening_comment(config_files(words))
        self.metrics = self.grid.options.figure.y or report.DEFAULT_METRICS[self.grid.options.command]  # that are drawn
        self.failures: dict[str, str] = {}  # why cells failed, by name
        self.run_id = ""

    def run(self, bench: Bench) -> Outcome:
        """Train what is not finished; table and figure are those of all cells."""
        units = check_sweep(self.grid, self.parse)
        uri = units[0].tracking[1] or tracking_uri()
        client = ensure_store(uri)
        finished = {unit.id for unit in units if not self.retrain and run_of(client, unit.id) is not None}
        groups = self._groups(units, finished, uri)
        jobs = {unit.name: f"job {number}" for number, group in enumerate(groups, start=1) for unit in group}
        ended = search_runs(client, f"tags.{CELL_TAG} LIKE '%' and attributes.status = 'FINISHED'")
        older = {run.info.run_name for run in ended if run.data.tags.get(SCHEME_TAG) != SCHEME} & jobs.keys()
        if older and not self.retrain:
            say(
                f"sweep: {len(older)} cells have finished under an earlier release, which did not keep all that decides "
                "their numbers; they are trained anew"
            )
        if self.lists:
            lines = aligned([[unit.id, unit.name, jobs.get(unit.name, "finished")] for unit in units]).splitlines()
            total = f"{len(units)} cells, {len(jobs)} to be trained in {len(groups)} jobs"
            return Outcome(headline=[*lines, total])
        tracker = self._open_run(units, uri)
        self.run_id = str(tracker.run_id)
        try:
            if finished:
                say(f"sweep: {len(finished)} of {len(units)} cells are finished already")
            self._train(groups, tracker, uri)
            rows: list[Row] = []
            passes: list[Row] = []
            for unit in units:
                if (run := run_of(client, unit.id)) is not None:
                    rows += report.rows_of(unit.cell, run)
                    if self.grid.options.command == "fit":
                        passes += report.over_training(unit.cell, run, self.metrics, client.get_metric_history)
                else:
                    self.failures.setdefault(unit.name, "its run did not finish")
            lines = self._report(tracker, rows, passes, len(units))
        except Stopped as stop:
            tracker.finalize("killed")
            raise Stopped(stop.number, "before its end; run the same command again to go on") from stop
        except BaseException:
            tracker.finalize("failed")
            raise
        tracker.finalize("failed" if self.failures else "success")
        return Outcome(headline=lines)

    def _groups(self, units: Sequence[Unit], finished: Container[str], uri: str) -> list[list[Unit]]:
        """What is trained together: fits that were being trained together when something stopped them, then the others.

        The former hold cells that have finished, where the sweep was stopped just as its runs were being ended.
        """
        begun: list[list[Unit]] = []
        if self.grid.options.command == "fit" and not self.retrain:
            by_name, ids = {unit.name: unit for unit in units}, {unit.name: unit.id for unit in units}
            for group in GroupCheckpoints.all_unfinished(runs_dir(uri) / "checkpoints", ids):
                members = [by_name[name] for name in group.members]
                if any(unit.id not in finished for unit in members):
                    begun.append(members)
        taken = {unit.id for group in begun for unit in group}
        missing = [unit for unit in units if unit.id not in finished and unit.id not in taken]
        return [*begun, *packed(missing, self.grid.options.pack)]

    def _open_run(self, units: Sequence[Unit], uri: str) -> MLflowTracker:
        """The sweep's run: the one that it has already, where it was run before."""
        identity = stable_id({"name": self.grid.name, "cells": [unit.id for unit in units]})
        before = next(search_runs(ensure_store(uri), f"tags.sweep = '{identity}'"), None)
        tracker = MLflowTracker(
            units[0].tracking[0], self.grid.name, {"sweep": identity}, self.description, uri,
            run_id=None if before is None else before.info.run_id,
        )  # fmt: skip
        tracker.log_config(self.grid.text)
        tracker.log_tags({"protocol": f"sweep {self.grid.options.command}", **provenance_tags(1)})
        return tracker

    def _train(self, groups: Sequence[Sequence[Unit]], tracker: MLflowTracker, uri: str) -> None:
        """Run the jobs; those that another process is training come last, and are waited for."""
        jobs = [Job(tuple(group), self.run_id, uri, tracker.name, self.retrain) for group in groups]
        cells, done = sum(map(len, groups)), 0
        while jobs:
            busy: list[Job] = []
            with closing(self.grid.options.executor.run(do, jobs, jobs[0].units[0].processes)) as ends:
                for number, failures in ends:
                    job = jobs[number]
                    if isinstance(failures, str):
                        failures = {unit.name: failures for unit in job.units}
                    if BUSY in failures.values():
                        busy.append(replace(job, waits=True))
                        continue
                    self.failures |= failures
                    done += len(job.units)
                    say(f"sweep: {done} of {cells} cells done, {len(self.failures)} failed")
            if busy:
                waited_for = sum(len(job.units) for job in busy)
                say(f"sweep: another process is training {waited_for} cells; waiting for it")
            jobs = busy

    def _report(self, tracker: MLflowTracker, rows: Sequence[Row], passes: Sequence[Row], cells: int) -> list[str]:
        """Log table, numbers and figures; what to say of them."""
        known = {name: title(name) for name in self.metrics}
        titles = {name: short if [*known.values()].count(short) == 1 else name for name, short in known.items()}
        figures = {"sweep.png": report.figure(rows, titles, self.grid.name, self.grid.options.figure)}
        if len({row.values[SAMPLES] for row in passes}) > 1:
            until = self.grid.options.figure.until
            options = FigureOptions(SAMPLES, log_x=True if until else None, until=until)
            figures["curves.png"] = report.figure(passes, titles, f"{self.grid.name} over training", options)
        Bench(tracker=tracker).keep(
            Outcome(
                metrics={"cells": cells, "failed_cells": len(self.failures)},
                tables={"sweep.csv": report.flat(rows)} if rows else {},
                figures={name: drawn for name, drawn in figures.items() if drawn is not None},
                texts={"sweep.json": report.as_json(rows, self.failures)},
            )
        )
        lines = [f"run {tracker.run_id}: {cells - len(self.failures)} of {cells} cells"]
        if rows:
            lines += [f"  {line}" for line in aligned(report.table(rows, self.metrics[:4])).splitlines()]
            folder = tracker.experiment.get_run(tracker.run_id).info.artifact_uri
            shown = ", ".join(f"figures/{name}" for name in figures)
            lines.append(f"figure and table: {folder} ({shown}, sweep.csv, sweep.json)")
        return lines
