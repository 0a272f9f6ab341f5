"""Units of a sweep: parsed and checked, and trained together as one job, wherever it runs."""

import json
import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from hedgelab.config.tree import Tree
from hedgelab.errors import UserError, one_line
from hedgelab.identity import SCHEME, deciding, stable_id
from hedgelab.kernels.allocator import keep_large_blocks
from hedgelab.protocols.hedge import Hedge, measure_hedging
from hedgelab.protocols.layer_data import LayerData
from hedgelab.protocols.ranks import decided_by_rank_zero, on_every_rank, ranks_at_work, say, say_names
from hedgelab.protocols.study import Bench
from hedgelab.protocols.sweep.config import Cell, Grid, with_seed
from hedgelab.protocols.sweep.executors import Processes
from hedgelab.protocols.training_phases import CutShortError, GroupCheckpoints, PhaseRunner, fit_group, outcome_of
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.params import searchable
from hedgelab.tracking.provenance import provenance_tags
from hedgelab.tracking.runs import PARENT_TAG, search_runs
from hedgelab.tracking.store import ensure_store, runs_dir

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

Parse = Callable[[str, Tree, Sequence[str]], Any]
"""Parses a command's config, given the options in which the user names folders: ``hedgelab.cli.cells.parse_cell``."""


@dataclass(frozen=True)
class Unit:
    """What is trained as one member: a cell; for the hedging degree, the cells that differ in their seed only.

    Its finished run is known by ``id``, a hash of all that determines its outcome. Units with the same ``stream`` read the
    same activations and are trained together. ``seeds`` are those of a hedging degree, None leaves them to the config.
    """

    name: str
    id: str
    cell: Cell  # the first
    parse: Callable[[], Any]  # its config, parsed; nothing is made yet
    seeds: tuple[int, ...] | None
    stream: str
    tracking: tuple[str, str | None]  # experiment and URI
    processes: Processes


def check_sweep(grid: Grid, parse: Parse, construct: bool = True) -> list[Unit]:
    """Parse every cell, and make an SAE of each place once to find impossible values, before anything runs."""
    places: dict[str, list[tuple[Cell, Tree]]] = {}
    for cell, tree in grid.cells:
        places.setdefault(cell.group, []).append((cell, tree))
    units: list[Unit] = []
    for name, place in tqdm(places.items(), "Checking cells", unit="place", delay=1, leave=False, disable=None):
        try:
            units += _units(grid, place, parse, construct)
        except UserError as error:
            raise UserError(f"cell '{name}': {error}") from error
    names: dict[str, str] = {}
    for unit in units:
        if (same := names.setdefault(unit.id, unit.name)) != unit.name:
            raise UserError(f"cell '{unit.name}': is the same experiment as cell '{same}'; remove one")
    if len({unit.processes for unit in units}) > 1:
        raise UserError("trainer.devices: and trainer.num_nodes must be the same in all cells; split the sweep")
    return units


def packed(units: Sequence[Unit], most: int | None) -> list[list[Unit]]:
    """Units that share a stream, at most so many together, in their order."""
    streams: dict[str, list[Unit]] = {}
    for unit in units:
        streams.setdefault(unit.stream, []).append(unit)
    size = most or max(1, len(units))
    return [own[start : start + size] for own in streams.values() for start in range(0, len(own), size)]


def _units(grid: Grid, place: list[tuple[Cell, Tree]], parse: Parse, construct: bool) -> list[Unit]:
    """The units of cells that differ in their seed only; the first is made, to see whether that can be done."""
    command, (first, tree) = grid.options.command, place[0]
    seeds = None
    if command == "hedge":
        seeds = tuple(cell.seed for cell, _ in place if cell.seed is not None) or None
        place = [(first._replace(name=first.group), {**tree, "name": first.group})]
    units: list[Unit] = []
    resolved: dict[str, Any] = {}
    for cell, tree in place:
        if cell.seed is not None:
            tree = with_seed(tree, None if seeds else cell.seed)
        parse_it = partial(parse, command, tree, grid.said)
        if units:  # a seed of the weights changes nothing else, and parsing takes seconds
            resolved = with_seed(resolved, cell.seed)
        else:
            parsed = parse_it()
            if seeds is not None and parsed.hedge_options(made=False).seeds != 1:
                raise UserError("hedge.seeds: seeds are an axis of the sweep already; leave it at 1")
            if construct:
                parsed.make()
                if parsed.trainer.max_steps < 1:
                    raise UserError("trainer.max_steps: must be set: training streams have no end of their own")
                if (options := parsed.hedge_options()) is not None:
                    Hedge(parsed.model, parsed.datamodule, parsed.trainer, options)
            resolved = parsed.resolved()
        stable = stable_id({"command": command, **deciding(resolved), "seeds": seeds})
        units.append(Unit(cell.name, stable, cell, parse_it, seeds, *_checked(cell.name, resolved, command == "fit")))
    return units


