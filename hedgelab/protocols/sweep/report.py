"""What a sweep leaves behind: a table of every cell and seed, means and spreads, the figure."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hedgelab.plots.sweep import Point, sweep_panels
from hedgelab.protocols.sweep.axes import SEED, Cell, is_number
from hedgelab.protocols.sweep.members import CELL_TAG
from hedgelab.tracking.runs import search_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

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
    """What one seed of one cell gave.

    Attributes:
        line: Line of the sweep.
        values: Where the cell stands on the axes, without the seed.
        seed: Its seed; None where there was but one, of no axis.
        run_id: Its run.
        metrics: What was measured.
    """

    line: str
    values: Mapping[str, Any]
    seed: int | None
    run_id: str
    metrics: Mapping[str, float]


def finished_run(client: MlflowClient, cell_id: str) -> Run | None:
    """The latest finished run of a cell; None without one."""
    return next(search_runs(client, f"tags.{CELL_TAG} = '{cell_id}' and attributes.status = 'FINISHED'"), None)


def interrupted_run(client: MlflowClient, cell_id: str, parent: str) -> str | None:
    """The run of a cell below a sweep's that was begun and has come to no end; None without one."""
    query = (
        f"tags.{CELL_TAG} = '{cell_id}' and tags.mlflow.parentRunId = '{parent}' and attributes.status != 'FINISHED'"
    )
    found = next(search_runs(client, query), None)
    return None if found is None else str(found.info.run_id)


def rows_of(cell: Cell, run: Run) -> list[Row]:
    """A run's rows: one a seed, where it tells seeds apart."""
    values = {key: value for key, value in cell.values.items() if key != SEED}
    metrics = {name: value for name, value in run.data.metrics.items() if name.startswith(_REPORTED)}
    by_seed: dict[int, dict[str, float]] = {}
    for name, value in metrics.items():
        if found := _OF_A_SEED.fullmatch(name):
            by_seed.setdefault(int(found[2]), {})[f"{found[1]}/{found[3]}"] = value
    if not by_seed:
        by_seed_or_none: dict[int | None, dict[str, float]] = {cell.seed: metrics}
    else:
        by_seed_or_none = dict(sorted(by_seed.items()))
    return [Row(cell.line, values, seed, run.info.run_id, own) for seed, own in by_seed_or_none.items()]


def summary(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Mean, standard deviation (None of one seed) and number of seeds of every metric, for each place in the sweep."""
    return [
        {
            "line": own[0].line,
            **own[0].values,
            "seeds": len(own),
            "metrics": {
                name: _spread([row.metrics[name] for row in own if name in row.metrics]) for name in _names(own)
            },
        }
        for own in _places(rows)
    ]


def as_csv(rows: Sequence[Row]) -> str:
    """One line a row: line, axes, seed, run, metrics."""
    axes = list(dict.fromkeys(key for row in rows for key in row.values))
    metrics = _names(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["line", *axes, "seed", "run", *metrics])
    for row in rows:
        measured = [f"{row.metrics[name]:.7g}" if name in row.metrics else "" for name in metrics]
        place = [_cell_text(row.values.get(key, "")) for key in axes]
        writer.writerow([row.line, *place, "" if row.seed is None else row.seed, row.run_id, *measured])
    return text.getvalue()


def as_json(rows: Sequence[Row], failures: Mapping[str, str]) -> str:
    """The rows, their summary, and what failed."""
    document = {
        "rows": [
            {"line": row.line, **row.values, "seed": row.seed, "run": row.run_id, "metrics": dict(row.metrics)}
            for row in rows
        ],
        "summary": summary(rows),
        "failures": dict(failures),
    }
    return json.dumps(document, indent=1, default=str)


def figure(
    rows: Sequence[Row],
    x: str | None,
    y: Sequence[str],
    title: str,
    log_x: bool | None = None,
    log_y: bool = False,
) -> Figure | None:
    """Each metric against an axis or another metric; None where nothing can be drawn.

    Lines, and the values of all other axes, make curves; seeds make the spread.

    Args:
        rows: What was measured.
        x: Axis or metric; None is the first numeric axis with several values, else the first axis.
        y: Metrics; those that no row has are left out.
        title: Title of the figure.
        log_x: Whether x is logarithmic; None decides by the values.
        log_y: Whether y is logarithmic.
    """
    x = x or default_axis(rows) or ""
    panels: dict[str, dict[str, list[Point]]] = {}
    names = _categories(rows, x)
    for place in _places(rows):
        at = _position(place, x, names)
        if at is None:
            continue
        for metric in y:
            values = [row.metrics[metric] for row in place if metric in row.metrics]
            if values:
                panels.setdefault(metric, {}).setdefault(_label(place[0], x, rows), []).append(Point(at, values))
    if not panels:
        return None
    ordered = {metric: panels[metric] for metric in y if metric in panels}
    positions = [point.x for curves in ordered.values() for points in curves.values() for point in points]
    if log_x is None:
        log_x = names is None and min(positions) > 0 and max(positions) >= 20 * min(positions)
    return sweep_panels(ordered, x.rsplit(".", 1)[-1], title, (log_x, log_y), names)


def default_axis(rows: Sequence[Row]) -> str | None:
    """The first numeric axis with several values, else the first axis."""
    axes = list(dict.fromkeys(key for row in rows for key in row.values))
    for key in axes:
        values = [row.values[key] for row in rows if key in row.values]
        if all(map(is_number, values)) and len(set(values)) > 1:
            return key
    return axes[0] if axes else None


def _places(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that differ in their seed only, together."""
    places: dict[str, list[Row]] = {}
    for row in rows:
        places.setdefault(json.dumps([row.line, row.values], default=str), []).append(row)
    return list(places.values())


def _position(place: Sequence[Row], x: str, names: Sequence[str] | None) -> float | None:
    """Where a place stands on x; None where it does not."""
    first = place[0]
    if not x:
        return 0.0
    if x in first.values:
        return float(names.index(_cell_text(first.values[x])) if names is not None else first.values[x])
    measured = [row.metrics[x] for row in place if x in row.metrics]
    return statistics.fmean(measured) if measured else None


def _categories(rows: Sequence[Row], x: str) -> list[str] | None:
    """The labels of an axis that is none of numbers."""
    values = [row.values[x] for row in rows if x in row.values]
    return None if all(map(is_number, values)) else list(dict.fromkeys(map(_cell_text, values)))


def _label(row: Row, x: str, rows: Sequence[Row]) -> str:
    """Name of the curve that a row belongs to; a measured x has a curve a line."""
    measured = not any(x in other.values for other in rows)
    others = {} if measured else {key: value for key, value in row.values.items() if key != x}
    parts = [f"{key.rsplit('.', 1)[-1]} {_cell_text(value)}" for key, value in others.items()]
    return ", ".join([row.line, *parts] if row.line else parts)


def _cell_text(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rsplit(".", 1)[-1]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def _spread(values: Sequence[float]) -> dict[str, float | int | None]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "n": len(values)}
