"""Curves over an axis of which every place was measured once or several times: sweeps, widths, counts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from hedgelab.plots.style import FAINT, MUTED, PALETTE, color_of, legend_below, new_figure, tidy

_COLUMNS = 4
_MARKERS = "osD^vP*X"
Curve = Iterable[tuple[float, Sequence[float]]]
"""Places, and what was measured at each, one value a seed."""


def sweep_panels(
    panels: Mapping[str, Mapping[str, Curve]],
    xlabel: str,
    title: str,
    log: tuple[bool, bool] = (False, False),
    names: Sequence[str] | None = None,
    ylabel: str = "",
    until: float | None = None,
) -> Figure:
    """One panel a title, one curve a line: the mean over seeds, its standard deviation as a band, seeds as dots.

    ``log`` says whether x and y are logarithmic; ``names`` label x = 0, 1, …, where the axis is none of numbers. Panels with a
    common ``ylabel`` have a common scale. Where a curve's own places allow it, it is continued to ``until`` by a
    :func:`power_law`, dashed, with the value there.
    """
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (0.6 + 3.1 * columns, 0.9 + 2.6 * rows)
    figure, grid = new_figure(*size, title, rows, columns, len(panels), sharey=bool(ylabel))
    lines = list(dict.fromkeys(line for curves in panels.values() for line in curves))
    for axes, (metric, curves) in zip(grid, panels.items(), strict=True):
        for line, curve in curves.items():
            ordered = sorted(curve, key=lambda place: place[0])
            _draw(axes, ordered, lines.index(line))
            if until is not None:
                _continue(axes, ordered, until, lines.index(line))
        places = [place for curve in curves.values() for place in curve]
        ticks, lowest = sorted({x for x, _ in places}), min((min(values) for _, values in places), default=-1)
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


def named_panels(panels: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> Figure:
    """One panel a title, one row a name: the mean over seeds in figures too, its standard deviation, seeds as small dots."""
    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    figure, grid = new_figure(1.5 + 2.6 * len(panels), 1.1 + 0.23 * len(names), title, 1, len(panels), sharey=True)
    for axes, (metric, values) in zip(grid, panels.items(), strict=True):
        for name, own in values.items():
            row, mean = names.index(name), float(np.mean(own))
            deviation = float(np.std(own, ddof=1)) if len(own) > 1 else 0.0
            axes.errorbar(mean, row, xerr=deviation, fmt="o", markersize=4, linewidth=1.5, color=color_of(0), zorder=3)
            axes.scatter(own, [row] * len(own), s=6, color=color_of(1), linewidths=0, zorder=4)
            beside = axes.get_yaxis_transform()
            axes.annotate(f"{mean:.3g}", (1.02, row), xycoords=beside, fontsize=7, color=MUTED, va="center")
        tidy(axes, metric)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
    grid[0].set_yticks(range(len(names)), names)
    grid[0].invert_yaxis()
    return figure


def power_law(x: Sequence[float], y: Sequence[float], at: ArrayLike) -> NDArray[np.float64] | None:
    """Where ``a - b x^-c`` of least squares through these points is ``at`` other places; None of fewer than four points.

    For each c a and b are linear; c is searched from .05 to 3.

    >>> power_law([1, 4, 16, 64], [0.5, 0.75, 0.875, 0.9375], [256.0]).round(2).tolist()
    [0.97]
    """
    if len(set(x)) < 4:
        return None
    from scipy.optimize import minimize_scalar  # late: scipy is slow to import

    places, values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)

    def design(at: ArrayLike, c: float) -> NDArray[np.float64]:
        power = (np.asarray(at, dtype=np.float64) / places[0]) ** -c
        return np.stack([np.ones_like(power), power], axis=-1)

    def misfit(c: float) -> float:
        return float(np.square(design(places, c) @ np.linalg.lstsq(design(places, c), values)[0] - values).sum())

    best = float(minimize_scalar(misfit, bounds=(0.05, 3), method="bounded", options={"xatol": 1e-6}).x)
    found: NDArray[np.float64] = design(at, best) @ np.linalg.lstsq(design(places, best), values)[0]
    return found


def _continue(axes: Axes, places: Sequence[tuple[float, Sequence[float]]], until: float, number: int) -> None:
    """The mean's power law from the last place on, and its value at the end."""
    x, mean = [at for at, _ in places], [float(np.mean(values)) for _, values in places]
    beyond = np.geomspace(x[-1], until, 50)
    if (continued := power_law(x, mean, beyond)) is not None:
        axes.plot(beyond, continued, linestyle="--", linewidth=1.0, color=color_of(number))
        value = float(continued[-1])
        axes.annotate(f"{value:.3g}", (until, value), fontsize=7, color=color_of(number), ha="right", va="bottom")


def _look(number: int) -> dict[str, Any]:
    """A colour and a marker; when the colours begin again, each has another marker."""
    marker = _MARKERS[(number + number // len(PALETTE)) % len(_MARKERS)]
    return {"color": color_of(number), "marker": marker, "markersize": 4}


def _draw(axes: Axes, places: Sequence[tuple[float, Sequence[float]]], number: int) -> None:
    x = [at for at, _ in places]
    mean = np.array([np.mean(values) for _, values in places])
    deviation = np.array([np.std(values, ddof=1) if len(values) > 1 else 0.0 for _, values in places])
    color = color_of(number)
    axes.plot(x, mean, linewidth=1.5, zorder=3, **_look(number))
    if deviation.any():
        axes.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
    seeds = np.reshape([(at, value) for at, values in places if len(values) > 1 for value in values], (-1, 2))
    axes.scatter(seeds[:, 0], seeds[:, 1], s=6, color=color, alpha=0.6, linewidths=0, zorder=2)
