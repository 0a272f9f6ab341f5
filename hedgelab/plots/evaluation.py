"""What evaluations show of one SAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from hedgelab.plots.style import FAINT, INK, MUTED, PALETTE, new_figure, tidy


def probing_by_class(classes: Sequence[str], ks: Sequence[int], f1: ArrayLike) -> Figure:
    """F1 of k-sparse probes for each class.

    Args:
        classes: Names.
        ks: Numbers of latents.
        f1: ``[classes, len(ks)]``.
    """
    values = np.asarray(f1, dtype=float)
    figure = new_figure(max(5.0, 1.0 + 0.9 * len(classes)), 3.4, "k-sparse probing")
    axes = figure.subplots()
    places, width = np.arange(len(classes)), 0.8 / len(ks)
    for i, k in enumerate(ks):
        axes.bar(
            places + (i - (len(ks) - 1) / 2) * width, values[:, i], width * 0.92, color=PALETTE[i % 8], label=f"k = {k}"
        )
    axes.set_xticks(places, classes)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=len(ks), loc="upper left", bbox_to_anchor=(0, 1.13))
    tidy(axes, "", "", "F1 on the test split")
    return figure


def absorption_by_letter(letters: Sequence[str], full: ArrayLike, fraction: ArrayLike) -> Figure:
    """Absorption for each first letter; letters that the dense probe does not know are marked.

    Args:
        letters: The letters.
        full: Share of words fully absorbed, ``[letters]``; NaN where unknown.
        fraction: Mean absorption fraction, ``[letters]``; NaN where unknown.
    """
    values = [np.asarray(part, dtype=float) for part in (full, fraction)]
    figure = new_figure(8.4, 3.2, "First-letter absorption")
    axes = figure.subplots()
    places = np.arange(len(letters))
    for i, (part, label) in enumerate(zip(values, ("fully absorbed", "absorption fraction"), strict=True)):
        axes.bar(places + (i - 0.5) * 0.4, np.nan_to_num(part), 0.37, color=PALETTE[i], label=label)
    for place in places[np.isnan(values[0])]:
        axes.annotate("–", (place, 0), (0, 2), textcoords="offset points", ha="center", color=MUTED, fontsize=8)
    axes.set_xticks(places, letters)
    axes.set_ylim(0, max(0.1, float(np.nan_to_num(np.stack(values)).max()) * 1.15))
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    tidy(axes, "", "first letter  (–: the dense probe does not know it)", "share of words")
    return figure


def scores_by_count(counts: Sequence[int], lines: Mapping[str, ArrayLike], title: str, ylabel: str) -> Figure:
    """Scores against the number of latents silenced.

    Args:
        counts: Numbers of latents.
        lines: A curve each, ``[len(counts)]``, by label; the first is the one that counts.
        title: Title.
        ylabel: What the scores are.
    """
    figure = new_figure(5.6, 3.4, title)
    axes = figure.subplots()
    for i, (label, values) in enumerate(lines.items()):
        style = {"linewidth": 2.0} if i == 0 else {"linewidth": 1.2, "linestyle": "--"}
        axes.plot(
            counts, np.asarray(values, dtype=float), marker="o", markersize=4, color=PALETTE[i], label=label, **style
        )
    axes.set_xscale("log")
    axes.set_xticks(list(counts), [str(count) for count in counts])
    axes.minorticks_off()
    axes.axhline(0, color=FAINT, linewidth=1.0)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    tidy(axes, "", "latents silenced", ylabel)
    return figure


def losses_spliced(losses: Mapping[str, float]) -> Figure:
    """Losses of the language model with something in place of its activations.

    Args:
        losses: The fields of :class:`~hedgelab.metrics.functional.loss_recovered.RecoveredLoss`.
    """
    figure = new_figure(8.4, 3.2, "The language model with …")
    left, right = figure.subplots(1, 2)
    names = {"": "its own\nactivations", "_sae": "the SAE's\nreconstruction", "_mean": "their\nmean", "_zero": "zeros"}
    cross_entropies = [losses[f"cross_entropy{key}"] for key in names]
    divergences = [0.0 if not key else losses[f"kl{key}"] for key in names]
    shares = (losses["recovered"], losses["kl_recovered"])
    panels = zip(
        (left, right),
        (cross_entropies, divergences),
        ("cross-entropy", "KL from the untouched model"),
        shares,
        strict=True,
    )
    for axes, values, label, share in panels:
        axes.bar(range(4), values, 0.62, color=[FAINT, PALETTE[0], FAINT, FAINT], zorder=2)
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:.2f}", (place, value), (0, 3), textcoords="offset points", ha="center", fontsize=8, color=INK
            )
        axes.set_xticks(range(4), names.values())
        axes.margins(y=0.14)
        tidy(axes, f"recovered of what zeros lose: {share:.1%}", "", f"{label}, nats a token")
    return figure


def cosine_distribution(counts: ArrayLike, largest: ArrayLike, threshold: float) -> Figure:
    """Cosines between decoder rows: of all pairs, and of each latent with its nearest.

    Args:
        counts: Pairs in equal bins of the cosine from -1 to 1.
        largest: Largest cosine of each latent with another.
        threshold: From where two latents count as near-duplicates.
    """
    pairs, nearest = np.asarray(counts, dtype=float), np.asarray(largest, dtype=float)
    figure = new_figure(8.4, 3.2, "Decoder rows to one another")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(-1, 1, len(pairs) + 1)
    left.stairs(np.maximum(pairs, 0.5), edges, fill=True, baseline=0.5, color=PALETTE[0])
    left.set_yscale("log")
    right.hist(nearest, bins=np.linspace(-0.2, 1, 61).tolist(), color=PALETTE[0], edgecolor="white", linewidth=0.4)
    right.axvline(threshold, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    duplicates = int((nearest >= threshold).sum())
    tidy(left, "all pairs of live latents", "cosine", "pairs")
    tidy(right, f"{duplicates} of {nearest.size} above {threshold:g}", "largest cosine with another latent", "latents")
    return figure
