"""Runs over training, one above the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from hedgelab.plots.style import FAINT, INK, PALETTE, new_figure, tidy

Curve = tuple[Sequence[int], Sequence[float]]
_COLUMNS = 3


def overlaid_curves(curves: Mapping[str, Mapping[str, Curve]], titles: Mapping[str, str], heading: str) -> Figure:
    """A panel for each metric, a line for each run.

    Args:
        curves: Steps and values, by metric and by the run's label.
        titles: Titles of the panels, by metric.
        heading: Title of the figure.
    """
    runs = list(dict.fromkeys(label for lines in curves.values() for label in lines))
    columns = min(_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    legend_columns = 2 * columns if columns > 1 else 1
    legend_rows = -(-len(runs) // legend_columns) if 1 < len(runs) <= len(PALETTE) else 0
    figure = new_figure(max(4.6, 3.4 * columns + 0.4), 2.5 * rows + 0.6 + 0.22 * legend_rows, heading)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    for axes, (metric, lines) in zip(grid.flat, curves.items(), strict=False):
        for label, (steps, values) in lines.items():
            color = PALETTE[runs.index(label)] if len(runs) <= len(PALETTE) else FAINT
            axes.plot(steps, values, color=color, linewidth=1.4, label=label)
        positive = [value for _, values in lines.values() for value in values]
        if min(positive) > 0 and max(positive) > 10 * min(positive):
            axes.set_yscale("log")
        tidy(axes, titles.get(metric, metric), "step")
    if 1 < len(runs) <= len(PALETTE):
        handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=legend_columns, frameon=False,
            fontsize=8, labelcolor=INK,
        )  # fmt: skip
    return figure
