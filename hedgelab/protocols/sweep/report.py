"""What the cells of a sweep, or SAEs side by side, have given: rows, their means and spreads, tables, the figure."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib.figure import Figure

from hedgelab.plots.sweep import named_panels, sweep_panels
from hedgelab.protocols.sweep.config import Cell, FigureOptions, label

if TYPE_CHECKING:
    from mlflow.entities import Run

DEFAULT_METRICS = {
    "hedge": [
        "hedging/degree", "hedging/live_degree", "hedging/covariance_degree", "hedging/foreign_degree",
        "hedging/noise_floor", "control/explained_variance", "control/l0", "control/dead_fraction",
    ],
    "fit": ["val/explained_variance", "val/l0", "val/dead_latents", "val/mse"],
}  # fmt: skip
SAMPLES = "samples"  # the axis of learning curves
_REPORTED = ("hedging/", "control/", "extended/", "val/", "train/", "samples/s")


@dataclass(frozen=True)
class Row:
    """What one seed of one cell gave: its line, its place on the axes (without the seed), its run, and metrics by name."""

    line: str
    values: Mapping[str, Any]
    seed: int | None
    run_id: str
    metrics: Mapping[str, float]


class Place(NamedTuple):
    """What rows that differ in their seed only gave: each metric's values, of those that have it."""

    line: str
    values: Mapping[str, Any]
    seeds: int
    metrics: dict[str, list[float]]


def rows_of(cell: Cell, run: "Run") -> list[Row]:
    """A run's rows: one a seed, where it tells seeds apart."""
    metrics = {name: value for name, value in run.data.metrics.items() if name.startswith(_REPORTED)}
    by_seed: dict[Any, dict[str, float]] = {}
    for name, value in metrics.items():
        if found := re.fullmatch(r"(.+)/seed(-?\d+)/(.+)", name):
            by_seed.setdefault(int(found[2]), {})[f"{found[1]}/{found[3]}"] = value
    rows = sorted(by_seed.items()) or [(cell.seed, metrics)]
    return [Row(cell.line, cell.values, seed, run.info.run_id, own) for seed, own in rows]


def over_training(cell: Cell, run: "Run", metrics: Sequence[str], history: Callable[[str, str], Iterable[Any]]) -> list[Row]:
    """A fit's metrics at each validation pass: a row a pass, with another axis ``samples``, the examples trained on by then.

    ``history(run_id, metric)`` gives what was logged, points with a ``step`` and a ``value``. The batch size is that of the
    data, or of what they wrap; where a config does not say it, nothing is known.
    """
    sizes = [int(size) for key, size in run.data.params.items() if re.fullmatch(r"data\..*\bbatch_size", key)]
    if len(sizes) != 1:
        return []
    found: dict[int, dict[str, float]] = {}
    for name in metrics:
        for point in history(run.info.run_id, name) if name in run.data.metrics else ():
            found.setdefault(point.step, {})[name] = point.value
    return [
        Row(cell.line, {**cell.values, SAMPLES: step * sizes[0]}, cell.seed, run.info.run_id, own)
        for step, own in sorted(found.items())
    ]


def places(rows: Sequence[Row]) -> list[Place]:
    """Rows that differ in their seed only, together."""
    together: dict[str, list[Row]] = {}
    for row in rows:
        together.setdefault(json.dumps([row.line, row.values], default=str), []).append(row)
    found = []
    for own in together.values():
        values = {name: [row.metrics[name] for row in own if name in row.metrics] for name in columns(own, "metrics")}
        found.append(Place(own[0].line, own[0].values, len(own), values))
    return found


