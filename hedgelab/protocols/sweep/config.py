"""A sweep as it is written: its section, and the config of every cell: every combination of its axes' values, for each line."""

import copy
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from hedgelab.config.signatures import Parameter
from hedgelab.config.tree import Tree, compose, config_files, load, options_of, overlay, overlay_value
from hedgelab.config.walk import Walk, show
from hedgelab.errors import UserError, one_line
from hedgelab.protocols.sweep.executors import Executor, InProcess
from hedgelab.tracking.folders import check_folders, names_folder

SEED = "seed"
"""The axis of the weights' seeds: its cells share their activations, and figures show their mean and spread."""
FLAGS = ("--list", "--retrain")


@dataclass(frozen=True)
class FigureOptions:
    """What is drawn."""

    x: str | None = None  # an axis, or a measured number such as control/l0; None: the first numeric axis but the seed
    y: list[str] = field(default_factory=list)  # measured numbers, one panel each; empty takes the command's own
    log_x: bool | None = None  # None decides by the values
    log_y: bool = False
    until: float | None = None  # samples up to which curves over training are continued by a power law


@dataclass(frozen=True)
class SweepOptions:
    """The section ``sweep``."""

    axes: dict[str, Any] = field(default_factory=dict)  # of all lines; every combination of their values is a cell
    lines: dict[str, Any] = field(default_factory=dict)  # curves: what their cells share (set), and axes of their own
    command: Literal["fit", "hedge"] = "fit"  # what is done in every cell
    base: str | list[str] | None = None  # config files that lie below this one, relative to it
    pack: int | None = None  # most cells trained together (of degrees: without seeds); None for all that share a stream
    only: str | None = None  # regular expression: cells in whose names it is found; None takes all
    figure: FigureOptions = FigureOptions()
    executor: Executor = field(default_factory=InProcess)

    def __post_init__(self) -> None:
        if self.pack is not None and self.pack < 1:
            raise UserError(f"sweep.pack: must be at least 1, or null for no limit, got {self.pack}")
        try:
            re.compile(self.only or "")
        except re.error as error:
            raise UserError(f"sweep.only: expected a regular expression, got {self.only!r}: {error}") from error


class Cell(NamedTuple):
    """One place in a sweep: its values by axis, and by dotted key what its line (``fixed``) and its place (``varied``) set.

    Its ``seed`` is None where seeds are no axis; ``group`` is its name without the seed.
    """

    name: str
    group: str
    line: str
    values: dict[str, Any]
    seed: int | None
    fixed: dict[str, Any]
    varied: dict[str, Any]


class Grid(NamedTuple):
    """A sweep, read: its cells, each with its whole config, and everything that was written, for the record.

    ``said`` are the command line's options that name folders to write to: what a config alone may not do, the user may.
    """

    name: str
    options: SweepOptions
    cells: list[tuple[Cell, Tree]]
    text: str
    said: tuple[str, ...]


def read_sweep(words: list[str]) -> Grid:
    """Read config files and options."""
    words = [word for word in words if word not in FLAGS]
    files = config_files(words)
    if not files:
        raise UserError("--config: a sweep needs a config file with a section 'sweep'; see `hedgelab sweep --help`")
    written: Tree = {}
    below_in = files[-1].parent  # the folder of the last file that names a base
    for file in files:
        overlay(written, one := load(file))
        if isinstance(own := one.get("sweep"), dict) and own.get("base"):
            below_in = file.parent
    overrides: list[tuple[str, Any]] = []
    said: list[str] = []
    for key, text in options_of(words):
        if key in ("config", "c"):
            continue
        value = None if text is None else compose([f"--value={text}"])["value"]
        if names_folder(key):
            said.append(f"--{key}={text}")
        section_name, *path = key.split(".")
        if section_name == "sweep":  # where axes and what lines set are named by whole dotted keys
            plain = {"axes": 1, "lines": 3}.get(path[0] if path else "", len(path))
            path = [*path[:plain], ".".join(path[plain:])] if len(path) > plain else path
            overlay_value(written, ["sweep", *path], value)
        else:
            overrides.append((key, value))
    section = written.pop("sweep", None)
    if not isinstance(section, dict):
        raise UserError(f"sweep: '{files[-1]}' has no such section; see `hedgelab sweep --help`")
    check_folders({"sweep": section}, said)
    options = _options(section)
    base: Tree = {}
    for below in [options.base] if isinstance(options.base, str) else options.base or []:
        overlay(base, load(below_in / below))
    base.pop("sweep", None)
    overlay(base, written)
    cells = [cell for cell in expand(options.lines, options.axes) if re.search(options.only or "", cell.name)]
    if not cells:
        raise UserError(f"sweep.only: no cell's name has {options.only!r} in it; without it, --list shows all")
    axes = {_plain(key): key for key in {SEED}.union(*(cell.varied for cell in cells))}
    for key, _ in overrides:
        if axis := axes.get(_plain(key)):
            raise UserError(f"{key}: is an axis; set its values instead (--sweep.axes.{axis} '[...]')")
    name = dict(overrides).get("name") or base.get("name")
    text = yaml.safe_dump({"sweep": section, **base, "overrides": dict(overrides)}, sort_keys=False)
    trees: list[tuple[Cell, Tree]] = []
    for cell in cells:  # its line over the base, the command line over that, its place on the axes over all
        tree = copy.deepcopy(base)
        for key, value in [*cell.fixed.items(), *overrides, *cell.varied.items()]:
            overlay_value(tree, key.split("."), copy.deepcopy(value))
        trees.append((cell, {**tree, "name": cell.name}))
    return Grid(str(name or "+".join(file.stem for file in files)), options, trees, text, tuple(said))


