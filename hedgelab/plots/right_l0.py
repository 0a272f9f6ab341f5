"""Measures over L0: where they are lowest, and where the right L0 lies."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hedgelab.plots.style import DASHED, INK, MUTED, color_of, legend_below, new_figure, tidy

_BESIDE = {"explained_variance": "explained variance", "nearest_feature": "cosine with the nearest feature"}


def measures_over_l0(
    rows: Sequence[Mapping[str, Any]], measures: Mapping[str, str], found: Mapping[str, float], right: float | None
) -> Figure:
    """A panel a measure, a point an SAE, the line their mean; what is measured beside them in the last panel."""
    figure, grid = new_figure(4.0 * (len(measures) + 1), 3.5, "Where do latents mix least?", 1, len(measures) + 1)
    wanted = sorted({row["wanted_l0"] for row in rows})
    handles: list[Any] = []

    def curve(axes: Any, key: str, color: str, label: str) -> Any:
        means = [np.mean([(row["l0"], row[key]) for row in rows if row["wanted_l0"] == one], axis=0) for one in wanted]
        axes.scatter([row["l0"] for row in rows], [row[key] for row in rows], s=8, alpha=0.5, linewidths=0, color=color)
        return axes.plot(*np.transpose(means), color=color, linewidth=1.4, label=label)[0]

    for number, (axes, (key, title)) in enumerate(zip(grid, measures.items(), strict=False)):
        curve(axes, key, color_of(number), title)
        drawn = axes.axvline(found[f"l0/{key}"], color=INK, linewidth=1, label="lowest")
        if np.isfinite(found[f"l0/{key}_low"]):  # not of one seed
            axes.axvspan(found[f"l0/{key}_low"], found[f"l0/{key}_high"], color=INK, alpha=0.08, linewidth=0)
        handles.append(drawn)
        tidy(axes, title, "L0")
    beside = {key: title for key, title in _BESIDE.items() if key in rows[0]}
    for number, (key, title) in enumerate(beside.items(), start=len(measures)):
        handles.append(curve(grid[-1], key, color_of(number), title))
    tidy(grid[-1], "", "L0")
    for axes in grid:
        if right is not None:
            handles.append(
                axes.axvline(right, color=MUTED, linewidth=1, linestyle=DASHED, label="right L0 of these features")
            )
    legend_below(figure, handles)
    return figure
