"""The cells of a sweep, parsed and checked: what is trained together, and under which stable id."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from hedgelab.config.tree import Tree
from hedgelab.errors import UserError
from hedgelab.identity import deciding, stable_id
from hedgelab.protocols.hedge import Hedge
from hedgelab.protocols.sweep.axes import Cell
from hedgelab.protocols.sweep.config import Grid, with_seed
from hedgelab.protocols.sweep.executors import ONE_PROCESS, Processes

Parse = Callable[[str, Tree, Sequence[str]], Any]
"""Parses a command's config, given the options in which the user names folders: ``hedgelab.cli.cells.parse_cell``."""


@dataclass(frozen=True)
class Unit:
    """What is trained as one member: a cell; for the hedging degree, the cells that differ in their seed only.

    Its finished run is known by ``id``, a hash of all that determines its outcome. Units with the same ``stream`` read the
    same activations and are trained together. ``seeds`` are those of a hedging degree, None leaves them to the config;
    ``tracking`` are experiment and URI; ``said`` are options in which the user names folders to write to.
    """

    name: str
    id: str
    cells: tuple[Cell, ...]
    tree: Tree
    stream: str
    seeds: tuple[int, ...] | None
    tracking: tuple[str, str | None]
    processes: Processes = ONE_PROCESS
    said: tuple[str, ...] = ()


def check_sweep(grid: Grid, parse: Parse, construct: bool = True) -> list[Unit]:
    """Parse every cell, and make an SAE of each place once to find impossible values, before anything runs."""
    places: dict[str, list[tuple[Cell, Tree]]] = {}
    for cell, tree in grid.cells:
        places.setdefault(cell.group, []).append((cell, tree))
    units: list[Unit] = []
    with tqdm(total=len(grid.cells), desc="Checking cells", unit="cell", delay=1, leave=False, disable=None) as bar:
        for name, place in places.items():
            try:
                units += _units(grid, place, parse, construct)
            except UserError as error:
                raise UserError(f"cell '{name}': {error}") from error
            bar.update(len(place))
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
    return [
        together[start : start + (most or len(together))]
        for together in streams.values()
        for start in range(0, len(together), most or len(together))
    ]


def _units(grid: Grid, place: list[tuple[Cell, Tree]], parse: Parse, construct: bool) -> list[Unit]:
    """The units of cells that differ in their seed only; the first is made, to see whether that can be done."""
    command, first = grid.options.command, place[0][0]
    if command == "hedge":
        seeds = tuple(cell.seed for cell, _ in place if cell.seed is not None) or None
        tree = {**place[0][1], "name": first.group}
        members = [(first.group, tuple(cell for cell, _ in place), tree if seeds is None else with_seed(tree, None))]
    else:
        seeds = None
        members = [
            (cell.name, (cell,), tree if cell.seed is None else with_seed(tree, cell.seed)) for cell, tree in place
        ]
    units: list[Unit] = []
    for name, cells, tree in members:
        parsed = parse(command, tree, grid.said)
        if seeds is not None and parsed.hedge_options(made=False).seeds != 1:
            raise UserError("hedge.seeds: seeds are an axis of the sweep already; leave it at 1")
        if construct and not units:
            parsed.make()
            if parsed.trainer.max_steps < 1:
                raise UserError("trainer.max_steps: must be set: training streams have no end of their own")
            if (options := parsed.hedge_options()) is not None:
                Hedge(parsed.model, parsed.datamodule, parsed.trainer, options)
        resolved = parsed.resolved()
        stable = stable_id({"command": command, **deciding(resolved), "seeds": seeds})
        stream, tracking, processes = _checked(name, resolved)
        units.append(Unit(name, stable, cells, tree, stream, seeds, tracking, processes, grid.said))
    return units


def _checked(name: str, resolved: dict[str, Any]) -> tuple[str, tuple[str, str | None], Processes]:
    """A cell's stream, its tracking and its processes."""
    trainer = resolved["trainer"]
    loggers = trainer["logger"] if isinstance(trainer["logger"], list) else [trainer["logger"]]
    stream = {key: resolved.get(key) for key in ("data", "seed_everything", "guard", "checkpoint")}
    stream["trainer"] = {key: value for key, value in trainer.items() if key != "logger"}
    if trainer.get("callbacks") or len(loggers) > 1:
        stream["alone"] = name  # callbacks and loggers of the user's are made for one SAE
    if resolved.get("ckpt_path") or resolved.get("resume"):
        raise UserError(
            "ckpt_path: cells of a sweep start afresh, and go on by themselves where one was interrupted; remove it"
        )
    ours = [one for one in loggers if isinstance(one, dict) and str(one.get("class_path")).endswith("MLflowTracker")]
    if len(ours) != 1:
        raise UserError(
            "trainer.logger: a sweep finds its cells in the tracking store; leave it at MLflowTracker, or list that with others"
        )
    devices = trainer["devices"]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 0
    if count < 1:
        raise UserError(
            f"trainer.devices: a sweep starts its jobs' processes itself and must know how many; got {devices!r}, expected a "
            "number"
        )
    tracking = ours[0]["init_args"]["experiment"], ours[0]["init_args"]["uri"]
    return json.dumps(stream, sort_keys=True, default=str), tracking, Processes(count, trainer["num_nodes"])