def expand(lines: Mapping[str, Any], axes: Mapping[str, Any]) -> list[Cell]:
    """All cells, line by line; the last axis runs fastest. No lines are a single one without a name.

    An axis is a dotted key with a list of values; or a name with either ``zip`` and several dotted keys with lists, which
    go together, or a mapping of labels to the dotted keys and values that each of them sets. ``seed`` is the weights'.
    """
    cells: list[Cell] = []
    for line, parts in (lines or {"": {}}).items():
        own = parts.get("axes", {})
        if again := own.keys() & axes.keys():
            key = min(again)
            raise UserError(f"sweep.lines.{line}.axes.{key}: is an axis of all lines already (sweep.axes.{key})")
        points = {key: _points(f"sweep.lines.{line}.axes.{key}", key, axis) for key, axis in own.items()}
        points |= {key: _points(f"sweep.axes.{key}", key, axis) for key, axis in axes.items()}
        for combination in itertools.product(*points.values()):
            varied: dict[str, Any] = {}
            for key, (_, settings) in zip(points, combination, strict=True):
                if twice := varied.keys() & settings.keys():
                    raise UserError(f"sweep.axes.{key}: sets {min(twice)}, which another axis sets as well")
                varied |= settings
            every = {key: value for key, (value, _) in zip(points, combination, strict=True)}
            values = {key: value for key, value in every.items() if key != SEED}
            name, group = _name(line, every), _name(line, values)
            cells.append(Cell(name, group, line, values, every.get(SEED), dict(parts.get("set", {})), varied))
    return cells


def with_seed(tree: Tree, seed: int | None) -> Tree:
    """A cell's config with a seed of the weights: that of the model, or of the SAE inside it."""
    tree = copy.deepcopy(tree)
    model = tree.get("model")
    arguments = model.get("init_args", model) if isinstance(model, dict) else {}
    overlay_value(tree, ["model", *(["inner"] if "inner" in arguments else []), "init", "seed"], seed)
    return tree


def label(value: Any) -> str:
    """A value in a name: a class by its name, plain values as they are."""
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rsplit(".", 1)[-1]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _points(where: str, key: str, axis: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The values of one axis, each with what it sets."""
    match axis:
        case list():
            if key == SEED and (wrong := [value for value in axis if type(value) is not int]):
                raise UserError(f"{where}: expected whole numbers, got {wrong[0]!r}")
            points: list[tuple[Any, dict[str, Any]]] = [(value, {} if key == SEED else {key: value}) for value in axis]
        case {"zip": lists} if len(axis) == 1:
            if not isinstance(lists, dict) or not lists or not all(isinstance(one, list) for one in lists.values()):
                raise UserError(f"{where}.zip: expected dotted keys with a list of values each, got {lists!r}")
            lengths = {name: len(values) for name, values in lists.items()}
            if len(set(lengths.values())) > 1:
                raise UserError(f"{where}.zip: lists go together and must be equally long, got {lengths}")
            points = [(row[0], dict(zip(lists, row, strict=True))) for row in zip(*lists.values(), strict=True)]
        case dict() if axis and all(isinstance(settings, dict) for settings in axis.values()):
            points = list(axis.items())
        case _:
            expected = "a list of values, {zip: {key: list, ...}}, or labels with what each sets"
            raise UserError(f"{where}: expected {expected}, got {axis!r}")
    if not points:
        raise UserError(f"{where}: needs at least one value")
    shown = [label(value) for value, _ in points]
    if twice := [value for value in shown if shown.count(value) > 1]:
        raise UserError(f"{where}: has {twice[0]} twice")
    return points


def _name(line: str, values: Mapping[str, Any]) -> str:
    parts = [f"{key.rsplit('.', 1)[-1]}={label(value)}" for key, value in values.items()]
    return "/".join([line, *parts] if line else parts) or "all"


def _options(section: Tree) -> SweepOptions:
    """The section, checked; lines and axes apart, for a parser would make objects of the classes that they name."""
    rest = {key: value for key, value in section.items() if key not in ("lines", "axes")}
    lines, axes = section.get("lines") or {}, section.get("axes") or {}
    for key, value in (("lines", lines), ("axes", axes)):
        if not isinstance(value, dict):
            raise UserError(f"sweep.{key}: expected a mapping, got {show(value)}")
    lines = {str(name): line or {} for name, line in lines.items()}
    for name, line in lines.items():
        parts = line if isinstance(line, dict) else {"": None}
        if parts.keys() - {"set", "axes"} or not all(isinstance(part, dict) for part in parts.values()):
            raise UserError(f"sweep.lines.{name}: expected 'set' and 'axes' with dotted keys, got {show(line)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SweepOptions, "sweep", skip={"lines", "axes"})
    try:
        options: SweepOptions = parser.instantiate(parser.parse_object({"sweep": rest})).sweep
    except (ArgumentError, TypeError) as error:
        walk = Walk({"sweep": rest}, {"sweep": Parameter(SweepOptions)})
        raise UserError(walk.first or one_line(str(error))) from error
    return replace(options, lines=lines, axes=axes)


def _plain(key: str) -> str:
    return key.replace(".init_args", "")
