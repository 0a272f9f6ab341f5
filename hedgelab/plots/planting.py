"""A trial by lot: what arms of rising dose did to the rows of parents, and what theory said they would."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hedgelab.plots.style import DASHED, INK, MUTED, color_of, legend_below, new_figure, tidy

Row = Mapping[str, Any]


def doses_and_responses(arms: Sequence[Row], doses: Sequence[float]) -> Figure:
    """Share of the child in the parent's row by dose, one panel a kind, one colour a width; crosses are the theory's.

    The last place is that of children that fire only where their parent is silent.
    """
    kinds, widths = (list(dict.fromkeys(row[key] for row in arms)) for key in ("kind", "width"))
    figure, grid = new_figure(
        1.2 + 3.6 * len(kinds), 3.7, "Planted children in their parents' rows", 1, len(kinds), sharey=True
    )
    places: dict[Any, int] = {dose: place for place, dose in enumerate(doses)}
    handles: list[Any] = []
    for axes, kind in zip(grid, kinds, strict=True):
        for number, width in enumerate(widths):
            own = [row for row in arms if (row["kind"], row["width"]) == (kind, width)]
            shift = 0.14 * (number - (len(widths) - 1) / 2)
            at = np.array([places.get(row["dose"], len(doses)) + shift for row in own])
            mean, low, high = (np.array([row[key] for row in own]) for key in ("share", "share_low", "share_high"))
            drawn = axes.errorbar(
                at, mean, np.stack([mean - low, high - mean]), fmt="o", markersize=4, linewidth=1.2, color=color_of(number),
                label=f"{width} latents", zorder=3,
            )  # fmt: skip
            axes.scatter(at, [row["predicted"] for row in own], marker="x", s=22, linewidths=1, color=INK, zorder=4)
            handles += [drawn] if axes is grid[0] else []
        axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=DASHED)
        names = [f"{dose:g}" for dose in doses]
        axes.set_xticks(range(len(doses) + 1), [*names, "only\nwithout"])
        tidy(axes, kind, "share of the parent's firings", "share of its row" if axes is grid[0] else "")
    handles.append(grid[0].scatter([], [], marker="x", color=INK, label="omitted-variable theory"))
    legend_below(figure, handles)
    return figure


def shares_against_theory(pairs: Sequence[Row]) -> Figure:
    """Every pair of every SAE: what its row holds of the child, against what the regression on codes says; a panel a kind."""
    kinds, widths = (list(dict.fromkeys(row[key] for row in pairs)) for key in ("kind", "width"))
    figure, grid = new_figure(1.2 + 3.6 * len(kinds), 3.7, "Omitted-variable theory", 1, len(kinds), sharey=True)
    handles: list[Any] = []
    for axes, kind in zip(grid, kinds, strict=True):
        for number, width in enumerate(widths):
            own = [row for row in pairs if (row["kind"], row["width"]) == (kind, width)]
            x, y = ([row[key] for row in own] for key in ("predicted", "share"))
            drawn = axes.scatter(x, y, s=5, alpha=0.4, linewidths=0, color=color_of(number), label=f"{width} latents")
            handles += [drawn] if axes is grid[0] else []
        axes.axline((0, 0), slope=1, color=MUTED, linewidth=0.8, linestyle=DASHED)
        tidy(axes, kind, "predicted share", "share of the parent's row" if axes is grid[0] else "")
    legend_below(figure, handles)
    return figure
