"""Loss landscapes of a latent between two features."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from hedgelab.plots.style import INK, PALETTE, new_figure, tidy


def loss_landscapes(t: ArrayLike, panels: Mapping[str, Mapping[str, ArrayLike]]) -> Figure:
    """Loss over the mixture of two features, a panel for each pair of probabilities; a dot marks each minimum.

    Args:
        t: Mixture of the second feature, ``[points]``.
        panels: For each panel's title the curves by name, ``[points]`` each.
    """
    mixture = np.asarray(t, dtype=float)
    figure = new_figure(4.0 * len(panels) + 0.6, 3.6, "Expected loss of a tied latent between two features")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        lowest = min(curves, key=lambda name: float(np.min(curves[name])))  # its label goes below, the others' above
        for color, (name, curve) in zip(PALETTE * (1 + len(curves) // len(PALETTE)), curves.items(), strict=False):
            loss = np.asarray(curve, dtype=float)
            best = int(loss.argmin())
            axes.plot(mixture, loss, color=color, linewidth=1.5, label=name)
            axes.plot(mixture[best], loss[best], "o", color=color, markersize=5)
            axes.annotate(
                f"t = {mixture[best]:.2f}", (mixture[best], loss[best]), (0, -14 if name == lowest else 8),
                textcoords="offset points", ha="center", fontsize=8, color=color,
            )  # fmt: skip
        axes.margins(y=0.12)
        tidy(axes, title, "t   (0: feature 0, 1: feature 1)", "loss" if axes is row[0] else "")
    row[-1].legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure
