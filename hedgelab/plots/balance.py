"""How clean a hierarchy's parent is under each weighting of a matryoshka SAE's levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from hedgelab.plots.style import INK, MUTED, PALETTE, new_figure, tidy


def balance_figure(
    betas: ArrayLike,
    curves: Mapping[str, ArrayLike],
    points: Mapping[str, tuple[float, float]],
    components: Mapping[str, ArrayLike],
    children: Sequence[str],
    title: str,
) -> Figure:
    """Left: the parent's encoder error over β, log-log. Right: its encoder's part along each child, by method.

    Args:
        betas: Values of β, ``[b]``.
        curves: Encoder error over them by name, ``[b]`` each.
        points: Single SAEs by name: weight of the innermost level, and encoder error.
        components: The parent's encoder cosine with each child by method, ``[children]`` each.
        children: Names of the children.
        title: Head of the figure.
    """
    x = np.asarray(betas, dtype=float)
    figure = new_figure(10.4, 4.4, title)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    for (name, values), colour in zip(curves.items(), PALETTE, strict=False):
        errors = np.asarray(values, dtype=float)
        left.plot(x, errors, color=colour, linewidth=1.8, label=name)
        best = int(np.nanargmin(errors))
        left.annotate(
            f"{errors[best]:.3f} at β = {x[best]:.2g}", (x[best], errors[best]),
            xytext=(0, -13), textcoords="offset points", ha="center", fontsize=8, color=colour,
        )  # fmt: skip
    for (name, (weight, error)), marker in zip(points.items(), "o*Dsv^", strict=False):
        colour = PALETTE[(2 + list(points).index(name)) % len(PALETTE)]
        left.plot([weight], [error], marker, color=colour, markersize=8, linestyle="none", label=name)
    left.set_xscale("log")
    left.set_yscale("log")
    low = min(float(np.nanmin(np.asarray(values, dtype=float))) for values in curves.values())
    left.set_ylim(bottom=0.6 * min([low, *(error for _, error in points.values())]))
    tidy(
        left, "Distance of the parent's encoder from its feature", "weight of the innermost level (β)", "encoder error"
    )
    left.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower left")
    width = 0.8 / len(children)
    places = np.arange(len(components))
    for j, child in enumerate(children):
        heights = [float(np.asarray(values, dtype=float)[j]) for values in components.values()]
        right.bar(places + (j - (len(children) - 1) / 2) * width, heights, width, color=PALETTE[j], label=child)
    right.axhline(0, color=MUTED, linewidth=0.8)
    right.set_xticks(places, ["\n".join(wrap(name, 11)) for name in components])
    tidy(right, "Its part along each child: above zero hedging, below absorption", "", "encoder cosine")
    right.tick_params(axis="x", length=0, labelcolor=INK, labelsize=7.5)
    right.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure
