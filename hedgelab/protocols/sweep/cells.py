"""The cells of a sweep, parsed and checked: what is trained together, and under which stable id."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm import tqdm

from hedgelab.config.tree import Tree
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError
from hedgelab.identity import deciding, stable_id
from hedgelab.protocols.hedge import HedgeOptions, HedgeProtocol
from hedgelab.protocols.sweep.axes import Cell
from hedgelab.protocols.sweep.config import Grid, with_seed
from hedgelab.protocols.sweep.executors import ONE_PROCESS, Processes
from hedgelab.protocols.training_phases import PhaseTrainer
from hedgelab.saes import SAE


class ParsedCell(Protocol):
    """One cell's config, parsed."""

    command: str
    model: SAE
    datamodule: ActivationDataModule
    trainer: PhaseTrainer

    def make(self) -> None:
        """Make data, model and trainer."""

    def text(self) -> str:
        """The whole config."""

    def resolved(self) -> dict[str, Any]:
        """The same as plain values."""

    def hedge_options(self, made: bool = True) -> HedgeOptions | None:
        """How the hedging degree is measured, as made or as parsed; None of a plain fit."""


Parse = Callable[[str, Tree, Sequence[str]], ParsedCell]
"""Parses a command's config (``fit`` or ``hedge``), with the options in which the user names folders to write to."""


@dataclass(frozen=True)
class Unit:
    """What is trained as one member: a cell; for the hedging degree, the cells that differ in their seed only.

    Attributes:
        name: Its name.
        id: Hash of all that determines its outcome; its finished run is known by it.
        cells: Its cells.
        tree: Its config.
        stream: What its activations depend on; units with the same are trained together.
        seeds: Seeds of a hedging degree; None leaves them to the config.
        tracking: Experiment and URI of its runs.
        processes: How many train it together.
        said: Options in which the user names folders to write to.
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


def check_sweep(sweep: Grid, parse: Parse, construct: bool = True) -> list[Unit]:
    """Parse every cell, and make each SAE once to find impossible values, before anything runs.

    Raises:
        UserError: The first mistake, with the cell's name.
    """
    units: list[Unit] = []
    with tqdm(total=len(sweep.cells), desc="Checking cells", unit="cell", delay=1, leave=False, disable=None) as bar:
        for group in _groups(sweep):
            try:
                units += _units(sweep, group, parse, construct)
            except UserError as error:
                raise UserError(f"cell '{group[0][0].group}': {error}") from error
            bar.update(len(group))
    ids: dict[str, str] = {}
    for unit in units:
        if (same := ids.setdefault(unit.id, unit.name)) != unit.name:
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


def _groups(sweep: Grid) -> list[list[tuple[Cell, Tree]]]:
    """Cells that differ in their seed only, together."""
    groups: dict[str, list[tuple[Cell, Tree]]] = {}
    for cell, tree in sweep.cells:
        groups.setdefault(cell.group, []).append((cell, tree))
    return list(groups.values())


def _units(sweep: Grid, group: list[tuple[Cell, Tree]], parse: Parse, construct: bool) -> list[Unit]:
    """The units of cells that differ in their seed only; the first is made, to see whether that can be done."""
    command, said = sweep.options.command, sweep.said
    cells = tuple(cell for cell, _ in group)
    if command == "hedge":
        seeds = tuple(cell.seed for cell in cells if cell.seed is not None) or None
        tree = {**group[0][1], "name": cells[0].group}
        if seeds is not None:
            tree = with_seed(tree, None)
        parsed = parse(command, tree, said)
        options = parsed.hedge_options(made=False)
        if seeds is not None and options is not None and options.seeds != 1:
            raise UserError("hedge.seeds: seeds are an axis of the sweep already; leave it at 1")
        if construct:
            _make_once(parsed)
        return [_unit(parsed, cells[0].group, cells, tree, seeds, said)]
    units: list[Unit] = []
    for cell, plain in group:
        tree = plain if cell.seed is None else with_seed(plain, cell.seed)
        parsed = parse(command, tree, said)
        if construct and not units:
            _make_once(parsed)
        units.append(_unit(parsed, cell.name, (cell,), tree, None, said))
    return units


def _make_once(parsed: ParsedCell) -> None:
    parsed.make()
    if parsed.trainer.max_steps < 1:
        raise UserError("trainer.max_steps: must be set: training streams have no end of their own")
    if (options := parsed.hedge_options()) is not None:
        HedgeProtocol(parsed.model, parsed.datamodule, 1, options, {})


def _unit(
    parsed: ParsedCell,
    name: str,
    cells: tuple[Cell, ...],
    tree: Tree,
    seeds: tuple[int, ...] | None,
    said: tuple[str, ...],
) -> Unit:
    resolved = parsed.resolved()
    outcome = {"command": parsed.command, **deciding(resolved), "seeds": seeds}
    shared = ("data", "seed_everything", "guard", "checkpoint")
    trainer = {key: value for key, value in resolved["trainer"].items() if key != "logger"}
    stream = {"trainer": trainer, **{key: resolved.get(key) for key in shared}}
    loggers = resolved["trainer"]["logger"]
    loggers = loggers if isinstance(loggers, list) else [loggers]
    if resolved["trainer"].get("callbacks") or len(loggers) > 1:
        stream["alone"] = name  # callbacks and loggers of the user's are made for one SAE
    if resolved.get("ckpt_path") or resolved.get("resume"):
        raise UserError(
            "ckpt_path: cells of a sweep start afresh, and go on by themselves where one was interrupted; remove it"
        )
    trackers = [
        one for one in loggers if isinstance(one, dict) and str(one.get("class_path")).endswith("MLflowTracker")
    ]
    if len(trackers) != 1:
        raise UserError(
            "trainer.logger: a sweep finds its cells in the tracking store; leave it at MLflowTracker, or list that with others"
        )
    (logger,) = trackers
    tracking = logger["init_args"]["experiment"], logger["init_args"]["uri"]
    return Unit(
        name, stable_id(outcome), cells, tree, json.dumps(stream, sort_keys=True, default=str), seeds, tracking,
        _processes(trainer), said,
    )  # fmt: skip


def _processes(trainer: dict[str, Any]) -> Processes:
    """How many processes a trainer's section asks for.

    Raises:
        UserError: It leaves that to the machine.
    """
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 0
    if count < 1:
        raise UserError(
            f"trainer.devices: a sweep starts its jobs' processes itself and must know how many; got {devices!r}, expected a "
            "number"
        )
    return Processes(count, nodes)
