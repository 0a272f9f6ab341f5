"""Curves over training, continued by a power law."""

import numpy as np
import pytest

from hedgelab.plots.sweep import named_panels, power_law, sweep_panels

SAMPLES = [1e6, 2e6, 4e6, 8e6]


@pytest.mark.parametrize(("a", "b", "c"), [(0.9, 0.3, 0.5), (0.75, -0.2, 1.5), (0.97, 0.6, 0.1)])
def test_a_power_law_is_found(a: float, b: float, c: float) -> None:
    law = lambda n: a - b * (np.asarray(n) / 1e6) ** -c  # noqa: E731
    found = power_law(SAMPLES, law(SAMPLES), [2e7, 2e8])
    assert found == pytest.approx(law([2e7, 2e8]), abs=2e-3)


def test_three_points_say_nothing() -> None:
    assert power_law(SAMPLES[:3], [0.1, 0.2, 0.3], [1e9]) is None


def test_a_curve_is_continued_where_its_points_allow_it() -> None:
    long, short = [(n, [1 - (n / 1e6) ** -1.0, 1 - (n / 1e6) ** -1.0]) for n in SAMPLES], [(1e6, [0.5]), (2e6, [0.6])]
    figure = sweep_panels({"f1": {"long": long, "short": short}}, "samples", "", (True, False), until=1e9)
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert len(dashed) == 1
    assert dashed[0].get_xdata()[-1] == pytest.approx(1e9)
    assert dashed[0].get_ydata()[-1] == pytest.approx(0.999, abs=2e-3)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.999"]


def test_names_are_rows_with_their_means_and_spreads() -> None:
    f1, mcc = named_panels({"f1": {"plain": [0.5, 0.7], "levels": [0.8]}, "mcc": {"levels": [0.9]}}, "").axes
    assert [label.get_text() for label in f1.get_yticklabels()] == ["plain", "levels"]
    assert [text.get_text() for text in f1.texts] == ["0.6", "0.8"]
    assert [(text.get_text(), text.xy[1]) for text in mcc.texts] == [("0.9", 1)]
    (bar,) = f1.containers[0].lines[2][0].get_segments()
    assert bar[:, 0] == pytest.approx([0.6 - 0.02**0.5, 0.6 + 0.02**0.5])
