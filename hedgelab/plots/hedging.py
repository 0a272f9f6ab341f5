"""Hedging: its degree, its truth beside measures, widths and levels, mixing over L0, and what planted features show of it."""

from collections.abc import Mapping, Sequence
from itertools import product, zip_longest
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hedgelab.plots import style
from hedgelab.plots.sweep import sweep_panels

Row = Mapping[str, Any]
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
_BESIDE = {"explained_variance": "explained variance", "nearest_feature": "cosine with the nearest feature"}


def degree_and_baselines(scores: Sequence[Mapping[str, float]]) -> Figure:
    """How far old latents moved within which subspace, and the degree that follows against each baseline.

    ``scores`` are the scalars of each seed, by the names of :class:`~hedgelab.metrics.functional.DegreeScores`; bars are
    means, dots are seeds.
    """
    figure, (left, right) = style.new_figure(11.0, 3.8, "Hedging degree", columns=2, width_ratios=[5, 4])
    _bars(left, _MOTIONS, scores)
    deviations = [values["baseline_std"] for values in scores if "baseline_std" in values]
    if deviations and "baseline" in scores[0]:
        place = [name for name in _MOTIONS if name in scores[0]].index("baseline")
        mean = np.mean([values["baseline"] for values in scores])
        left.errorbar(place, mean, np.mean(deviations), color=style.INK, linewidth=1.2, capsize=3)
    _bars(right, _DEGREES, scores)
    style.tidy(left, "motion of old latents within the span of …", "", "share of a decoder row's norm")
    style.tidy(right, "degree against a baseline that is …", "", "degree")
    return figure


def _bars(axes: Axes, names: Mapping[str, str], scores: Sequence[Mapping[str, float]]) -> None:
    shown = [name for name in names if name in scores[0]]
    for place, name in enumerate(shown):
        values = [own[name] for own in scores if name in own]
        axes.bar(place, np.mean(values), width=0.62, color=style.FAINT if place else style.PALETTE[0], zorder=2)
        if len(values) > 1:
            axes.scatter([place] * len(values), values, s=14, color=style.INK, zorder=3)
        style.note(axes, f"{np.mean(values):.3f}", (place, max(values)), (0, 4))
    axes.set_xticks(range(len(shown)), [names[name] for name in shown])
    axes.margins(y=0.12)


