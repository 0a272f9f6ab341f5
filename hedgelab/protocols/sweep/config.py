"""A sweep as it is written: its section, and the config of every cell."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from hedgelab.config.folders import check_folders, names_folder
from hedgelab.config.names import suggest
from hedgelab.config.plain_yaml import read_value
from hedgelab.config.signatures import Parameter
from hedgelab.config.tree import Tree, compose, config_files, load, options_of, overlay, overlay_value
from hedgelab.config.walk import Walk, show
from hedgelab.errors import UserError, one_line
from hedgelab.protocols.sweep.axes import SEED, Cell, Line, axis_keys, expand
from hedgelab.protocols.sweep.executors import Executor, InProcess

FLAGS = ("--list", "--retrain")


@dataclass(frozen=True)
class FigureOptions:
    """What is drawn.

    Attributes:
        x: An axis, or a measured number such as ``control/l0``; None is the first numeric axis that is not the seed.
        y: Measured numbers, one panel each; empty takes the command's own.
        log_x: Whether x is logarithmic; None decides by the values.
        log_y: Whether y is logarithmic.
    """

    x: str | None = None
    y: list[str] = field(default_factory=list)
    log_x: bool | None = None
    log_y: bool = False


@dataclass(frozen=True)
class SweepOptions:
    """The section ``sweep``.

    Attributes:
        command: What is done in every cell.
        base: Config files that lie below this one, relative to it.
        lines: Curves, each with what its cells have in common and axes of its own.
        axes: Axes of all lines; every combination of their values is a cell.
        pack: Most cells (without seeds) that are trained together; None for all that share a stream.
        figure: What is drawn.
        executor: Where it runs.
    """

    command: Literal["fit", "hedge"] = "fit"
    base: str | list[str] | None = None
    lines: dict[str, Line] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    pack: int | None = None
    figure: FigureOptions = FigureOptions()
    executor: Executor = field(default_factory=InProcess)

    def __post_init__(self) -> None:
        if self.pack is not None and self.pack < 1:
            raise UserError(f"sweep.pack: must be at least 1, or null for no limit, got {self.pack}")


@dataclass(frozen=True)
class Sweep:
    """A sweep, read.

    Attributes:
        name: Its name: the file's unless the config has one.
        options: Its section.
        cells: Its cells, each with its whole config.
        text: Everything that was written, for the record.
        said: The command line's options that name folders to write to: what a config alone may not do, the user may.
    """

    name: str
    options: SweepOptions
    cells: list[tuple[Cell, Tree]]
    text: str
    said: tuple[str, ...] = ()


def read_sweep(words: list[str]) -> Sweep:
    """Read config files and options.

    Raises:
        UserError: No file, or a mistake in the section ``sweep``.
    """
    words = [word for word in words if word not in FLAGS]
    files = config_files(words)
    if not files:
        raise UserError("--config: a sweep needs a config file with a section 'sweep'; see `hedgelab sweep --help`")
    written: Tree = {}
    for file in files:
        overlay(written, load(file))
    overrides: list[tuple[list[str], Any]] = []
    said = []
    for key, text in options_of(words):
        path = key.split(".")
        if key in ("config", "c"):
            continue
        value = _value(text)
        if names_folder(key):
            said.append(f"--{key}={text}")
        if path[0] == "sweep":
            overlay_value(written, _section_path(path), value)
        else:
            overrides.append((path, value))
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
    _refuse_overridden_axes(options, overrides)
    cells = [(cell, _tree(base, cell, overrides)) for cell in expand(options.lines, options.axes)]
    name = next((value for path, value in overrides if path == ["name"]), None) or base.get("name")
    text = yaml.safe_dump(
        {"sweep": section, **base, "overrides": {".".join(p): v for p, v in overrides}}, sort_keys=False
    )
    return Sweep(str(name or "+".join(file.stem for file in files)), options, cells, text, tuple(said))


def _options(section: Tree) -> SweepOptions:
    """The section, checked."""
    section = dict(section)
    lines, axes = _lines(section.pop("lines", None) or {}), section.pop("axes", None) or {}
    if not isinstance(axes, dict):
        raise UserError(f"sweep.axes: expected dotted keys with their values, got {show(axes)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SweepOptions, "sweep")
    try:
        parsed = vars(parser.instantiate_classes(parser.parse_object({"sweep": section})).sweep)
    except (ArgumentError, TypeError) as error:
        walk = Walk({"sweep": section}, {"sweep": Parameter(SweepOptions)})
        line = (walk.first or one_line(str(error))).replace(
            "expected one of command", "expected one of axes, lines, command"
        )
        raise UserError(line) from error
    if not isinstance(figure := parsed["figure"], FigureOptions):
        figure = FigureOptions(**vars(figure))
    return SweepOptions(**{**parsed, "lines": lines, "axes": axes, "figure": figure})


def _lines(written: Any) -> dict[str, Line]:
    """The lines, which no signature describes: their names are free."""
    if not isinstance(written, dict):
        raise UserError(f"sweep.lines: expected names with what each sets, got {show(written)}")
    lines = {}
    for name, line in written.items():
        content = line or {}
        if not isinstance(content, dict):
            raise UserError(f"sweep.lines.{name}: expected a mapping with 'set' and 'axes', got {show(line)}")
        for key, value in content.items():
            if key not in ("set", "axes"):
                raise UserError(f"sweep.lines.{name}.{key}: unknown key; {suggest(str(key), ['set', 'axes'])}")
            if not isinstance(value, dict):
                raise UserError(f"sweep.lines.{name}.{key}: expected a mapping of dotted keys, got {show(value)}")
        lines[str(name)] = Line(**content)
    return lines


def _tree(base: Tree, cell: Cell, overrides: list[tuple[list[str], Any]]) -> Tree:
    """The config of a cell: its line over the base, the command line over that, its place on the axes over all."""
    tree = copy.deepcopy(base)
    for key, value in cell.fixed.items():
        overlay_value(tree, key.split("."), copy.deepcopy(value))
    for path, value in overrides:
        overlay_value(tree, path, copy.deepcopy(value))
    for key, value in cell.varied.items():
        overlay_value(tree, key.split("."), copy.deepcopy(value))
    tree["name"] = cell.name
    return tree


def with_seed(tree: Tree, seed: int | None) -> Tree:
    """A cell's config with a seed of the weights: that of the model, or of the SAE inside it."""
    tree = copy.deepcopy(tree)
    model = tree.get("model")
    arguments = model.get("init_args", model) if isinstance(model, dict) else {}
    path = ["model", "inner", "init", "seed"] if "inner" in arguments else ["model", "init", "seed"]
    overlay_value(tree, path, seed)
    return tree


def _refuse_overridden_axes(options: SweepOptions, overrides: list[tuple[list[str], Any]]) -> None:
    axes = {_plain(key.split(".")): key for key in axis_keys(options.lines, options.axes) | {SEED}}
    for path, _ in overrides:
        if key := axes.get(_plain(path)):
            raise UserError(f"{'.'.join(path)}: is an axis; set its values instead (--sweep.axes.{key} '[...]')")


def _section_path(path: list[str]) -> list[str]:
    """A path into the section: axes and what lines set are named by whole dotted keys."""
    keys = 2 if path[1:2] == ["axes"] else 4 if path[1:2] == ["lines"] else len(path)
    return path if len(path) <= keys else [*path[:keys], ".".join(path[keys:])]


def _plain(path: list[str]) -> tuple[str, ...]:
    return tuple(part for part in path if part != "init_args")


def _value(text: str | None) -> Any:
    try:
        return read_value(text) if isinstance(text, str) else text
    except yaml.YAMLError:
        return text
