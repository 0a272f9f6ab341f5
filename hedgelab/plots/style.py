"""The one look of all figures: quiet axes, one palette, readable at the size in which MLflow shows an artifact."""

from __future__ import annotations

import re

from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

INK, MUTED, FAINT = "#22272e", "#6b7480", "#d9dde2"
PALETTE = ("#2f6db5", "#d1632a", "#3f9160", "#8a5fb0", "#c2425f", "#8f7a2e", "#3a9aa8", "#6f6f6f")
DIVERGING = "RdBu_r"
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


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure of a size in inches, with its title set."""
    figure = _Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    return figure


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
