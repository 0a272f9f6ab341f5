"""What moved while SAEs were trained, and how often their latents fire in the end."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from hedgelab.plots import style
from hedgelab.plots.style import FAINT, PALETTE, color_of, new_figure, tidy

_MOST_LATENT_PANELS = 4
_MOST_COLUMNS = 3
Curve = tuple[Sequence[int], Sequence[float]]
"""Steps and values."""


def loss_terms(terms: Mapping[str, Curve]) -> Figure:
    """Each loss term over training, by name; ``loss`` is drawn as the total, first, so that the others lie above it."""
    total = {"loss (sum)": terms["loss"]} if "loss" in terms else {}
    lines = total | {name: curve for name, curve in terms.items() if name != "loss"}
    return overlaid_curves({"": lines}, {}, "Loss terms during training")


def overlaid_curves(curves: Mapping[str, Mapping[str, Curve]], titles: Mapping[str, str], heading: str) -> Figure:
    """A panel for each metric, titled by ``titles``, with a line for each run, by its label.

    It is logarithmic where all values are positive and span more than a decade.
    """
    runs = list(dict.fromkeys(label for lines in curves.values() for label in lines))
    few = len(runs) <= 2 * len(PALETTE)
    columns = min(_MOST_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    legend_columns = 2 * columns if columns > 1 else 1
    legend_rows = -(-len(runs) // legend_columns) if few else 0
    size = (max(4.6, 3.4 * columns + 0.4), 2.5 * rows + 0.6 + 0.22 * legend_rows)
    figure, grid = new_figure(*size, heading, rows, columns, len(curves))
    for axes, (metric, lines) in zip(grid, curves.items(), strict=True):
        for label, (steps, values) in lines.items():
            color = color_of(runs.index(label)) if few else FAINT
            axes.plot(steps, values, color=color, linewidth=1.4, label=label)
        everything = np.concatenate([np.asarray(values, dtype=float) for _, values in lines.values()])
        known = everything[np.isfinite(everything)]
        if known.size and known.min() > 0 and known.max() > 10 * known.min():
            axes.set_yscale("log")
        tidy(axes, titles.get(metric, metric), "step")
    if few and len(runs) > 1:
        style.legend_below(figure, [line for axes in grid for line in axes.get_lines()], legend_columns)
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
    size, heading = (max(6.4, 2.9 * panels + 1.6), 5.2), "How the latents turned during training"
    figure, grid = new_figure(*size, heading, 2, panels, sharex=True, sharey=True)
    for axes, ((name, cosines), latent) in zip(grid, product(rows.items(), range(panels)), strict=True):
        if apart:
            most = np.argsort(-np.abs(cosines[:, latent]).max(axis=0), kind="stable")[: len(PALETTE)]
            _highlight(axes, steps, cosines[:, latent], sorted(most.tolist()), "f")
            title = f"{name}, latent {latent}"
        else:
            best = np.abs(cosines[-1]).argmax(axis=1) + np.arange(d_sae) * cosines.shape[2]
            _highlight(axes, steps, cosines.reshape(len(cosines), -1), best.tolist(), "")
            title = f"{name}, all {d_sae} latents: final best feature in colour, the others grey"
        xlabel = "training step" if name == "encoder" else ""
        tidy(axes, title, xlabel, "" if latent else "cosine with feature")
        axes.axhline(0, color=style.MUTED, linewidth=0.8)
        axes.set_ylim(-1.05, 1.05)
    if apart:
        handles, labels = grid[panels - 1].get_legend_handles_labels()
        style.legend(figure, handles=handles, labels=labels, loc="outside right center")
    return figure


def firing_density(rates: ArrayLike) -> Figure:
    """Histogram of the latents' firing rates, ``[d_sae]``, on a logarithmic axis; the dead are counted in words."""
    values = np.asarray(rates, dtype=float)
    live = values[values > 0]
    figure, (axes,) = new_figure(6.4, 3.6, "How often latents fire")
    if live.size:
        axes.set_xscale("log")
        lowest = min(np.floor(np.log10(live.min()) * 2) / 2, -1.0)
        style.histogram(axes, live, (10.0 ** np.arange(lowest, 0.126, 0.125)).tolist())
        median = np.median(live)
        axes.axvline(median, color=style.INK, linewidth=1.0, linestyle=style.DASHED)
        place = {"xycoords": ("data", "axes fraction"), "ha": "left", "va": "top"}
        style.note(axes, f"median {median:.2g}", (float(median), 1.0), (4, -4), **place)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no latent fires", transform=axes.transAxes, ha="center", color=style.MUTED)
    title = f"{values.size} latents, of which {values.size - live.size} never fired"
    tidy(axes, title, "share of examples it fires on", "latents")
    return figure


def _highlight(axes: Axes, steps: Sequence[int], curves: NDArray[np.float64], shown: Sequence[int], name: str) -> None:
    """Curves, ``[t, number]``: those shown in colours of their own, named if there is a name for them, the others grey."""
    others = np.delete(curves, shown, axis=1)
    lines = [np.column_stack([steps, curve]) for curve in others.T]
    axes.add_collection(LineCollection(lines, colors=FAINT, linewidths=0.5, zorder=1))
    for number, place in enumerate(shown):
        label = f"{name}{place}" if name else None
        axes.plot(steps, curves[:, place], color=color_of(number), linewidth=1.3, label=label, zorder=2)
