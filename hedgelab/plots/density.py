"""How often latents fire."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from hedgelab.plots.style import INK, MUTED, PALETTE, new_figure, tidy


def firing_density(rates: ArrayLike) -> Figure:
    """Histogram of the latents' firing rates on a logarithmic axis; the dead are counted in words.

    Args:
        rates: Share of examples on which each latent fires, ``[d_sae]``.
    """
    values = np.asarray(rates, dtype=float)
    live = values[values > 0]
    figure = new_figure(6.4, 3.6, "How often latents fire")
    axes = figure.subplots()
    if live.size:
        log_rates = np.log10(live)
        low = min(np.floor(log_rates.min() * 2) / 2, -1.0)
        axes.hist(
            log_rates, bins=np.arange(low, 0.126, 0.125).tolist(), color=PALETTE[0], edgecolor="white", linewidth=0.4
        )
        median = np.median(log_rates)
        axes.axvline(median, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.annotate(
            f"median {10**median:.2g}", (median, 1.0), (4, -4), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", fontsize=8, color=INK,
        )  # fmt: skip
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