def projection_of_latents(projections: Sequence[Sequence[float]], baseline: float, noise_floor: float | None = None) -> Figure:
    """How much of each old latent moved into the new latents' span, ``‖Δ_i Q Qᵀ‖``, a sequence a seed: sorted, and binned.

    ``baseline`` is the mean within random subspaces, ``noise_floor`` the mean of what reordering the data moves.
    """
    figure, (left, right) = style.new_figure(9.6, 3.6, "Which latents made way for the new ones", columns=2)
    for i, values in enumerate(projections):
        ranked = np.sort(np.asarray(values, dtype=float))[::-1]
        left.plot(np.arange(1, len(ranked) + 1), ranked, color=style.color_of(i), linewidth=1.4)
    everything = np.concatenate([np.asarray(values, dtype=float) for values in projections])
    style.histogram(right, everything, min(60, max(10, everything.size // 8)))
    lines = {"random subspaces": (baseline, style.INK)}
    if noise_floor is not None:
        lines["reordering alone"] = (noise_floor, style.MUTED)
    for label, (value, color) in lines.items():
        left.axhline(value, color=color, linewidth=1.0, linestyle=style.DASHED, label=label)
        right.axvline(value, color=color, linewidth=1.0, linestyle=style.DASHED)
    left.set_xlim(1, max(2, max(len(values) for values in projections)))
    style.legend(left)
    style.tidy(left, "sorted; a curve a seed", "old latent, most moved first", "motion within the new latents' span")
    style.tidy(right, "how they spread", "motion within the new latents' span", "latents")
    return figure


def measures_against_truth(
    measures: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]], ranks: Mapping[str, Mapping[str, float]]
) -> Figure:
    """A scatter of pairs (true hedging, measure) by measure (rows), kind of SAE (columns) and toy (colours).

    Measures named "residual…" are in the units of the truth and get its diagonal; ``ranks`` are Spearman's correlations.
    """
    kinds = list(next(iter(measures.values())))
    size, title = (2.5 * len(kinds) + 0.6, 2.35 * len(measures) + 0.9), "Do measures without ground truth see hedging?"
    figure, grid = style.new_figure(*size, title, len(measures), len(kinds), sharex="col", sharey="row")
    for number, (axes, (measure, kind)) in enumerate(zip(grid, product(measures, kinds), strict=True)):
        for i, (toy, pairs) in enumerate(measures[measure][kind].items()):
            true, value = np.array(pairs, dtype=float).reshape(-1, 2).T
            axes.scatter(true, value, s=12, color=style.color_of(i), alpha=0.85, linewidths=0, label=toy, zorder=3)
        if measure.startswith("residual"):
            axes.axline((0, 0), slope=1, color=style.FAINT, linewidth=1)
        axes.axhline(0, color=style.FAINT, linewidth=0.8)
        xlabel = "true hedging" if number >= len(grid) - len(kinds) else ""
        ylabel = measure if number % len(kinds) == 0 else ""
        style.tidy(axes, f"{kind}: Spearman {ranks[measure][kind]:.3f}", xlabel, ylabel)
    style.legend_below(figure, grid[0].collections)
    return figure


def hedging_over_width(curves: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> Figure:
    """True hedging over the SAE's width: a panel a kind, a curve a toy, a value a seed."""
    panels = {k: {toy: list(by_width.items()) for toy, by_width in by_toy.items()} for k, by_toy in curves.items()}
    return sweep_panels(panels, "width", "Hedging falls as SAEs get wider", (True, False), ylabel="true hedging")


def hedging_of_levels(levels: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """True hedging of matryoshka levels' own latents, innermost first: a panel a toy, a group of bars a width."""
    width = 2.2 * len(levels) + 0.4
    figure, grid = style.new_figure(width, 2.9, "Where matryoshka SAEs hedge", columns=len(levels), sharey=True)
    for axes, (toy, by_width) in zip(grid, levels.items(), strict=True):
        by_level = enumerate(zip_longest(*by_width.values(), fillvalue=np.nan), start=1)
        style.grouped_bars(axes, [str(width) for width in by_width], {f"level {i}": values for i, values in by_level})
        style.tidy(axes, toy, "width", "true hedging" if axes is grid[0] else "")
    style.legend_below(figure, grid[0].containers)
    return figure


def measures_over_l0(
    rows: Sequence[Row], measures: Mapping[str, str], found: Mapping[str, float], right: float | None
) -> Figure:
    """A panel a measure, a point an SAE, the line their mean; what is measured beside them in the last panel."""
    figure, grid = style.new_figure(4.0 * (len(measures) + 1), 3.5, "Where do latents mix least?", 1, len(measures) + 1)
    wanted = sorted({row["wanted_l0"] for row in rows})
    handles: list[Any] = []

    def curve(axes: Any, key: str, color: str, label: str) -> Any:
        means = [np.mean([(row["l0"], row[key]) for row in rows if row["wanted_l0"] == one], axis=0) for one in wanted]
        axes.scatter([row["l0"] for row in rows], [row[key] for row in rows], s=8, alpha=0.5, linewidths=0, color=color)
        return axes.plot(*np.transpose(means), color=color, linewidth=1.4, label=label)[0]

    for number, (axes, (key, title)) in enumerate(zip(grid, measures.items(), strict=False)):
        curve(axes, key, style.color_of(number), title)
        drawn = axes.axvline(found[f"l0/{key}"], color=style.INK, linewidth=1, label="lowest")
        if np.isfinite(found[f"l0/{key}_low"]):  # not of one seed
            axes.axvspan(found[f"l0/{key}_low"], found[f"l0/{key}_high"], color=style.INK, alpha=0.08, linewidth=0)
        handles.append(drawn)
        style.tidy(axes, title, "L0")
    beside = {key: title for key, title in _BESIDE.items() if key in rows[0]}
    for number, (key, title) in enumerate(beside.items(), start=len(measures)):
        handles.append(curve(grid[-1], key, style.color_of(number), title))
    style.tidy(grid[-1], "", "L0")
    label = "right L0 of these features"
    for axes in grid:
        if right is not None:
            handles.append(axes.axvline(right, color=style.MUTED, linewidth=1, linestyle=style.DASHED, label=label))
    style.legend_below(figure, handles)
    return figure


def doses_and_responses(arms: Sequence[Row], doses: Sequence[float]) -> Figure:
    """Share of the child in the parent's row by dose, one panel a kind, one colour a width; crosses are the theory's.

    The last place is that of children that fire only where their parent is silent.
    """
    kinds, widths = (list(dict.fromkeys(row[key] for row in arms)) for key in ("kind", "width"))
    size, title = (1.2 + 3.6 * len(kinds), 3.7), "Planted children in their parents' rows"
    figure, grid = style.new_figure(*size, title, 1, len(kinds), sharey=True)
    places: dict[Any, int] = {dose: place for place, dose in enumerate(doses)}
    handles: list[Any] = []
    for axes, kind in zip(grid, kinds, strict=True):
        for number, width in enumerate(widths):
            own = [row for row in arms if (row["kind"], row["width"]) == (kind, width)]
            shift = 0.14 * (number - (len(widths) - 1) / 2)
            at = np.array([places.get(row["dose"], len(doses)) + shift for row in own])
            mean, low, high = (np.array([row[key] for row in own]) for key in ("share", "share_low", "share_high"))
            look: dict[str, Any] = {"color": style.color_of(number), "label": f"{width} latents", "zorder": 3}
            ends = np.stack([mean - low, high - mean])
            handles.append(axes.errorbar(at, mean, ends, fmt="o", markersize=4, linewidth=1.2, **look))
            predicted = [row["predicted"] for row in own]
            axes.scatter(at, predicted, marker="x", s=22, linewidths=1, color=style.INK, zorder=4)
        axes.axhline(0, color=style.MUTED, linewidth=0.8, linestyle=style.DASHED)
        names = [f"{dose:g}" for dose in doses]
        axes.set_xticks(range(len(doses) + 1), [*names, "only\nwithout"])
        style.tidy(axes, kind, "share of the parent's firings", "share of its row" if axes is grid[0] else "")
    handles.append(grid[0].scatter([], [], marker="x", color=style.INK, label="omitted-variable theory"))
    style.legend_below(figure, handles)
    return figure


def shares_against_theory(pairs: Sequence[Row]) -> Figure:
    """Every pair of every SAE: what its row holds of the child, against what the regression on codes says; a panel a kind."""
    kinds, widths = (list(dict.fromkeys(row[key] for row in pairs)) for key in ("kind", "width"))
    figure, grid = style.new_figure(1.2 + 3.6 * len(kinds), 3.7, "Omitted-variable theory", 1, len(kinds), sharey=True)
    handles: list[Any] = []
    for axes, kind in zip(grid, kinds, strict=True):
        for number, width in enumerate(widths):
            own = [row for row in pairs if (row["kind"], row["width"]) == (kind, width)]
            x, y = ([row[key] for row in own] for key in ("predicted", "share"))
            look: dict[str, Any] = {"color": style.color_of(number), "label": f"{width} latents"}
            handles.append(axes.scatter(x, y, s=5, alpha=0.4, linewidths=0, **look))
        axes.axline((0, 0), slope=1, color=style.MUTED, linewidth=0.8, linestyle=style.DASHED)
        style.tidy(axes, kind, "predicted share", "share of the parent's row" if axes is grid[0] else "")
    style.legend_below(figure, handles)
    return figure
