"""A sweep as it is written: its section, and the config of every cell."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from hedgelab.config.folders import check_folders, names_folder
from hedgelab.config.signatures import Parameter
from hedgelab.config.tree import Tree, compose, config_files, load, options_of, overlay, overlay_value
from hedgelab.config.walk import Walk, show
from hedgelab.errors import UserError, one_line
from hedgelab.protocols.sweep.axes import SEED, Cell, Line, expand
from hedgelab.protocols.sweep.executors import Executor, InProcess

FLAGS = ("--list", "--retrain")


@dataclass(frozen=True)
class FigureOptions:
    """What is drawn."""

    x: str | None = (
        None  # an axis, or a measured number such as control/l0; None is the first numeric axis but the seed
    )
    y: list[str] = field(default_factory=list)  # measured numbers, one panel each; empty takes the command's own
    log_x: bool | None = None  # None decides by the values
    log_y: bool = False


@dataclass(frozen=True)
class SweepOptions:
    """The section ``sweep``."""

    axes: dict[str, Any] = field(default_factory=dict)  # of all lines; every combination of their values is a cell
    lines: dict[str, Line] = field(default_factory=dict)
    command: Literal["fit", "hedge"] = "fit"  # what is done in every cell
    base: str | list[str] | None = None  # config files that lie below this one, relative to it
    pack: int | None = None  # most cells (without seeds) that are trained together; None for all that share a stream
    figure: FigureOptions = FigureOptions()
    executor: Executor = field(default_factory=InProcess)

    def __post_init__(self) -> None:
        if self.pack is not None and self.pack < 1:
            raise UserError(f"sweep.pack: must be at least 1, or null for no limit, got {self.pack}")


@dataclass(frozen=True)
class Grid:
    """A sweep, read: its cells, each with its whole config, and everything that was written, for the record.

    ``said`` are the command line's options that name folders to write to: what a config alone may not do, the user may.
    """

    name: str
    options: SweepOptions
    cells: list[tuple[Cell, Tree]]
    text: str
    said: tuple[str, ...] = ()


def read_sweep(words: list[str]) -> Grid:
    """Read config files and options."""
    words = [word for word in words if word not in FLAGS]
    files = config_files(words)
    if not files:
        raise UserError("--config: a sweep needs a config file with a section 'sweep'; see `hedgelab sweep --help`")
    written: Tree = {}
    for file in files:
        overlay(written, load(file))
    overrides: list[tuple[str, Any]] = []
    said: list[str] = []
    for key, text in options_of(words):
        if key in ("config", "c"):
            continue
        value = None if text is None else compose([f"--value={text}"])["value"]
        if names_folder(key):
            said.append(f"--{key}={text}")
        if key.split(".")[0] == "sweep":
            overlay_value(written, _section_path(key.split(".")), value)
        else:
            overrides.append((key, value))
    section = written.pop("sweep", None)
    if not isinstance(section, dict):
        raise UserError(f"sweep: '{files[-1]}' has no such section; see `hedgelab sweep --help`")
    check_folders({"sweep": section}, compose(said))
    options = _options(section)
    base: Tree = {}
    for below in [options.base] if isinstance(options.base, str) else options.base or []:
        overlay(base, load(files[-1].parent / below))
    base.pop("sweep", None)
    overlay(base, written)
    cells = expand(options.lines, options.axes)
    axes = {_plain(key): key for key in {SEED}.union(*(cell.varied for cell in cells))}
    for key, _ in overrides:
        if axis := axes.get(_plain(key)):
            raise UserError(f"{key}: is an axis; set its values instead (--sweep.axes.{axis} '[...]')")
    name = next((value for key, value in overrides if key == "name"), None) or base.get("name")
    text = yaml.safe_dump({"sweep": section, **base, "overrides": dict(overrides)}, sort_keys=False)
    trees = [(cell, _tree(base, cell, overrides)) for cell in cells]
    return Grid(str(name or "+".join(file.stem for file in files)), options, trees, text, tuple(said))


def with_seed(tree: Tree, seed: int | None) -> Tree:
    """A cell's config with a seed of the weights: that of the model, or of the SAE inside it."""
    tree = copy.deepcopy(tree)
    model = tree.get("model")
    arguments = model.get("init_args", model) if isinstance(model, dict) else {}
    overlay_value(tree, ["model", *(["inner"] if "inner" in arguments else []), "init", "seed"], seed)
    return tree


def _options(section: Tree) -> SweepOptions:
    """The section, checked; lines and axes apart, for a parser would make objects of the classes that they name."""
    rest = {key: value for key, value in section.items() if key not in ("lines", "axes")}
    lines, axes = section.get("lines") or {}, section.get("axes") or {}
    for key, value in (("lines", lines), ("axes", axes)):
        if not isinstance(value, dict):
            raise UserError(f"sweep.{key}: expected a mapping, got {show(value)}")
    for name, line in lines.items():
        if not isinstance(line or {}, dict):
            raise UserError(f"sweep.lines.{name}: expected a mapping with 'set' and 'axes', got {show(line)}")
        for key, value in (line or {}).items():
            if key not in ("set", "axes") or not isinstance(value, dict):
                raise UserError(
                    f"sweep.lines.{name}.{key}: expected 'set' or 'axes' with dotted keys, got {show(value)}"
                )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SweepOptions, "sweep", skip={"lines", "axes"})
    try:
        options: SweepOptions = parser.instantiate(parser.parse_object({"sweep": rest})).sweep
    except (ArgumentError, TypeError) as error:
        walk = Walk({"sweep": rest}, {"sweep": Parameter(SweepOptions)})
        raise UserError(walk.first or one_line(str(error))) from error
    return replace(options, lines={str(name): Line(**(line or {})) for name, line in lines.items()}, axes=axes)


def _tree(base: Tree, cell: Cell, overrides: list[tuple[str, Any]]) -> Tree:
    """The config of a cell: its line over the base, the command line over that, its place on the axes over all."""
    tree = copy.deepcopy(base)
    for key, value in [*cell.fixed.items(), *overrides, *cell.varied.items()]:
        overlay_value(tree, key.split("."), copy.deepcopy(value))
    tree["name"] = cell.name
    return tree


def _section_path(path: list[str]) -> list[str]:
    """A path into the section: axes and what lines set are named by whole dotted keys."""
    keys = {"axes": 2, "lines": 4}.get(path[1] if len(path) > 1 else "", len(path))
    return path if len(path) <= keys else [*path[:keys], ".".join(path[keys:])]


def _plain(key: str) -> str:
    return key.replace(".init_args", "")
