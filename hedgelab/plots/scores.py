"""Scores of many SAEs against what distinguishes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from hedgelab.plots.style import INK, MUTED, PALETTE, new_figure, tidy


class Panel(NamedTuple):
    """One score.

    Attributes:
        title: What it is.
        better: ``higher`` or ``lower``; empty where neither is.
        curves: Values of the seeds at each place of the axis, by label.
    """

    title: str
    better: str
    curves: Mapping[str, Mapping[float, Sequence[float]]]


def scores_against(axis: str, panels: Sequence[Panel], title: str, columns: int = 4) -> Figure:
    """A panel a score: means over seeds with their standard deviation, and every seed as a dot.

    The places of the axis are drawn at equal distances: grids are rarely even.

    Args:
        axis: Name of the axis.
        panels: The scores.
        title: Title.
        columns: Panels a row.
    """
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.0 * columns, 2.45 * rows + 0.5, title)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        places = sorted({place for curve in panel.curves.values() for place in curve})
        for i, (label, curve) in enumerate(panel.curves.items()):
            color = PALETTE[i % len(PALETTE)]
            known = [place for place in places if curve.get(place)]
            at = [places.index(place) for place in known]
            means = [float(np.mean(curve[place])) for place in known]
            spread = [float(np.std(curve[place], ddof=1)) if len(curve[place]) > 1 else 0.0 for place in known]
            axes.errorbar(
                at, means, spread, color=color, linewidth=1.5, capsize=2.5, marker="o", markersize=3.5, label=label
            )
            for place, values in zip(at, (curve[place] for place in known), strict=True):
                axes.scatter([place] * len(values), list(values), s=5, color=color, alpha=0.45, linewidths=0, zorder=3)
        axes.set_xticks(range(len(places)), [f"{place:g}" for place in places])
        if len(panel.curves) > 1:
            axes.legend(frameon=False, fontsize=7, labelcolor=INK, handlelength=1.2)
        arrow = {"higher": " ↑", "lower": " ↓"}.get(panel.better, "")
        tidy(axes, panel.title + arrow, axis, "")
        axes.title.set_fontsize(9)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    note = "mean ± standard deviation over seeds; dots are seeds; ↑ higher is better, ↓ lower"
    figure.supxlabel(note, fontsize=7, color=MUTED, x=0.99, ha="right")
    return figure
