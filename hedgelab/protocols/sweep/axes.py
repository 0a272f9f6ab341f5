"""The cells of a sweep: every combination of its axes' values, for each of its lines."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hedgelab.errors import UserError

SEED = "seed"
"""The axis of the weights' seeds: its cells share their activations, and figures show their mean and spread."""
Point = tuple[Any, dict[str, Any]]  # one value of an axis, and what it sets


@dataclass(frozen=True)
class Line:
    """One curve of a sweep's figure: what its cells have in common (``set``), and axes of its own."""

    set: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One place in a sweep: values by axis, and what its line (``fixed``) and its place (``varied``) set, by dotted key.

    The seed, where that is an axis, is among the values but not among what is set.
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
    def place(self) -> dict[str, Any]:
        """Its values but for the seed."""
        return {key: value for key, value in self.values.items() if key != SEED}

    @property
    def group(self) -> str:
        """Its name without the seed."""
        return _name(self.line, self.place)


def expand(lines: Mapping[str, Line], axes: Mapping[str, Any]) -> list[Cell]:
    """All cells, line by line; the last axis runs fastest. No lines are a single one without a name.

    An axis is a dotted key with a list of values; or a name with either ``zip`` and several dotted keys with lists, which
    go together, or a mapping of labels to the dotted keys and values that each of them sets. ``seed`` is the weights'.
    """
    cells: list[Cell] = []
    for name, line in (lines or {"": Line()}).items():
        if again := line.axes.keys() & axes.keys():
            key = min(again)
            raise UserError(f"sweep.lines.{name}.axes.{key}: is an axis of all lines already (sweep.axes.{key})")
        points = {key: _points(f"sweep.lines.{name}.axes.{key}", key, axis) for key, axis in line.axes.items()}
        points |= {key: _points(f"sweep.axes.{key}", key, axis) for key, axis in axes.items()}
        for combination in itertools.product(*points.values()):
            varied: dict[str, Any] = {}
            for key, (_, settings) in zip(points, combination, strict=True):
                if twice := varied.keys() & settings.keys():
                    raise UserError(f"sweep.axes.{key}: sets {min(twice)}, which another axis sets as well")
                varied |= settings
            values = {key: value for key, (value, _) in zip(points, combination, strict=True)}
            cells.append(Cell(_name(name, values), name, values, dict(line.set), varied))
    return cells


def is_number(value: Any) -> bool:
    """Whether a value can stand on a numeric axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def show(value: Any) -> str:
    """A value in a name: a class by its name, plain values as they are."""
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rsplit(".", 1)[-1]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _points(where: str, key: str, axis: Any) -> list[Point]:
    """The values of one axis."""
    match axis:
        case list():
            if key == SEED and (wrong := [value for value in axis if type(value) is not int]):
                raise UserError(f"{where}: expected whole numbers, got {wrong[0]!r}")
            points: list[Point] = [(value, {} if key == SEED else {key: value}) for value in axis]
        case {"zip": lists} if len(axis) == 1:
            if not isinstance(lists, dict) or not lists or not all(isinstance(one, list) for one in lists.values()):
                raise UserError(f"{where}.zip: expected dotted keys with a list of values each, got {lists!r}")
            lengths = {name: len(values) for name, values in lists.items()}
            if len(set(lengths.values())) > 1:
                raise UserError(f"{where}.zip: lists go together and must be equally long, got {lengths}")
            rows = zip(*lists.values(), strict=True)
            points = [(row[0], dict(zip(lists, row, strict=True))) for row in rows]
        case dict() if axis and all(isinstance(settings, dict) for settings in axis.values()):
            points = list(axis.items())
        case _:
            expected = "a list of values, {zip: {key: list, ...}}, or labels with what each sets"
            raise UserError(f"{where}: expected {expected}, got {axis!r}")
    if not points:
        raise UserError(f"{where}: needs at least one value")
    shown = [show(value) for value, _ in points]
    if twice := [value for value in shown if shown.count(value) > 1]:
        raise UserError(f"{where}: has {twice[0]} twice")
    return points


def _name(line: str, values: Mapping[str, Any]) -> str:
    parts = [f"{key.rsplit('.', 1)[-1]}={show(value)}" for key, value in values.items()]
    return "/".join([line, *parts] if line else parts) or "all"
