import numpy as np
import pytest

from hedgelab.plots.theory import balance_figure, phase_diagram


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_phase_diagram_shows_the_zero_line_and_marks_shallower_minima():
    x, y = np.linspace(0, 1, 12), np.linspace(0, 1, 10)
    values = y[:, None] - x
    deep = phase_diagram(x, y, values, "t", "x", "y", "q", (values, np.zeros_like(values, dtype=bool)))
    assert legend_of(deep) == ["zero, trained SAEs", "closed form"]
    shallow = phase_diagram(x, y, values, "t", "x", "y", "q", (values, values < 0))
    assert legend_of(shallow) == ["zero, trained SAEs", "closed form", "in a shallower minimum"]
    assert legend_of(phase_diagram(x, y, np.abs(values) + 1, "t", "x", "y", "q")) == []
    nowhere = (np.full_like(values, np.nan), np.zeros_like(values, dtype=bool))
    assert legend_of(phase_diagram(x, y, values, "t", "x", "y", "q", nowhere)) == ["zero, trained SAEs"]


def test_balance_figure_has_curves_points_and_a_bar_for_each_child():
    betas = np.geomspace(0.01, 1, 9)
    curves = {"β": np.abs(np.log10(betas) + 1) + 0.05, "β, credit": np.full(9, 0.01)}
    methods = {"best β": [-0.1, 0.2], "credit, β = 1": [0.0, 0.01], "adaptive": [0.1, 0.1]}
    figure = balance_figure(betas, curves, {"adaptive": (0.1, 0.06)}, methods, ["a", "b"], "t")
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["β", "β, credit", "adaptive"]
    assert left.texts[0].get_text() == "0.050 at β = 0.1"
    assert [bar.get_height() for bar in right.patches] == pytest.approx([-0.1, 0.0, 0.1, 0.2, 0.01, 0.1])
    assert left.get_ylim()[0] < 0.01
