"""The cells of a sweep: every combination of its axes' values, for each of its lines."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hedgelab.errors import UserError

SEED = "seed"
"""The axis of the weights' seeds: its cells share their activations, and figures show their mean and spread."""
_ZIP = "zip"


@dataclass(frozen=True)
class Line:
    """One curve of a sweep's figure: what its cells have in common, and axes of its own.

    Attributes:
        set: Values that its cells take, by dotted key.
        axes: Axes of this line alone, before those of the whole sweep.
    """

    set: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One place in a sweep.

    Attributes:
        name: What it is called, such as ``vanilla/d_sae=64/seed=0``.
        line: The line it belongs to.
        values: Where it stands on each axis, by the axis' key; the seed, if that is an axis, among them.
        fixed: Values that its line sets, by dotted key.
        varied: Values that its place on the axes sets, by dotted key; without the seed.
    """

    name: str
    line: str
    values: dict[str, Any]
    fixed: dict[str, Any]
    varied: dict[str, Any]

    @property
    def seed(self) -> int | None:
        """Its seed; None where seeds are no axis."""
        return self.values.get(SEED)

    @property
    def group(self) -> str:
        """Its name without the seed."""
        return _name(self.line, {key: value for key, value in self.values.items() if key != SEED})


@dataclass(frozen=True)
class _Point:
    """One value of an axis, and what it sets."""

    value: Any
    settings: dict[str, Any]


def expand(lines: Mapping[str, Line], axes: Mapping[str, Any]) -> list[Cell]:
    """All cells, line by line; the last axis runs fastest.

    An axis is a dotted key with a list of values; or a name with either ``zip`` and several dotted keys with lists, which
    go together, or a mapping of labels to the dotted keys and values that each of them sets. ``seed`` is the weights'.

    Args:
        lines: The lines, by name; none is a single one without a name.
        axes: Axes of all lines.

    Raises:
        UserError: An axis without values, with a value twice, of another form, or set twice; lists of unequal length.
    """
    cells: list[Cell] = []
    for name, line in (lines or {"": Line()}).items():
        if again := line.axes.keys() & axes.keys():
            key = min(again)
            raise UserError(f"sweep.lines.{name}.axes.{key}: is an axis of all lines already (sweep.axes.{key})")
        own = {key: _points(f"sweep.lines.{name}.axes.{key}", key, axis) for key, axis in line.axes.items()}
        shared = {key: _points(f"sweep.axes.{key}", key, axis) for key, axis in axes.items()}
        cells += _product(name, line.set, own | shared)
    return cells


def axis_keys(lines: Mapping[str, Line], axes: Mapping[str, Any]) -> set[str]:
    """Every dotted key that some axis sets."""
    return {key for cell in expand(lines, axes) for key in cell.varied}


def is_number(value: Any) -> bool:
    """Whether a value can stand on a numeric axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _product(line: str, fixed: dict[str, Any], axes: dict[str, list[_Point]]) -> Iterator[Cell]:
    for points in itertools.product(*axes.values()):
        values = {key: point.value for key, point in zip(axes, points, strict=True)}
        varied: dict[str, Any] = {}
        for axis, point in zip(axes, points, strict=True):
            if twice := varied.keys() & point.settings.keys():
                raise UserError(f"sweep.axes.{axis}: sets {min(twice)}, which another axis sets as well")
            varied |= point.settings
        yield Cell(_name(line, values), line, values, dict(fixed), varied)


def _points(where: str, key: str, axis: Any) -> list[_Point]:
    """The values of one axis."""
    if isinstance(axis, list):
        points = [_Point(value, {} if key == SEED else {key: value}) for value in axis]
        if key == SEED and (wrong := [value for value in axis if type(value) is not int]):
            raise UserError(f"{where}: expected whole numbers, got {wrong[0]!r}")
    elif isinstance(axis, dict) and set(axis) == {_ZIP}:
        points = _zipped(where, axis[_ZIP])
    elif isinstance(axis, dict) and axis and all(isinstance(settings, dict) for settings in axis.values()):
        points = [_Point(label, settings) for label, settings in axis.items()]
    else:
        raise UserError(
            f"{where}: expected a list of values, {{zip: {{key: list, ...}}}}, or labels with what each sets, got {axis!r}"
        )
    if not points:
        raise UserError(f"{where}: needs at least one value")
    shown = [_show(point.value) for point in points]
    if twice := [value for value in shown if shown.count(value) > 1]:
        raise UserError(f"{where}: has {twice[0]} twice")
    return points


def _zipped(where: str, lists: Any) -> list[_Point]:
    if not isinstance(lists, dict) or not lists or not all(isinstance(values, list) for values in lists.values()):
        raise UserError(f"{where}.zip: expected dotted keys with a list of values each, got {lists!r}")
    lengths = {key: len(values) for key, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{where}.zip: lists go together and must be equally long, got {lengths}")
    rows = zip(*lists.values(), strict=True)
    return [_Point(row[0], dict(zip(lists, row, strict=True))) for row in rows]


def _name(line: str, values: Mapping[str, Any]) -> str:
    parts = [f"{key.rsplit('.', 1)[-1]}={_show(value)}" for key, value in values.items()]
    return "/".join([line, *parts] if line else parts) or "all"


def _show(value: Any) -> str:
    """A value in a name: a class by its name, plain values as they are."""
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rsplit(".", 1)[-1]
    return value if isinstance(value, str) else json.dumps(value, default=str)
