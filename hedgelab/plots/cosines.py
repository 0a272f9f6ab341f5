"""What latents read and write, against the true features."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from hedgelab.plots.style import DIVERGING, INK, MUTED, PALETTE, color_bar, new_figure, note, tidy

_MOST_NAMED = 32
"""Most rows or columns with a name each and values in the cells."""
_MOST_BLOCKS = 200
"""Most rows or columns drawn: more would be thinner than a pixel, and a diagonal of them would fade away."""


def cosine_heatmaps(decoder: ArrayLike, encoder: ArrayLike) -> Figure:
    """Signed cosines of decoder rows and encoder columns with the true features, ``[d_sae, n]``, on one scale from -1 to 1.

    Small matrices show their values. In large ones the latents are ordered by the feature that their decoder is closest
    to, in both panels, so that recovered features form a diagonal; beyond 200 rows or columns a dot of the picture shows
    the largest cosine (by magnitude) of the block of latents and features that it stands for.
    """
    panels = {"decoder": np.asarray(decoder, dtype=float), "encoder": np.asarray(encoder, dtype=float)}
    rows, columns = panels["decoder"].shape
    label = "latent"
    if rows > _MOST_NAMED:
        strength, label = np.abs(panels["decoder"]), "latent, by nearest feature"
        order = np.lexsort((-strength.max(axis=1), strength.argmax(axis=1)))
        panels = {name: cosines[order] for name, cosines in panels.items()}
    if max(rows, columns) <= _MOST_NAMED:  # square cells
        cell = 0.62 if max(rows, columns) <= 8 else 0.42
        width, height = max(1.4, cell * columns), max(0.7, cell * rows)
    else:
        width, height = 9.0 if columns > 2 * rows else 5.2, float(np.clip(5.2 * rows / columns, 1.6, 5.2))
    stacked = columns > 2 * max(rows, 4)
    size = (width + 1.6, 2 * height + 1.8) if stacked else (2 * width + 2.8, height + 1.2)
    pooled = ", strongest of each block" if max(rows, columns) > _MOST_BLOCKS else ""
    heading = f"Cosine of each latent with the true features{pooled}"
    figure, grid = new_figure(*size, heading, *((2, 1) if stacked else (1, 2)))
    for axes, (name, cosines) in zip(grid, panels.items(), strict=True):
        image = _heatmap(axes, cosines, name, label)
    color_bar(figure, image, "cosine", shrink=0.9, aspect=18, ticks=[-1, -0.5, 0, 0.5, 1])
    return figure


def decoder_bias(projections: ArrayLike, norm: float) -> Figure:
    """How far the decoder bias, of a norm, points along each true feature: ``b_dec · f_j``, ``[n]``, in activation units."""
    values = np.asarray(projections, dtype=float)
    n = len(values)
    named = n <= _MOST_NAMED
    figure, (axes,) = new_figure(min(10.0, max(4.2, 2.2 + 0.42 * n)), 3.2, "Decoder bias along the true features")
    colors = np.where(values >= 0, PALETTE[1], PALETTE[0])
    axes.bar(np.arange(n), values, width=0.62 if named else 1.0, color=colors)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    tidy(axes, f"‖b_dec‖ = {norm:.3g}", "true feature", "b_dec · f  (activation units)")
    axes.set_xlim(-0.6 if named else -0.5, n - 0.4 if named else n - 0.5)
    axes.margins(y=0.18)
    _name(axes.xaxis, n, "f")
    decimals = 2 if np.abs(values).max() >= 0.1 else 3
    for j, value in enumerate(values) if n <= 16 else ():
        above = value >= 0
        note(axes, _number(value, decimals), (j, value), (0, 3 if above else -3), va="bottom" if above else "top")
    return figure


def _heatmap(axes: Axes, cosines: NDArray[np.float64], title: str, row_name: str) -> AxesImage:
    rows, columns = cosines.shape
    small = max(rows, columns) <= _MOST_NAMED
    image = axes.imshow(
        _strongest_of_blocks(cosines), cmap=DIVERGING, vmin=-1, vmax=1, aspect="equal" if small else "auto",
        interpolation="nearest", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
    )  # fmt: skip
    tidy(axes, title, "true feature", row_name, grid=False)
    axes.spines[:].set_visible(False)
    _name(axes.yaxis, rows)
    _name(axes.xaxis, columns, "f")
    if small:
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="both", length=0)
        size = 9.0 if max(rows, columns) <= 8 else 6.5 if max(rows, columns) <= 20 else 5.0
        for (i, j), value in np.ndenumerate(cosines):
            color = "white" if abs(value) > 0.6 else INK
            cell = axes.text(j, i, _number(value), ha="center", va="center", fontsize=size, color=color)
            cell.set_in_layout(False)  # it lies within the axes; measuring hundreds of texts takes a second
    return image


def _name(axis: Axis, count: int, prefix: str = "") -> None:
    if count <= _MOST_NAMED:
        axis.set_ticks(range(count), [f"{prefix}{place}" for place in range(count)])
    else:
        axis.set_major_locator(MaxNLocator(8, integer=True))


def _strongest_of_blocks(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most 200 by 200 blocks of nearly equal size, each with its entry of largest magnitude, signed."""
    for axis in (0, 1):
        size = cosines.shape[axis]
        starts = np.unique(np.linspace(0, size, min(size, _MOST_BLOCKS), endpoint=False).astype(int))
        high, low = (reduce.reduceat(cosines, starts, axis=axis) for reduce in (np.maximum, np.minimum))
        cosines = np.where(high >= -low, high, low)
    return cosines


def _number(value: float, decimals: int = 2) -> str:
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no "-0.00"
