"""The one look of all figures: quiet axes, one palette, readable at the size in which MLflow shows an artifact."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import ArrayLike

INK, MUTED, FAINT = "#22272e", "#6b7480", "#d9dde2"
PALETTE = ("#2f6db5", "#d1632a", "#3f9160", "#8a5fb0", "#c2425f", "#8f7a2e", "#3a9aa8", "#6f6f6f")
DIVERGING = "RdBu_r"
DASHED = (0, (4, 3))
_DPI = 140
_POWER = re.compile(r"\$(\\mathdefault\{)?-?[\d.]*(\\times)?(10\^\{[-\d.]+\})?\}?\$")


class _Figure(Figure):
    """A figure whose texts may be anybody's words: a dollar sign is one, except in the powers along an axis."""

    def draw(self, renderer: RendererBase) -> None:
        """Draw; what looks like a formula and is none would be an error otherwise."""
        for text in self.findobj(Text):
            if "$" in text.get_text() and not _POWER.fullmatch(text.get_text()):
                text.set_parse_math(False)
        super().draw(renderer)


def new_figure(
    width: float, height: float, title: str, rows: int = 1, columns: int = 1, panels: int | None = None, **layout: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of a size in inches with a title, and its axes row by row, of which the first ``panels`` are seen."""
    figure = _Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    grid = list(figure.subplots(rows, columns, squeeze=False, **layout).flat)
    for axes in grid[panels:] if panels is not None else ():
        axes.set_visible(False)
    return figure, grid[:panels]


def color_of(number: int) -> str:
    """A colour of the palette, which begins again after its last."""
    return PALETTE[number % len(PALETTE)]


def tidy(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "", grid: bool = True) -> None:
    """Labels, and the quiet frame of every pair of axes."""
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, color=FAINT, labelcolor=MUTED, length=3)
    axes.tick_params(which="minor", color=FAINT, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    if grid:
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)


def legend(owner: Axes | Figure, **options: Any) -> None:
    """A legend without a frame."""
    owner.legend(**{"frameon": False, "fontsize": 8, "labelcolor": INK, **options})


def legend_below(figure: Figure, handles: Iterable[Any], columns: int = 6) -> None:
    """A legend under the whole figure, in which every label stands once, in as many columns as there is room for."""
    named = {str(handle.get_label()): handle for handle in handles}
    inches = 0.55 + 0.065 * max(map(len, named), default=0)  # the handle, and letters of this size
    columns = min(columns, len(named), int(figure.get_figwidth() / inches))
    legend(figure, handles=list(named.values()), loc="outside lower center", ncols=max(1, columns))


def note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **options: Any) -> None:
    """Small text at a point, moved by an offset in points."""
    axes.annotate(text, at, offset, textcoords="offset points", **{"ha": "center", "fontsize": 8, "color": INK, **options})


def grouped_bars(axes: Axes, names: Sequence[str], groups: Mapping[str, ArrayLike]) -> None:
    """Bars side by side at each name, one of each group."""
    places, width = np.arange(len(names)), 0.8 / len(groups)
    for i, (label, heights) in enumerate(groups.items()):
        shifted = places + (i - (len(groups) - 1) / 2) * width
        axes.bar(shifted, np.asarray(heights, dtype=float), 0.92 * width, color=color_of(i), label=label, zorder=2)
    axes.set_xticks(places, names)


def histogram(axes: Axes, values: ArrayLike, bins: int | Sequence[float]) -> None:
    """How values are distributed."""
    axes.hist(values, bins=bins, color=PALETTE[0], edgecolor="white", linewidth=0.4)


def color_bar(figure: Figure, image: ScalarMappable, label: str, **options: Any) -> None:
    """A scale of colours beside all axes."""
    bar = figure.colorbar(image, ax=list(figure.axes), **options)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, labelcolor=MUTED, length=0)
    bar.set_label(label, fontsize=9, color=INK)
