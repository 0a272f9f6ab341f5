"""What moved while SAEs were trained, and how often their latents fire in the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from hedgelab.plots.style import DASHED, FAINT, INK, MUTED, PALETTE, color_of, histogram, legend, new_figure, note, tidy

_MOST_LATENT_PANELS = 4
_MOST_COLUMNS = 3
Curve = tuple[Sequence[int], Sequence[float]]
"""Steps and values."""


def loss_terms(terms: Mapping[str, Curve]) -> Figure:
    """Each loss term over training, by name; ``loss`` is drawn as the total."""
    figure = new_figure(7.2, 3.8, "Loss terms during training")
    axes = figure.subplots()
    number = 0
    for name, (steps, values) in terms.items():
        if name == "loss":  # a broad band behind, or it would hide the term that dominates it
            axes.plot(steps, values, color=FAINT, linewidth=5, solid_capstyle="round", label="loss (sum)", zorder=1)
        else:
            axes.plot(steps, values, color=color_of(number), linewidth=1.3, label=name, zorder=2)
            number += 1
    _logarithmic_where_it_helps(axes, terms.values())
    tidy(axes, "", "training step", "loss (mean over a logging interval)")
    legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def overlaid_curves(curves: Mapping[str, Mapping[str, Curve]], titles: Mapping[str, str], heading: str) -> Figure:
    """A panel for each metric, titled by ``titles``, with a line for each run, by its label."""
    runs = list(dict.fromkeys(label for lines in curves.values() for label in lines))
    named = 1 < len(runs) <= len(PALETTE)
    columns = min(_MOST_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    legend_columns = 2 * columns if columns > 1 else 1
    legend_rows = -(-len(runs) // legend_columns) if named else 0
    figure = new_figure(max(4.6, 3.4 * columns + 0.4), 2.5 * rows + 0.6 + 0.22 * legend_rows, heading)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    for axes, (metric, lines) in zip(grid.flat, curves.items(), strict=False):
        for label, (steps, values) in lines.items():
            color = PALETTE[runs.index(label)] if len(runs) <= len(PALETTE) else FAINT
            axes.plot(steps, values, color=color, linewidth=1.4, label=label)
        _logarithmic_where_it_helps(axes, lines.values())
        tidy(axes, titles.get(metric, metric), "step")
    if named:
        lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
        legend(figure, handles=lines.values(), loc="outside lower center", ncols=legend_columns)
    return figure


def cosines_over_training(steps: Sequence[int], decoder: ArrayLike, encoder: ArrayLike) -> Figure:
    """How the cosines with the true features moved, ``[t, d_sae, n]`` each; decoder above, encoder below.

    Up to four latents have a panel each, with a colour for each feature (or for the most moving ones). More
    latents share a panel, in which each latent's final best feature is coloured and all else is grey.
    """
    rows = {"decoder": np.asarray(decoder, dtype=float), "encoder": np.asarray(encoder, dtype=float)}
    d_sae = rows["decoder"].shape[1]
    apart = d_sae <= _MOST_LATENT_PANELS
    panels = d_sae if apart else 1
    figure = new_figure(max(6.4, 2.9 * panels + 1.6), 5.2, "How the latents turned during training")
    grid = figure.subplots(2, panels, sharex=True, sharey=True, squeeze=False)
    for row, (name, cosines) in zip(grid, rows.items(), strict=True):
        for latent, axes in enumerate(row):
            if apart:
                _one_latent(axes, steps, cosines[:, latent])
                title = f"{name}, latent {latent}"
            else:
                _many_latents(axes, steps, cosines)
                title = f"{name}, all {d_sae} latents: final best feature in colour, the others grey"
            xlabel = "training step" if name == "encoder" else ""
            tidy(axes, title, xlabel, "" if latent else "cosine with feature")
            axes.axhline(0, color=MUTED, linewidth=0.8)
            axes.set_ylim(-1.05, 1.05)
    if apart:
        handles, labels = grid[0][-1].get_legend_handles_labels()
        legend(figure, handles=handles, labels=labels, loc="outside right center")
    return figure


def firing_density(rates: ArrayLike) -> Figure:
    """Histogram of the latents' firing rates, ``[d_sae]``, on a logarithmic axis; the dead are counted in words."""
    values = np.asarray(rates, dtype=float)
    live = values[values > 0]
    figure = new_figure(6.4, 3.6, "How often latents fire")
    axes = figure.subplots()
    if live.size:
        log_rates = np.log10(live)
        low = min(np.floor(log_rates.min() * 2) / 2, -1.0)
        histogram(axes, log_rates, np.arange(low, 0.126, 0.125).tolist())
        median = np.median(log_rates)
        axes.axvline(median, color=INK, linewidth=1.0, linestyle=DASHED)
        text = f"median {10**median:.2g}"
        note(axes, text, (median, 1.0), (4, -4), xycoords=("data", "axes fraction"), ha="left", va="top")
        ticks = np.arange(np.ceil(low), 1)
        axes.set_xticks(ticks, [f"$10^{{{int(tick)}}}$" if tick else "1" for tick in ticks])
        axes.set_xlim(low, 0.06)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no latent fires", transform=axes.transAxes, ha="center", color=MUTED)
    dead = values.size - live.size
    tidy(axes, f"{values.size} latents, of which {dead} never fired", "share of examples it fires on", "latents")
    return figure


def _logarithmic_where_it_helps(axes: Axes, curves: Iterable[Curve]) -> None:
    """A logarithmic scale where all values are positive and span more than a decade."""
    values = np.concatenate([np.asarray(values, dtype=float) for _, values in curves])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")


def _one_latent(axes: Axes, steps: Sequence[int], cosines: NDArray[np.float64]) -> None:
    shown = sorted(np.argsort(-np.abs(cosines).max(axis=0), kind="stable")[: len(PALETTE)])
    for j in range(cosines.shape[1]):
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
        axes.plot(steps, cosines[:, latent, feature], color=color_of(latent), linewidth=1.2, zorder=2)
