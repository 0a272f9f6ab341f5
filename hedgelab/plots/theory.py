"""What closed forms and population optima say: loss landscapes, phase diagrams, and the balance of matryoshka levels."""

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from hedgelab.plots import style

_CLOSED_FORM = "#1b7f3b"


def loss_landscapes(t: ArrayLike, panels: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Loss over the mixture of two features, ``[points]``: a panel a title, a curve a name; a dot marks each minimum."""
    mixture = np.asarray(t, dtype=float)
    size, heading = (4.0 * len(panels) + 0.6, 3.6), "Expected loss of a tied latent between two features"
    figure, row = style.new_figure(*size, heading, columns=len(panels))
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        lowest = min(curves, key=lambda name: float(np.min(curves[name])))  # its label goes below, the others' above
        for i, (name, curve) in enumerate(curves.items()):
            loss = np.asarray(curve, dtype=float)
            best = (mixture[loss.argmin()], loss.min())
            axes.plot(mixture, loss, color=style.color_of(i), linewidth=1.5, label=name)
            axes.plot(*best, "o", color=style.color_of(i), markersize=5)
            style.note(axes, f"t = {best[0]:.2f}", best, (0, -14 if name == lowest else 8), color=style.color_of(i))
        axes.margins(y=0.12)
        style.tidy(axes, title, "t   (0: feature 0, 1: feature 1)", "loss" if axes is row[0] else "")
    style.legend(row[-1])
    return figure


def phase_diagram(
    x: ArrayLike,
    y: ArrayLike,
    values: ArrayLike,
    title: str,
    xlabel: str,
    ylabel: str,
    quantity: str,
    theory: tuple[ArrayLike, ArrayLike] | None = None,
    logarithmic: tuple[bool, bool] = (False, False),
) -> Figure:
    """A heatmap of values, ``[h, w]``, over x, ``[w]``, and y, ``[h]``, either of which may be logarithmic.

    The scale is symmetric about zero; the zero contour is black. NaN is left white. ``theory`` is the quantity, ``[h, w]``, by
    closed forms at the minimum that each point's SAE is in (NaN where none is known), drawn as green contours, and whether a
    deeper minimum exists.
    """
    x, y, shown = (np.asarray(part, dtype=float) for part in (x, y, values))
    size = np.nanmax(np.abs(shown)) if np.isfinite(shown).any() else 1.0
    figure, (axes,) = style.new_figure(6.4, 5.2, title)
    scale = Normalize(-(size or 1.0), size or 1.0)
    mesh = axes.pcolormesh(x, y, shown, cmap=style.DIVERGING, norm=scale, shading="nearest", rasterized=True)
    style.tidy(axes, "", xlabel, ylabel, grid=False)
    entries: list[Artist] = []
    if np.nanmin(shown) < -0.01 * size and np.nanmax(shown) > 0.01 * size:
        axes.contour(x, y, shown, levels=[0], colors=style.INK, linewidths=1.4)
        entries.append(Line2D([], [], color=style.INK, linewidth=1.4, label="zero, trained SAEs"))
    closed, shallower = (np.asarray(part, dtype=float) for part in theory or (np.nan, 0))
    if np.isfinite(closed).any():
        levels = MaxNLocator(8, symmetric=True).tick_values(-size, size)
        lines = axes.contour(x, y, closed, levels=levels, colors=_CLOSED_FORM, linewidths=0.9, linestyles="dashed")
        axes.clabel(lines, fontsize=7, fmt="%.2g")
        entries.append(Line2D([], [], color=_CLOSED_FORM, linewidth=0.9, linestyle="dashed", label="closed form"))
        if shallower.any():
            with rc_context({"hatch.linewidth": 0.4, "hatch.color": style.MUTED}):
                axes.contourf(x, y, shallower, levels=[0.5, 1.5], colors="none", hatches=["////"])
            entries.append(Patch(facecolor="none", edgecolor=style.MUTED, hatch="////", label="in a shallower minimum"))
    axes.set(xscale="log" if logarithmic[0] else "linear", yscale="log" if logarithmic[1] else "linear")
    if entries:
        style.legend_below(figure, entries)
    style.color_bar(figure, mesh, quantity, aspect=30)
    return figure


def balance_figure(
    betas: ArrayLike,
    curves: Mapping[str, ArrayLike],
    points: Mapping[str, tuple[float, float]],
    components: Mapping[str, ArrayLike],
    children: Sequence[str],
    title: str,
) -> Figure:
    """How clean a hierarchy's parent is under each weighting of a matryoshka SAE's levels.

    Left: the parent's encoder error over β, ``[b]`` by name, and single SAEs as points (weight of the innermost level,
    error). Right: the parent's encoder cosine with each child by method, ``[children]`` each.
    """
    x = np.asarray(betas, dtype=float)
    figure, (left, right) = style.new_figure(10.4, 4.4, title, columns=2, width_ratios=(1, 1.25))
    lowest = min(error for _, error in points.values())
    for i, (name, values) in enumerate(curves.items()):
        errors = np.asarray(values, dtype=float)
        best = int(np.nanargmin(errors))
        lowest = min(lowest, errors[best])
        left.plot(x, errors, color=style.color_of(i), linewidth=1.8, label=name)
        text = f"{errors[best]:.3f} at β = {x[best]:.2g}"
        style.note(left, text, (x[best], errors[best]), (0, -13), color=style.color_of(i))
    for i, ((name, place), marker) in enumerate(zip(points.items(), "o*Dsv^", strict=False)):
        left.plot(*place, marker, color=style.color_of(2 + i), markersize=8, label=name)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_ylim(bottom=0.6 * lowest)
    heading = "Distance of the parent's encoder from its feature"
    style.tidy(left, heading, "weight of the innermost level (β)", "encoder error")
    style.legend(left, loc="lower left")
    heights = np.asarray(list(components.values()), dtype=float).T
    methods = ["\n".join(wrap(name, 11)) for name in components]
    style.grouped_bars(right, methods, dict(zip(children, heights, strict=True)))
    right.axhline(0, color=style.MUTED, linewidth=0.8)
    style.tidy(right, "Its part along each child: above zero hedging, below absorption", "", "encoder cosine")
    right.tick_params(axis="x", length=0, labelcolor=style.INK, labelsize=7.5)
    style.legend(right)
    return figure
