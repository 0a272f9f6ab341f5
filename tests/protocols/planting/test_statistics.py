"""The statistics of a trial against closed forms and enumeration."""

import itertools

import numpy as np
import pytest

from hedgelab.protocols.planting.statistics import auc, equivalence_test, line_through, mean_interval, sign_flip_test


@pytest.mark.parametrize("n", [1, 4, 9])
def test_sign_flips_are_all_of_them(n):
    values = np.random.default_rng(n).normal(0.3, 1, n)
    sums = [abs(sum(s * abs(v) for s, v in zip(signs, values, strict=True))) for signs in itertools.product((-1, 1), repeat=n)]
    exact = np.mean([one >= abs(values.sum()) - 1e-12 for one in sums])
    assert sign_flip_test(values) == pytest.approx(exact, abs=0.01)


def test_sign_flips_of_many_differences_are_nearly_normal():
    from scipy.stats import norm

    values = np.random.default_rng(0).normal(0.1, 1, 400)
    z = values.sum() / np.sqrt(np.square(values).sum())
    assert sign_flip_test(values) == pytest.approx(2 * norm.sf(abs(z)), rel=0.05)
    assert sign_flip_test(values + 5) < 1e-50
    assert sign_flip_test([]) == sign_flip_test([0.0, np.nan]) == 1.0


def test_intervals_cover_what_they_say():
    rng = np.random.default_rng(0)
    found = [mean_interval(rng.normal(2, 1, 12)) for _ in range(2000)]
    assert np.mean([one.low <= 2 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)


def test_a_line_knows_that_rows_of_a_parent_go_together():
    rng = np.random.default_rng(0)
    covered = []
    for trial in range(150):
        parent = np.repeat(np.arange(60), 4)
        x = np.repeat(rng.uniform(0, 1, 60), 4)  # the same of every SAE, and so is the error
        y = 0.1 + 1.5 * x + np.repeat(rng.normal(0, 0.3, 60), 4)
        line = line_through(x, y, parent, seed=trial)
        covered.append(line.slope.low <= 1.5 <= line.slope.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.06)  # rows taken for independent cover about .7
    expected = np.polyfit(x, y, 1)
    assert (line.slope.mean, line.intercept.mean) == pytest.approx(tuple(expected))
    assert line.r == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_equivalence_holds_within_the_margin_alone():
    rng = np.random.default_rng(0)
    assert equivalence_test(rng.normal(0.0, 0.05, 100), 0.03) < 0.01
    assert equivalence_test(rng.normal(0.05, 0.05, 100), 0.03) > 0.9
    assert equivalence_test([], 0.03) == 1.0


def test_auc_counts_pairs():
    one, other = np.round(np.random.default_rng(0).normal(0, 1, (2, 40)) * [[1], [2]], 1)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in one for b in other]
    assert auc(one, other) == pytest.approx(np.mean(pairs))
    assert np.isnan(auc([], [1.0]))