def _checked(name: str, resolved: dict[str, Any], fits: bool) -> tuple[str, tuple[str, str | None], Processes]:
    """A cell's stream, its tracking and its processes."""
    trainer = resolved["trainer"]
    loggers = trainer["logger"] if isinstance(trainer["logger"], list) else [trainer["logger"]]
    if resolved.get("ckpt_path") or resolved.get("resume"):
        raise UserError("ckpt_path: cells of a sweep start afresh, or go on by themselves; remove it")
    ours = [one for one in loggers if isinstance(one, dict) and str(one.get("class_path")).endswith("MLflowTracker")]
    if len(ours) != 1:
        raise UserError("trainer.logger: a sweep finds its cells in the tracking store; list MLflowTracker with others")
    devices = trainer["devices"]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 0
    if count < 1:
        why = "a sweep starts its jobs' processes itself and must know how many"
        raise UserError(f"trainer.devices: {why}; expected a number, got {devices!r}")
    stream = {key: resolved.get(key) for key in ("data", "seed_everything", "guard", "checkpoint")}
    data = resolved.get("data") or {}
    if fits and str(data.get("class_path")).endswith(".LLMDataModule"):
        given = data["init_args"]
        if given["hook"] is given["cache"] is None:  # one forward pass of the model does for all layers
            stream["data"] = data | {"init_args": given | {"layer": None}}
    stream["trainer"] = {key: value for key, value in trainer.items() if key != "logger"}
    if trainer.get("callbacks") or len(loggers) > 1:
        stream["alone"] = name  # callbacks and loggers of the user's are made for one SAE
    tracking = ours[0]["init_args"]["experiment"], ours[0]["init_args"]["uri"]
    return json.dumps(stream, sort_keys=True, default=str), tracking, Processes(count, trainer["num_nodes"])


BUSY = "another process is training it"  # why a unit was not trained now; it may be waited for
CELL_TAG = "sweep_cell"  # says which cell a run is of: its stable id
SCHEME_TAG = "identity_scheme"  # says by which rules that id was made (hedgelab.identity.SCHEME)
_PATIENCE_OF_RANKS = 1200.0  # other ranks wait for what rank zero says, half an hour at most


@dataclass(frozen=True)
class Job:
    """Units that are trained together, below the run ``parent`` of a store; each of several processes gets all of it."""

    units: tuple[Unit, ...]
    parent: str
    uri: str
    experiment: str
    retrain: bool  # units that have finished too, all from their beginning
    waits: bool = False  # for another process that is training some of its units


def run_of(client: "MlflowClient", cell_id: str, wanted: str = "attributes.status = 'FINISHED'") -> "Run | None":
    """The latest run of a cell that fits a filter, a finished one by default; None without one."""
    return next(search_runs(client, f"tags.{CELL_TAG} = '{cell_id}' and {wanted}"), None)


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
    units = job.units
    try:
        first = units[0].parse().make()
        return on_every_rank(first.trainer, lambda: _train(job, first))
    except Exception as error:
        reason = _reason(error)
        if len(units) == 1 or isinstance(error, CutShortError):
            return {unit.name: reason for unit in units}
        if units[0].processes.several:
            reason += " (trained together with others; --sweep.pack 1 tells which is to blame)"
            return {unit.name: reason for unit in units}
        say(f"sweep: {len(units)} cells failed together ({reason}); trying half of them at a time")
    # What they had reached together is of no use to the halves, and must not make a later sweep train all of them again.
    GroupCheckpoints.forget(runs_dir(job.uri) / "checkpoints", [unit.name for unit in units])
    half = len(units) // 2
    return do(replace(job, units=units[:half])) | do(replace(job, units=units[half:]))


