"""Measures of hedging against the truth, and hedging over widths and matryoshka levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from hedgelab.plots.style import FAINT, INK, PALETTE, new_figure, tidy

Points = Mapping[str, Sequence[tuple[float, float]]]
"""Pairs (true hedging, measure) by toy."""


def measures_against_truth(
    measures: Mapping[str, Mapping[str, Points]], ranks: Mapping[str, Mapping[str, float]]
) -> Figure:
    """A scatter for every measure (rows) and kind of SAE (columns).

    Args:
        measures: Points by measure and kind; measures named "residual…" are in the units of the truth and get its diagonal.
        ranks: Spearman's rank correlation of each panel.
    """
    kinds = list(next(iter(measures.values())))
    figure = new_figure(
        2.5 * len(kinds) + 0.6, 2.35 * len(measures) + 0.9, "Do measures without ground truth see hedging?"
    )
    grid = figure.subplots(len(measures), len(kinds), squeeze=False, sharex="col", sharey="row")
    for row, (measure, by_kind) in zip(grid, measures.items(), strict=True):
        for axes, (kind, points) in zip(row, by_kind.items(), strict=True):
            for color, (toy, pairs) in zip(PALETTE, points.items(), strict=False):
                true, value = np.array(pairs, dtype=float).reshape(-1, 2).T
                axes.scatter(true, value, s=12, color=color, alpha=0.85, linewidths=0, label=toy, zorder=3)
            if measure.startswith("residual"):
                axes.axline((0, 0), slope=1, color=FAINT, linewidth=1)
            axes.axhline(0, color=FAINT, linewidth=0.8)
            last = row is grid[-1]
            tidy(axes, f"{kind}: Spearman {ranks[measure][kind]:.3f}", "true hedging" if last else "")
        row[0].set_ylabel(measure, fontsize=9, color=INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8, labelcolor=INK
    )
    return figure


def hedging_over_width(curves: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> Figure:
    """True hedging over the SAE's width: a panel a kind, a curve a toy (mean over seeds).

    Args:
        curves: Values of every seed by kind, toy and width.
    """
    figure = new_figure(2.6 * len(curves) + 0.4, 3.1, "Hedging falls as SAEs get wider")
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (kind, by_toy) in zip(panels, curves.items(), strict=True):
        for color, (toy, by_width) in zip(PALETTE, by_toy.items(), strict=False):
            axes.plot(list(by_width), [np.mean(v) for v in by_width.values()], marker="o", ms=3, color=color, label=toy)
        widths = sorted({width for by_width in by_toy.values() for width in by_width})
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        tidy(axes, kind, "width", "true hedging" if axes is panels[0] else "")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8, labelcolor=INK
    )
    return figure


def hedging_of_levels(levels: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """True hedging of matryoshka levels' own latents, innermost first: a panel a toy, a group of bars a width.

    Args:
        levels: Mean over seeds by toy and width.
    """
    figure = new_figure(2.2 * len(levels) + 0.4, 2.9, "Where matryoshka SAEs hedge")
    panels = figure.subplots(1, len(levels), squeeze=False, sharey=True)[0]
    for axes, (toy, by_width) in zip(panels, levels.items(), strict=True):
        for place, values in enumerate(by_width.values()):
            for level, value in enumerate(values):
                label = f"level {level + 1}" if place == 0 else None
                axes.bar(place + 0.25 * (level - 1), value, 0.23, color=PALETTE[level], label=label, zorder=2)
        axes.set_xticks(range(len(by_width)), [str(width) for width in by_width])
        tidy(axes, toy, "width", "true hedging" if axes is panels[0] else "")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8, labelcolor=INK
    )
    return figure
