"""Scores of many SAEs put side by side: a table, and a figure of each score against what distinguishes them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from hedgelab.plots.scores import Panel, scores_against
from hedgelab.protocols.evaluation.scores import table

_TITLES = {
    "density/explained_variance": ("explained variance", "higher"),
    "density/l0": ("L0", ""),
    "density/dead_fraction": ("dead latents", "lower"),
    "loss_recovered/recovered": ("loss recovered", "higher"),
    "loss_recovered/kl_recovered": ("KL recovered", "higher"),
    "probing/f1_k1": ("probing F1, k = 1", "higher"),
    "probing/f1_k2": ("probing F1, k = 2", "higher"),
    "probing/f1_k5": ("probing F1, k = 5", "higher"),
    "probing/f1_k10": ("probing F1, k = 10", "higher"),
    "absorption/full": ("full absorption", "lower"),
    "absorption/fraction": ("absorption fraction", "lower"),
    "absorption/split_latents": ("latents a letter is split into", "lower"),
    "absorption/f1_k1": ("first letter F1, k = 1", "higher"),
    "geometry/mean_max_cosine": ("mean largest cosine", "lower"),
    "geometry/near_duplicates": ("near-duplicate latents", "lower"),
}
_BY_COUNT = {"tpp/": ("TPP, {} latents", "higher"), "scr/": ("SCR, {} latents", "higher")}
_SHOWN_COUNTS = (2, 10, 20)
_DRAWN = (
    "density/explained_variance", "density/dead_fraction", "loss_recovered/recovered", "geometry/mean_max_cosine",
    "probing/f1_k1", "probing/f1_k5", "probing/f1_k10", "absorption/f1_k1",
    "absorption/full", "absorption/split_latents", "tpp/n10", "scr/n20",
)  # fmt: skip
"""What has a panel, as long as one of them is known; the table has everything."""


class Row(NamedTuple):
    """One SAE.

    Attributes:
        name: Its name.
        place: Where it stands on the axis.
        line: The curve it belongs to.
        metrics: Its scores.
    """

    name: str
    place: float
    line: str
    metrics: Mapping[str, float]


class Axis(NamedTuple):
    """What distinguishes SAEs.

    Attributes:
        key: Parameter of their runs.
        places: Its value for each, by name.
        lines: Values of other parameters that distinguish them, by name.
    """

    key: str
    places: dict[str, float]
    lines: dict[str, str]

    @property
    def label(self) -> str:
        """Short name."""
        return self.key.rsplit(".", 1)[-1]


def find_axis(params: Mapping[str, Mapping[str, str]], key: str | None = None) -> Axis | None:
    """The numeric parameter of data or model in which runs differ, seeds aside; None without one.

    Args:
        params: Parameters of the runs, by name.
        key: The parameter, or the end of its name; None takes the first by name that differs.
    """
    keys = sorted({name for own in params.values() for name in own})
    differing = [name for name in keys if len({own.get(name) for own in params.values()}) > 1]
    differing = [name for name in differing if name.startswith(("data.", "model.")) and not name.endswith(".seed")]
    numeric = [name for name in differing if all(_number(own.get(name)) is not None for own in params.values())]
    if key is not None:
        numeric = [name for name in numeric if name == key or name.endswith(f".{key}")]
    if not numeric:
        return None
    chosen = numeric[0]
    places = {name: float(own[chosen]) for name, own in params.items()}
    others = [name for name in differing if name != chosen and name not in numeric]
    lines = {name: " ".join(str(own.get(other)) for other in others) for name, own in params.items()}
    return Axis(chosen, places, lines)


def rows_of(axis: Axis, results: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """The SAEs in order of their places."""
    rows = [Row(name, axis.places[name], axis.lines[name], metrics) for name, metrics in results.items()]
    return sorted(rows, key=lambda row: (row.line, row.place, row.name))


def as_csv(axis: Axis, rows: Sequence[Row]) -> str:
    """All scores, an SAE a line."""
    metrics = sorted({name for row in rows for name in row.metrics})
    lines = [[row.name, row.line, row.place, *(row.metrics.get(name, "") for name in metrics)] for row in rows]
    return table(["sae", "line", axis.label, *metrics], lines)


def means(axis: Axis, rows: Sequence[Row]) -> list[str]:
    """Means over seeds with their spread, as lines of text: scores down, places across."""
    places = sorted({(row.line, row.place) for row in rows})
    header = [axis.label, *(f"{line} {place:g}".strip() for line, place in places)]
    lines = [header]
    for metric in shown_metrics(rows):
        cells = []
        for line, place in places:
            values = [r.metrics[metric] for r in rows if (r.line, r.place) == (line, place) and metric in r.metrics]
            spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "")
        lines.append([metric, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def shown_metrics(rows: Sequence[Row]) -> list[str]:
    """Scores worth a panel that at least one SAE has, in a fixed order."""
    known = {name for row in rows for name in row.metrics}
    counted = [f"{prefix}n{count}" for prefix in _BY_COUNT for count in _SHOWN_COUNTS]
    return [name for name in [*_TITLES, *counted] if name in known]


def figure(axis: Axis, rows: Sequence[Row], title: str, metrics: Sequence[str] | None = None) -> Figure:
    """Each score against the axis."""
    known = shown_metrics(rows)
    panels = []
    for metric in metrics or [name for name in _DRAWN if name in known] or known:
        curves: dict[str, dict[float, list[float]]] = {}
        for row in rows:
            if metric in row.metrics:
                curves.setdefault(row.line, {}).setdefault(row.place, []).append(row.metrics[metric])
        panels.append(Panel(*_title(metric), curves))
    return scores_against(axis.label, panels, title)


def _title(metric: str) -> tuple[str, str]:
    for prefix, (title, better) in _BY_COUNT.items():
        if metric.startswith(f"{prefix}n"):
            return title.format(metric.removeprefix(f"{prefix}n")), better
    return _TITLES[metric]


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
