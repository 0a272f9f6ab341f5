"""What the cells of a sweep, or SAEs side by side, have given: rows, their means and spreads, tables, the figure."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hedgelab.plots.sweep import Point, sweep_panels
from hedgelab.protocols.sweep.axes import Cell, is_number, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Run

DEFAULT_METRICS = {
    "hedge": [
        "hedging/degree", "hedging/live_degree", "hedging/covariance_degree", "hedging/foreign_degree",
        "hedging/noise_floor", "control/explained_variance", "control/l0", "control/dead_fraction",
    ],
    "fit": ["val/explained_variance", "val/l0", "val/dead_latents", "val/mse"],
}  # fmt: skip
_OF_A_SEED = re.compile(r"(.+)/seed(-?\d+)/(.+)")
_REPORTED = ("hedging/", "control/", "extended/", "val/", "train/", "samples/s")


@dataclass(frozen=True)
class Row:
    """What one seed of one cell gave: its line, its place on the axes (without the seed), its run, and metrics by name."""

    line: str
    values: Mapping[str, Any]
    seed: int | None
    run_id: str
    metrics: Mapping[str, float]


def rows_of(cell: Cell, run: Run) -> list[Row]:
    """A run's rows: one a seed, where it tells seeds apart."""
    metrics = {name: value for name, value in run.data.metrics.items() if name.startswith(_REPORTED)}
    by_seed: dict[Any, dict[str, float]] = {}
    for name, value in metrics.items():
        if found := _OF_A_SEED.fullmatch(name):
            by_seed.setdefault(int(found[2]), {})[f"{found[1]}/{found[3]}"] = value
    rows = sorted(by_seed.items()) or [(cell.seed, metrics)]
    return [Row(cell.line, cell.place, seed, run.info.run_id, own) for seed, own in rows]


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean, standard deviation (None of one seed) and number of seeds of every metric, for each place in the sweep."""
    result = []
    for own in _places(rows):
        metrics = {}
        for name in _metrics(own):
            values = [row.metrics[name] for row in own if name in row.metrics]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            metrics[name] = {"mean": statistics.fmean(values), "std": deviation, "n": len(values)}
        result.append({"line": own[0].line, **own[0].values, "seeds": len(own), "metrics": metrics})
    return result


def flat(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of a CSV file: line, axes, seed, run, metrics."""
    axes, metrics = _axes(rows), _metrics(rows)
    return [
        {
            "line": row.line,
            **{key: value if is_number(value := row.values.get(key, "")) else show(value) for key in axes},
            "seed": "" if row.seed is None else row.seed,
            "run": row.run_id,
            **{name: row.metrics.get(name, "") for name in metrics},
        }
        for row in rows
    ]


def as_json(rows: Sequence[Row], failures: Mapping[str, str]) -> str:
    """The rows, their summary, and what failed."""
    plain = [
        {"line": row.line, **row.values, "seed": row.seed, "run": row.run_id, "metrics": dict(row.metrics)}
        for row in rows
    ]
    return json.dumps({"rows": plain, "summary": summary(rows), "failures": dict(failures)}, indent=1, default=str)


def table(rows: Sequence[Row], metrics: Sequence[str]) -> list[list[str]]:
    """A header, and for each place its line, its values, and the means over seeds with their spread."""
    axes = _axes(rows)
    result = [["line", *(key.rsplit(".", 1)[-1] for key in axes), *metrics]]
    for place in summary(rows):
        values = [place.get(key, "") for key in axes]
        shown = [f"{value:g}" if is_number(value) else show(value) for value in values]
        found = [place["metrics"].get(name, {"mean": None, "std": None}) for name in metrics]
        numbers = [
            ("" if one["mean"] is None else f"{one['mean']:.4g}")
            + ("" if one["std"] is None else f" ± {one['std']:.2g}")
            for one in found
        ]
        result.append([place["line"], *shown, *numbers])
    return result


def figure(
    rows: Sequence[Row],
    x: str | None,
    y: Sequence[str],
    title: str,
    log_x: bool | None = None,
    log_y: bool = False,
) -> Figure | None:
    """Each metric of ``y`` that some row has against an axis or another metric; None where nothing can be drawn.

    Lines, and the values of all other axes, make curves; seeds make the spread. Without ``x`` it is the first numeric axis with
    several values, else the first axis; without ``log_x`` the values decide whether it is logarithmic.
    """
    x = x or default_axis(rows) or ""
    on_axis = [row.values[x] for row in rows if x in row.values]
    names = None if all(map(is_number, on_axis)) else list(dict.fromkeys(map(show, on_axis)))
    panels: dict[str, dict[str, list[Point]]] = {metric: {} for metric in y}
    positions: list[float] = []
    for own in _places(rows):
        values = own[0].values
        measured = [row.metrics[x] for row in own if x in row.metrics]
        if x in values:
            at = float(values[x] if names is None else names.index(show(values[x])))
        elif measured or not x:
            at = statistics.fmean(measured) if measured else 0.0
        else:
            continue
        others = {key: value for key, value in values.items() if key != x} if on_axis else {}
        label = ", ".join(
            [
                *filter(None, [own[0].line]),
                *(f"{key.rsplit('.', 1)[-1]} {show(value)}" for key, value in others.items()),
            ]
        )
        for metric, curves in panels.items():
            if numbers := [row.metrics[metric] for row in own if metric in row.metrics]:
                curves.setdefault(label, []).append(Point(at, numbers))
                positions.append(at)
    if not positions:
        return None
    if log_x is None:
        log_x = names is None and min(positions) > 0 and max(positions) >= 20 * min(positions)
    drawn = {metric: curves for metric, curves in panels.items() if curves}
    return sweep_panels(drawn, x.rsplit(".", 1)[-1], title, (log_x, log_y), names)


def default_axis(rows: Sequence[Row]) -> str | None:
    """The first numeric axis with several values, else the first axis."""
    axes = _axes(rows)
    for key in axes:
        values = [row.values[key] for row in rows if key in row.values]
        if all(map(is_number, values)) and len(set(values)) > 1:
            return key
    return axes[0] if axes else None


def _places(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed only, together."""
    places: dict[str, list[Row]] = {}
    for row in rows:
        places.setdefault(json.dumps([row.line, row.values], default=str), []).append(row)
    return list(places.values())


def _axes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.values))


def _metrics(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics))
