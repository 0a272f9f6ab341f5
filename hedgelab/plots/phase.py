"""Phase diagrams: a quantity over two axes, with its zero line and what theory says."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from hedgelab.plots.style import DIVERGING, INK, MUTED, new_figure, tidy

_THEORY = "#1b7f3b"


class Overlay(NamedTuple):
    """What closed forms say about a diagram.

    Attributes:
        values: The quantity at the minimum that each point's SAE is in, ``[h, w]``; NaN where none is known.
        shallower: Whether a deeper minimum exists, ``[h, w]`` bool.
    """

    values: ArrayLike
    shallower: ArrayLike


def phase_diagram(
    x: ArrayLike,
    y: ArrayLike,
    values: ArrayLike,
    title: str,
    xlabel: str,
    ylabel: str,
    quantity: str,
    theory: Overlay | None = None,
    logarithmic: tuple[bool, bool] = (False, False),
) -> Figure:
    """A heatmap on a scale that is symmetric about zero, its zero contour in black, theory's contours in green.

    Args:
        x: Values of the horizontal axis, ``[w]``.
        y: Values of the vertical axis, ``[h]``.
        values: The quantity, ``[h, w]``; NaN where there is none.
        title: Head of the figure.
        xlabel: Name of the horizontal axis.
        ylabel: Name of the vertical axis.
        quantity: Name of the quantity, for the colour bar.
        theory: What closed forms say; None for no overlay.
        logarithmic: Whether the horizontal and the vertical axis are logarithmic.
    """
    x, y, shown = (np.asarray(part, dtype=float) for part in (x, y, values))
    size = np.nanmax(np.abs(shown)) if np.isfinite(shown).any() else 1.0
    figure = new_figure(6.4, 5.2, title)
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        x, y, shown, cmap=DIVERGING, vmin=-(size or 1.0), vmax=size or 1.0, shading="nearest", rasterized=True
    )
    tidy(axes, "", xlabel, ylabel, grid=False)
    legend: list[Artist] = []
    if np.nanmin(shown) < -0.01 * size and np.nanmax(shown) > 0.01 * size:
        axes.contour(x, y, shown, levels=[0], colors=INK, linewidths=1.4)
        legend.append(Line2D([], [], color=INK, linewidth=1.4, label="zero, trained SAEs"))
    if theory is not None and np.isfinite(np.asarray(theory.values, dtype=float)).any():
        levels = MaxNLocator(8, symmetric=True).tick_values(-size, size)
        closed = np.asarray(theory.values, dtype=float)
        lines = axes.contour(x, y, closed, levels=levels, colors=_THEORY, linewidths=0.9, linestyles="dashed")
        axes.clabel(lines, fontsize=7, fmt="%.2g")
        legend.append(Line2D([], [], color=_THEORY, linewidth=0.9, linestyle="dashed", label="closed form"))
        shallower = np.asarray(theory.shallower, dtype=float)
        if shallower.any():
            with rc_context({"hatch.linewidth": 0.4, "hatch.color": MUTED}):
                axes.contourf(x, y, shallower, levels=[0.5, 1.5], colors="none", hatches=["////"])
            legend.append(Patch(facecolor="none", edgecolor=MUTED, hatch="////", label="in a shallower minimum"))
    for set_scale, log in zip((axes.set_xscale, axes.set_yscale), logarithmic, strict=True):
        if log:
            set_scale("log")
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    bar = figure.colorbar(mesh, ax=axes, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, labelcolor=MUTED, length=0)
    bar.set_label(quantity, fontsize=9, color=INK)
    return figure
