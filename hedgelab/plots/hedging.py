"""The hedging degree, beside what it is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hedgelab.plots.style import FAINT, INK, MUTED, PALETTE, new_figure, tidy

_DEGREES = {
    "degree": "random\n(the degree)",
    "live_degree": "random,\nlive latents",
    "covariance_degree": "drawn with the\ncovariance",
    "foreign_degree": "another seed's\nnew latents",
}
_MOTIONS = {
    "projection": "new latents",
    "noise_floor": "new latents,\nonly reordered",
    "baseline": "random",
    "covariance_baseline": "drawn with the\ncovariance",
    "foreign_baseline": "another seed's\nnew latents",
}


def degree_and_baselines(scores: Sequence[Mapping[str, float]]) -> Figure:
    """How far old latents moved within which subspace, and the degree that follows against each baseline.

    Args:
        scores: The scalars of each seed, by the names of :class:`~hedgelab.metrics.functional.DegreeScores`; bars are means,
            dots are seeds.
    """
    figure = new_figure(11.0, 3.8, "Hedging degree")
    left, right = figure.subplots(1, 2, width_ratios=[5, 4])
    _bars(left, _MOTIONS, scores)
    spread = [values["baseline_std"] for values in scores if "baseline_std" in values]
    if spread and "baseline" in scores[0]:
        place = [name for name in _MOTIONS if name in scores[0]].index("baseline")
        mean = np.mean([values["baseline"] for values in scores])
        left.errorbar(place, mean, np.mean(spread), color=INK, linewidth=1.2, capsize=3)
    _bars(right, _DEGREES, scores)
    tidy(left, "motion of old latents within the span of …", "", "share of a decoder row's norm")
    tidy(right, "degree against a baseline that is …", "", "degree")
    return figure


def projection_of_latents(
    projections: Sequence[Sequence[float]], baseline: float, noise_floor: float | None = None
) -> Figure:
    """How much of each old latent moved into the new latents' span: sorted, and as a histogram.

    Args:
        projections: ``‖Δ_i Q Qᵀ‖`` of every latent, for each seed.
        baseline: Mean within random subspaces.
        noise_floor: Mean of what reordering the data moves; None leaves it out.
    """
    figure = new_figure(9.6, 3.6, "Which latents made way for the new ones")
    left, right = figure.subplots(1, 2)
    for color, values in zip(PALETTE, projections, strict=False):
        ranked = np.sort(np.asarray(values, dtype=float))[::-1]
        left.plot(np.arange(1, len(ranked) + 1), ranked, color=color, linewidth=1.4)
    everything: NDArray[np.float64] = np.concatenate([np.asarray(values, dtype=float) for values in projections])
    right.hist(
        everything, bins=min(60, max(10, everything.size // 8)), color=PALETTE[0], edgecolor="white", linewidth=0.4
    )
    lines = {"random subspaces": (baseline, INK), "reordering alone": (noise_floor, MUTED)}
    for label, (value, color) in lines.items():
        if value is not None:
            left.axhline(value, color=color, linewidth=1.0, linestyle=(0, (4, 3)), label=label)
            right.axvline(value, color=color, linewidth=1.0, linestyle=(0, (4, 3)))
    left.set_xlim(1, max(2, max(len(values) for values in projections)))
    left.legend(frameon=False, fontsize=8, labelcolor=INK)
    tidy(left, "sorted; a curve a seed", "old latent, most moved first", "motion within the new latents' span")
    tidy(right, "how they spread", "motion within the new latents' span", "latents")
    return figure


def _bars(axes: Axes, names: Mapping[str, str], scores: Sequence[Mapping[str, float]]) -> None:
    shown = [name for name in names if name in scores[0]]
    for place, name in enumerate(shown):
        values = [own[name] for own in scores if name in own]
        axes.bar(place, np.mean(values), width=0.62, color=PALETTE[0] if place == 0 else FAINT, zorder=2)
        if len(values) > 1:
            axes.scatter([place] * len(values), values, s=14, color=INK, zorder=3)
        axes.annotate(
            f"{np.mean(values):.3f}", (place, max(values)), (0, 4), textcoords="offset points", ha="center", fontsize=8,
            color=INK,
        )  # fmt: skip
    axes.set_xticks(range(len(shown)), [names[name] for name in shown])
    axes.margins(y=0.12)