def flat(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of a CSV file: line, axes, seed, run, metrics."""
    axes, metrics = columns(rows, "values"), columns(rows, "metrics")
    return [
        {
            "line": row.line,
            **{key: value if is_number(value := row.values.get(key, "")) else label(value) for key in axes},
            "seed": "" if row.seed is None else row.seed,
            "run": row.run_id,
            **{name: row.metrics.get(name, "") for name in metrics},
        }
        for row in rows
    ]


def as_json(rows: Sequence[Row], failures: Mapping[str, str]) -> str:
    """The rows; mean, standard deviation (null of one seed) and number of each metric's values at each place; what failed."""

    def summary_of(values: list[float]) -> dict[str, Any]:
        return {"mean": fmean(values), "std": _spread(values), "n": len(values)}

    plain = [
        {"line": row.line, **row.values, "seed": row.seed, "run": row.run_id, "metrics": dict(row.metrics)} for row in rows
    ]
    summary = [
        {"line": line, **values, "seeds": seeds, "metrics": {name: summary_of(own) for name, own in metrics.items()}}
        for line, values, seeds, metrics in places(rows)
    ]
    return json.dumps({"rows": plain, "summary": summary, "failures": dict(failures)}, indent=1, default=str)


def table(rows: Sequence[Row], metrics: Sequence[str]) -> list[list[str]]:
    """A header, and for each place its line, its values, and the means over seeds with their spread."""
    axes = columns(rows, "values")
    result = [["line", *(key.rsplit(".", 1)[-1] for key in axes), *metrics]]
    for place in places(rows):
        values = [place.values.get(key, "") for key in axes]
        found = [place.metrics.get(name, []) for name in metrics]
        means = [f"{fmean(own):.4g}" if own else "" for own in found]
        spreads = ["" if (std := _spread(own)) is None else f" ± {std:.2g}" for own in found]
        shown = [f"{value:g}" if is_number(value) else label(value) for value in values]
        result.append([place.line, *shown, *map("".join, zip(means, spreads, strict=True))])
    return result


def figure(rows: Sequence[Row], titles: Mapping[str, str], heading: str, options: FigureOptions) -> Figure | None:
    """Each metric with a title that some row has against an axis or another metric; None where nothing can be drawn.

    Lines, and the values of all other axes, make curves; seeds make the spread. Without ``x`` it is the first numeric axis with
    several values, else the first axis; without axes each line is a row.
    """
    axes = {key: [row.values[key] for row in rows if key in row.values] for key in columns(rows, "values")}
    if not axes and not options.x:
        found = places(rows)
        named = {titles[name]: {row.line: own for row in found if (own := row.metrics.get(name))} for name in titles}
        return named_panels(kept, heading) if (kept := {title: own for title, own in named.items() if own}) else None
    numeric = [key for key, values in axes.items() if all(map(is_number, values)) and len(set(values)) > 1]
    x = options.x or next(iter([*numeric, *axes]))
    names = None if all(map(is_number, axes.get(x, []))) else list(dict.fromkeys(map(label, axes[x])))
    panels: dict[str, dict[str, list[tuple[float, Sequence[float]]]]] = {metric: {} for metric in titles}
    for place in places(rows):
        if x in place.values:
            at = float(place.values[x] if names is None else names.index(label(place.values[x])))
        elif x in place.metrics:
            at = fmean(place.metrics[x])
        else:
            continue
        others = {key: value for key, value in place.values.items() if x in axes and key != x}
        curve_name = [place.line, *(f"{key.rsplit('.', 1)[-1]} {label(value)}" for key, value in others.items())]
        for metric, curves in panels.items():
            if metric in place.metrics:
                curves.setdefault(", ".join(filter(None, curve_name)), []).append((at, place.metrics[metric]))
    positions = [at for curves in panels.values() for curve in curves.values() for at, _ in curve]
    if not positions:
        return None
    wide = names is None and min(positions) > 0 and max(positions) >= 20 * min(positions)
    log_x = wide if options.log_x is None else options.log_x
    drawn = {titles[metric]: curves for metric, curves in panels.items() if curves}
    until = options.until if x == SAMPLES else None
    return sweep_panels(drawn, x.rsplit(".", 1)[-1], heading, (log_x, options.log_y), names, until=until)


def _spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None of one, or where some have no number (NaN), which ``stdev`` does not take."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def is_number(value: Any) -> bool:
    """Whether a value can stand on a numeric axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def columns(rows: Sequence[Row], kind: str) -> list[str]:
    """The axes (``values``) or the metrics of rows, in their order."""
    return list(dict.fromkeys(name for row in rows for name in getattr(row, kind)))
