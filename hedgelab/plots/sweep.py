"""Curves over an axis of which every place was measured once or several times: sweeps, widths, counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hedgelab.plots.style import MUTED, color_of, legend_below, new_figure, tidy

_COLUMNS = 4
_MARKERS = "osD^vP*X"


class Point(NamedTuple):
    """One place on a curve, and what was measured there, one value a seed."""

    x: float
    values: Sequence[float]


def sweep_panels(
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    xlabel: str,
    title: str,
    log: tuple[bool, bool] = (False, False),
    names: Sequence[str] | None = None,
    ylabel: str = "",
) -> Figure:
    """One panel a title, one curve a line: the mean over seeds, its standard deviation as a band, seeds as dots.

    ``log`` says whether x and y are logarithmic; ``names`` label x = 0, 1, …, where the axis is none of numbers. Panels with a
    common ``ylabel`` have a common scale.
    """
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (0.6 + 3.1 * columns, 0.9 + 2.6 * rows)
    figure, grid = new_figure(*size, title, rows, columns, len(panels), sharey=bool(ylabel))
    lines = list(dict.fromkeys(line for curves in panels.values() for line in curves))
    for axes, (metric, curves) in zip(grid, panels.items(), strict=True):
        for line, points in curves.items():
            _curve(axes, points, lines.index(line))
        ticks = sorted({point.x for points in curves.values() for point in points})
        lowest = min((value for points in curves.values() for point in points for value in point.values), default=-1)
        axes.set(xscale="log" if log[0] else "linear", yscale="log" if log[1] else "linear")
        if axes.get_ylim()[0] < 0 <= lowest and not log[1]:
            axes.set_ylim(bottom=0)  # a band that reaches below zero says nothing there
        if names is not None:
            axes.set_xticks(range(len(names)), list(names))
        elif 1 < len(ticks) <= 8 and log[0]:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], color=MUTED)
            axes.minorticks_off()
        tidy(axes, metric, xlabel, ylabel if axes is grid[0] else "")
    if len(lines) > 1 or lines != [""]:
        legend_below(figure, [grid[0].plot([], [], label=line, **_look(i))[0] for i, line in enumerate(lines)])
    return figure


def _look(number: int) -> dict[str, Any]:
    return {"color": color_of(number), "marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}


def _curve(axes: Axes, points: Sequence[Point], number: int) -> None:
    ordered = sorted(points, key=lambda point: point.x)
    x = [point.x for point in ordered]
    mean = np.array([np.mean(point.values) for point in ordered])
    deviation = np.array([np.std(point.values, ddof=1) if len(point.values) > 1 else 0.0 for point in ordered])
    color = color_of(number)
    axes.plot(x, mean, linewidth=1.5, zorder=3, **_look(number))
    if deviation.any():
        axes.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
    seeds = [(point.x, value) for point in ordered if len(point.values) > 1 for value in point.values]
    axes.scatter(*np.reshape(seeds, (-1, 2)).T, s=6, color=color, alpha=0.6, linewidths=0, zorder=2)
