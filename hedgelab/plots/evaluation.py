"""What evaluations show of one SAE."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from hedgelab.plots import style


def probing_by_class(classes: Sequence[str], ks: Sequence[int], f1: ArrayLike) -> Figure:
    """F1 of probes on k latents for each class, ``[classes, len(ks)]``."""
    figure, (axes,) = style.new_figure(max(5.0, 1.0 + 0.9 * len(classes)), 3.4, "k-sparse probing")
    columns = np.asarray(f1, dtype=float).T
    style.grouped_bars(axes, classes, {f"k = {k}": values for k, values in zip(ks, columns, strict=True)})
    axes.set_ylim(0, 1)
    style.legend(axes, ncols=len(ks), loc="upper left", bbox_to_anchor=(0, 1.13))
    style.tidy(axes, "", "", "F1 on the test split")
    return figure


def absorption_by_letter(letters: Sequence[str], full: ArrayLike, fraction: ArrayLike) -> Figure:
    """Share of words fully absorbed and mean absorption fraction for each first letter; NaN where the probe knows nothing."""
    figure, (axes,) = style.new_figure(8.4, 3.2, "First-letter absorption")
    values = np.asarray([full, fraction], dtype=float)
    shown = np.nan_to_num(values)
    style.grouped_bars(axes, letters, {"fully absorbed": shown[0], "absorption fraction": shown[1]})
    for place in np.flatnonzero(np.isnan(values[0])).tolist():
        style.note(axes, "–", (place, 0), (0, 2), color=style.MUTED)
    axes.set_ylim(0, max(0.1, float(shown.max()) * 1.15))
    style.legend(axes)
    style.tidy(axes, "", "first letter  (–: the dense probe does not know it)", "share of words")
    return figure


def losses_spliced(losses: Mapping[str, float]) -> Figure:
    """Losses of the language model with something in place of its activations.

    The keys are the fields of :class:`~hedgelab.metrics.functional.loss_recovered.RecoveredLoss`.
    """
    figure, grid = style.new_figure(8.4, 3.2, "The language model with …", columns=2)
    names = {"": "its own\nactivations", "_sae": "the SAE's\nreconstruction", "_mean": "their\nmean", "_zero": "zeros"}
    panels = {"cross-entropy": ("cross_entropy", "recovered"), "KL from the untouched model": ("kl", "kl_recovered")}
    for axes, (label, (measure, recovered)) in zip(grid, panels.items(), strict=True):
        values = [losses.get(f"{measure}{key}", 0.0) for key in names]  # the KL of the untouched model is zero
        axes.bar(range(4), values, 0.62, color=[style.FAINT, style.PALETTE[0], style.FAINT, style.FAINT], zorder=2)
        for place, value in enumerate(values):
            style.note(axes, f"{value:.2f}", (place, value), (0, 3))
        axes.set_xticks(range(4), names.values())
        axes.margins(y=0.14)
        style.tidy(axes, f"recovered of what zeros lose: {losses[recovered]:.1%}", "", f"{label}, nats a token")
    return figure


def cosine_distribution(counts: ArrayLike, largest: ArrayLike, threshold: float) -> Figure:
    """Cosines between decoder rows: of all pairs, counted in equal bins from -1 to 1, and of each latent with its nearest.

    From ``threshold`` on, two latents count as near-duplicates.
    """
    pairs, nearest = np.asarray(counts, dtype=float), np.asarray(largest, dtype=float)
    figure, (left, right) = style.new_figure(8.4, 3.2, "Decoder rows to one another", columns=2)
    edges = np.linspace(-1, 1, len(pairs) + 1)
    left.stairs(np.maximum(pairs, 0.5), edges, fill=True, baseline=0.5, color=style.PALETTE[0])
    left.set_yscale("log")
    style.tidy(left, "all pairs of live latents", "cosine", "pairs")
    style.histogram(right, nearest, np.linspace(-0.2, 1, 61).tolist())
    right.axvline(threshold, color=style.INK, linewidth=1.0, linestyle=style.DASHED)
    heading = f"{int((nearest >= threshold).sum())} of {nearest.size} above {threshold:g}"
    style.tidy(right, heading, "largest cosine with another latent", "latents")
    return figure
