"""What moved while the SAE was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from hedgelab.plots.style import FAINT, INK, MUTED, PALETTE, new_figure, tidy

_MOST_PANELS = 4
_MOST_COLORED = len(PALETTE)


def loss_terms(terms: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Figure:
    """Each loss term over training, on a logarithmic scale where all are positive and span more than a decade.

    Args:
        terms: Steps and values of each term, by name; ``loss`` is drawn as the total.
    """
    figure = new_figure(7.2, 3.8, "Loss terms during training")
    axes = figure.subplots()
    colors = iter(PALETTE * (len(terms) // len(PALETTE) + 1))
    for name, (steps, values) in terms.items():
        if name == "loss":  # a broad band behind, or it would hide the term that dominates it
            axes.plot(steps, values, color=FAINT, linewidth=5, solid_capstyle="round", label="loss (sum)", zorder=1)
        else:
            axes.plot(steps, values, color=next(colors), linewidth=1.3, label=name, zorder=2)
    everything = np.concatenate([np.asarray(values, dtype=float) for _, values in terms.values()])
    everything = everything[np.isfinite(everything)]
    if everything.size and everything.min() > 0 and everything.max() > 10 * everything.min():
        axes.set_yscale("log")
    tidy(axes, "", "training step", "loss (mean over a logging interval)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, labelcolor=INK)
    return figure


def cosines_over_training(steps: Sequence[int], decoder: ArrayLike, encoder: ArrayLike) -> Figure:
    """How the cosines with the true features moved; decoder above, encoder below.

    Up to four latents have a panel each, with a colour for each feature (or for the most moving ones). More
    latents share a panel, in which each latent's final best feature is coloured and all else is grey.

    Args:
        steps: Training steps, ``[t]``.
        decoder: Cosines of the decoder at these steps, ``[t, d_sae, n]``.
        encoder: The same of the encoder.
    """
    rows = {"decoder": np.asarray(decoder, dtype=float), "encoder": np.asarray(encoder, dtype=float)}
    d_sae = rows["decoder"].shape[1]
    panels = d_sae if d_sae <= _MOST_PANELS else 1
    figure = new_figure(max(6.4, 2.9 * panels + 1.6), 5.2, "How the latents turned during training")
    grid = figure.subplots(2, panels, sharex=True, sharey=True, squeeze=False)
    for row, (name, cosines) in zip(grid, rows.items(), strict=True):
        for latent, axes in enumerate(row):
            if panels == d_sae:
                _one_latent(axes, steps, cosines[:, latent])
                title = f"{name}, latent {latent}"
            else:
                _many_latents(axes, steps, cosines)
                title = f"{name}, all {d_sae} latents: final best feature in colour, the others grey"
            tidy(axes, title)
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.set_ylim(-1.05, 1.05)
        row[0].set_ylabel("cosine with feature", fontsize=9, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("training step", fontsize=9, color=INK)
    if panels == d_sae:
        handles, labels = grid[0][-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _one_latent(axes: Axes, steps: Sequence[int], cosines: NDArray[np.float64]) -> None:
    n = cosines.shape[1]
    shown = sorted(np.argsort(-np.abs(cosines).max(axis=0))[:_MOST_COLORED]) if n > _MOST_COLORED else range(n)
    for j in range(n):
        if j not in shown:
            axes.plot(steps, cosines[:, j], color=FAINT, linewidth=0.7, zorder=1)
    for color, j in zip(PALETTE, shown, strict=False):
        axes.plot(steps, cosines[:, j], color=color, linewidth=1.5, label=f"f{j}", zorder=2)


def _many_latents(axes: Axes, steps: Sequence[int], cosines: NDArray[np.float64]) -> None:
    best = np.abs(cosines[-1]).argmax(axis=1)
    others = np.ones(cosines.shape[1:], dtype=bool)
    others[np.arange(len(best)), best] = False
    curves = [np.column_stack([steps, curve]) for curve in cosines[:, others].T]
    axes.add_collection(LineCollection(curves, colors=FAINT, linewidths=0.5, zorder=1))
    for latent, feature in enumerate(best):
        color = PALETTE[latent % len(PALETTE)]
        axes.plot(steps, cosines[:, latent, feature], color=color, linewidth=1.2, zorder=2)