def _train(job: Job, first: Any) -> dict[str, str]:
    """Train units on this rank, as one group; ``first`` is the parsed config of the first of them."""
    units = job.units
    with ExitStack() as locks:
        missing = decided_by_rank_zero(lambda: _missing(job, locks))
        if missing is None:
            return {unit.name: BUSY for unit in units}
        if not missing:
            return {}
        members = {unit.name: unit for unit in units if unit.name in missing}
        parsed = {name: first if unit is units[0] else unit.parse().make() for name, unit in members.items()}
        trackers = {name: _tracker(job, unit, system_metrics=unit is units[0]) for name, unit in members.items()}
        say_names("sweep: training", missing)

        def begin() -> None:
            for name, tracker in trackers.items():
                tracker.log_config(parsed[name].text())
                tracker.log_hyperparams(searchable(parsed[name].resolved()))

        if first.hedge_options() is None:
            saes = {name: one.model for name, one in parsed.items()}
            ids = {name: unit.id for name, unit in members.items()}
            data = {name: one.datamodule for name, one in parsed.items()}
            layers = {getattr(one, "layer", None) for one in data.values()}
            shared = LayerData(data) if len(layers) > 1 else next(iter(data.values()))
            fit_group(first.trainer, saes, trackers, shared, begin, ids)
            return {}
        runner = PhaseRunner(first.trainer, retrain=job.retrain)
        try:
            studies = [
                Hedge(
                    one.model, first.datamodule, first.trainer, one.hedge_options(), outcome_of(one.resolved()),
                    seeds=members[name].seeds or (), tracker=trackers[name], label=f"{name}/",
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


def _tracker(job: Job, unit: Unit, system_metrics: bool) -> MLflowTracker:
    """A unit's run, which is the one that an earlier job of the same sweep has begun, if there is one."""
    tags = {PARENT_TAG: job.parent, CELL_TAG: unit.id, SCHEME_TAG: SCHEME}
    tracker = MLflowTracker(job.experiment, unit.name, tags, uri=job.uri, system_metrics=system_metrics)
    interrupted = f"tags.{PARENT_TAG} = '{job.parent}' and attributes.status != 'FINISHED'"
    if not job.retrain and (begun := run_of(ensure_store(job.uri), unit.id, interrupted)) is not None:
        tracker.go_on_with(begun.info.run_id)
    return tracker


def _missing(job: Job, locks: ExitStack) -> list[str] | None:
    """Names of the units that have to be trained, once this process alone may; None where another process is at them.

    Fits that were being trained together stay together, the finished ones too: their common checkpoint holds all of them.
    """
    ids = {unit.name: unit.id for unit in job.units}
    patience = 0.0 if not job.waits else _PATIENCE_OF_RANKS if job.units[0].processes.several else -1.0
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
    missing = [name for name, cell_id in ids.items() if run_of(client, cell_id) is None]
    begun = missing and any(group.members == ids for group in GroupCheckpoints.all_unfinished(root, ids))
    return list(ids) if begun else missing


def _quality(study: Hedge, runner: PhaseRunner, tracker: MLflowTracker) -> dict[str, float]:
    """How well trained the compared SAEs are, from their own runs: ``control/explained_variance``, and so on.

    Means over seeds; with several seeds every seed's own as well (``control/seed0/explained_variance``).
    """
    numbers: dict[str, float] = {}
    for role in ("control", "extended"):
        runs = {seed: runner.run_ids[f"{study.label}{role}/seed{seed}"] for seed in study.seeds}
        by_seed = {seed: tracker.experiment.get_run(run).data.metrics for seed, run in runs.items()}
        for name in sorted(set.intersection(*map(set, by_seed.values()))):
            stage, _, short = name.partition("/")
            if stage == "val":
                values = {seed: metrics[name] for seed, metrics in by_seed.items()}
                numbers[f"{role}/{short}"] = sum(values.values()) / len(values)
                if len(values) > 1:
                    numbers |= {f"{role}/seed{seed}/{short}": value for seed, value in values.items()}
    return numbers


def _reason(error: Exception) -> str:
    if not isinstance(error, UserError) or os.environ.get("HEDGELAB_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    text = one_line(str(error))
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
