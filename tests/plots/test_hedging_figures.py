"""Figures of the hedging degree: bars of what is known, dots for seeds, lines for baselines."""

import numpy as np
import pytest

from hedgelab.plots import degree_and_baselines, projection_of_latents

ONE = {"degree": 0.1, "live_degree": 0.11, "projection": 0.2, "baseline": 0.1, "baseline_std": 0.01}
TWO = {name: 2 * value for name, value in ONE.items()} | {"foreign_baseline": 0.3, "foreign_degree": 0.05}


def heights(axes):
    return [patch.get_height() for patch in axes.patches]


def test_bars_are_what_is_known_and_means_over_seeds():
    left, right = degree_and_baselines([ONE]).axes
    assert heights(left) == pytest.approx([0.2, 0.1])
    assert heights(right) == pytest.approx([0.1, 0.11])
    assert not right.collections
    left, right = degree_and_baselines([ONE | {"foreign_baseline": 0.1, "foreign_degree": 0.15}, TWO]).axes
    assert heights(left) == pytest.approx([0.3, 0.15, 0.2])
    assert heights(right) == pytest.approx([0.15, 0.165, 0.1])
    assert len(right.collections) == 3


@pytest.mark.parametrize("width", [1, 24, 5000])
def test_latents_are_sorted_and_counted(width):
    values = np.random.default_rng(0).uniform(0, 0.4, width)
    left, right = projection_of_latents([values, values], 0.05, 0.01).axes
    curve = left.lines[0].get_ydata()
    assert (np.diff(curve) <= 0).all()
    assert sum(heights(right)) == 2 * width
    assert [line.get_ydata()[0] for line in left.lines[2:]] == [0.05, 0.01]
    assert len(projection_of_latents([values], 0.05).axes[0].lines) == 2
