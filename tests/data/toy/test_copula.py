import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from hedgelab.data.toy import CopulaFiring
from hedgelab.data.toy.copula import _joint_tail, zipf_rates
from hedgelab.errors import UserError
from hedgelab.seeding import generator

COUNT = 200_000


def assert_rates_are_exact(firing: CopulaFiring, samples: torch.Tensor) -> None:
    rates = firing.rates()
    error = (samples.float().mean(0).double() - rates).abs()
    assert bool((error <= 5.5 * (rates * (1 - rates) / len(samples)).sqrt() + 2 / len(samples)).all())


def test_zipf_law():
    rates = zipf_rates(100, 1.5, 0.4, None)
    assert rates[0] == pytest.approx(0.4)
    assert rates[9] == pytest.approx(0.4 * 10**-1.5)
    scaled = zipf_rates(2000, 1.0, 0.3, 25.0)
    assert scaled.sum() == pytest.approx(25.0)
    assert scaled.max() == pytest.approx(0.3)
    below = scaled[scaled < 0.3 - 1e-9]
    assert below[0] / below[-1] == pytest.approx(2000 / (2000 - len(below) + 1))
    assert zipf_rates(10, 0.0, 0.5, 4.999) == pytest.approx(np.full(10, 0.4999))


def test_rates_without_hierarchy():
    firing = CopulaFiring(30, exponent=0.7, mean_l0=4.0, rank=3, strength=0.5)
    samples = firing.sample(COUNT, generator(0))
    assert samples.dtype == torch.bool
    assert_rates_are_exact(firing, samples)
    assert float(firing.rates().sum()) == pytest.approx(4.0)


def test_joint_firing_is_the_bivariate_normal_tail():
    """P(both fire) = P(g0 > 0, g1 > 0) = 1/4 + asin(rho) / (2 pi) at rates of one half (Sheppard 1899)."""
    rho = 0.9 * 0.8
    for sign in (1, -1):
        firing = CopulaFiring(2, exponent=0, loadings=[[0.9], [sign * 0.8]])
        assert float(firing.correlation()[0, 1]) == pytest.approx(sign * rho)
        both = float(firing.sample(COUNT, generator(1)).all(1).float().mean())
        assert both == pytest.approx(0.25 + math.asin(sign * rho) / (2 * math.pi), abs=5 * math.sqrt(0.25 / COUNT))


def test_sign_of_firing_correlation_follows_the_loadings():
    firing = CopulaFiring(12, exponent=0, max_rate=0.2, rank=2, strength=0.6)
    wanted = firing.correlation()
    seen = torch.corrcoef(firing.sample(COUNT, generator(2)).T.double())
    strong = (wanted.abs() > 0.1) & ~torch.eye(12, dtype=torch.bool)
    assert int(strong.sum()) > 20
    assert bool((seen[strong].sign() == wanted[strong].sign()).all())


def test_no_strength_means_no_correlation():
    firing = CopulaFiring(6, exponent=0, max_rate=0.3, strength=0.0)
    seen = torch.corrcoef(firing.sample(COUNT, generator(3)).T.double()).fill_diagonal_(0.0)
    assert float(seen.abs().max()) < 5.5 / math.sqrt(COUNT)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_hierarchy_keeps_rates_and_is_never_violated(strength):
    firing = CopulaFiring(14, exponent=0.5, rank=2, strength=strength, parents=3, children_per_parent=3)
    assert firing.parent_of == [None] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [None] * 2
    samples = firing.sample(COUNT, generator(4))
    assert_rates_are_exact(firing, samples)
    for child, parent in enumerate(firing.parent_of):
        if parent is not None:
            assert not bool((samples[:, child] & ~samples[:, parent]).any())
            assert bool(samples[:, child].any())


def test_a_child_as_frequent_as_its_parent_always_fires_with_it():
    firing = CopulaFiring(2, exponent=0, max_rate=0.5, parents=1, children_per_parent=1, strength=0.5)
    samples = firing.sample(COUNT, generator(5))
    assert torch.equal(samples[:, 0], samples[:, 1])


def test_bivariate_tail_against_scipy():
    h, k, rho = np.meshgrid([-1.0, 0.0, 0.5, 2.5], [-2.0, 0.0, 1.5], [-0.8, 0.0, 0.6])
    expected = [
        multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf([-a, -b])
        for a, b, r in zip(h.ravel(), k.ravel(), rho.ravel(), strict=True)
    ]
    assert _joint_tail(h.ravel(), k.ravel(), rho.ravel()) == pytest.approx(expected, abs=1e-7)


def test_thousands_of_features_are_cheap_to_build_and_the_same_again():
    options = {"mean_l0": 20.0, "parents": 100, "children_per_parent": 15}
    first, second = (CopulaFiring(2000, **options).sample(50, generator(6)) for _ in range(2))
    assert torch.equal(first, second)
    other = CopulaFiring(2000, **options, structure_seed=1).sample(50, generator(6))
    assert not torch.equal(first, other)
    rates = CopulaFiring(2000, **options).rates().tolist()
    assert all(a >= b for a, b in pairwise(rates))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, r"n: expected a whole number of at least 1, got 0"),
        ({"n": True}, r"n: expected a whole number of at least 1, got True"),
        ({"structure_seed": 0.5}, r"structure_seed: expected a whole number"),
        ({"exponent": -1}, r"exponent: must be at least 0"),
        ({"exponent": math.nan}, r"exponent: must be at least 0"),
        ({"exponent": 1000}, r"exponent: 1000 gives feature 9 a rate of zero"),
        ({"max_rate": 1.0}, r"max_rate: must be between 0 and 1"),
        ({"mean_l0": 5.0}, r"mean_l0: must be above 0, below n \* max_rate = 5, got 5\.0"),
        ({"mean_l0": 0.0}, r"mean_l0: must be above 0"),
        ({"rank": True}, r"rank: expected a whole number of at least 1"),
        ({"strength": 1.0}, r"strength: must be at least 0 and below 1"),
        ({"loadings": [[0.5]]}, r"loadings: expected 10 rows .* got 1 of \[1\]"),
        ({"loadings": [[0.5]] * 9 + [[0.1, 0.1]]}, r"loadings: expected 10 rows of equally many .* got 10 of \[1, 2\]"),
        ({"loadings": [[1.0]] * 10}, r"loadings\[0\]: norm must be below 1, got 1"),
        ({"parents": -1}, r"parents: expected a whole number of at least 0"),
        ({"parents": 2}, r"children_per_parent: give both"),
        ({"parents": 5, "children_per_parent": 2}, r"parents: 5 parents with 2 children each are 15 features"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(UserError, match=r"^data\.firing\." + message):
        CopulaFiring(**{"n": 10, **options})
