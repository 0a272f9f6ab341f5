import math

import pytest
import torch

from hedgelab.data.toy import correlated_features, make_dictionary, orthonormal_features
from hedgelab.errors import UserError
from hedgelab.seeding import generator


def off_diagonal(directions: torch.Tensor) -> torch.Tensor:
    gram = directions @ directions.T
    return gram[~torch.eye(len(gram), dtype=torch.bool)]


@pytest.mark.parametrize("n", [1, 2, 50])
def test_orthonormal_to_machine_precision(n):
    directions = orthonormal_features(n, 50, generator(0))
    assert torch.allclose(directions @ directions.T, torch.eye(n, dtype=torch.float64), atol=1e-14)


def test_orientation_is_uniform():
    first = torch.stack([orthonormal_features(2, 3, generator(seed))[0] for seed in range(300)])
    assert first.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / 300)
    assert torch.allclose(first.T @ first / 300, torch.eye(3, dtype=torch.float64) / 3, atol=0.1)


@pytest.mark.parametrize(("n", "target"), [(2, 0.3), (20, 0.9), (20, 0.05), (3, -0.5), (20, -0.05), (1, 0.4)])
def test_cosines_are_exact_when_the_features_fit(n, target):
    directions = correlated_features(n, 20, target, generator(1))
    assert torch.allclose(directions.norm(dim=1), torch.ones(n, dtype=torch.float64))
    assert torch.allclose(off_diagonal(directions), torch.full((n * (n - 1),), target, dtype=torch.float64))


@pytest.mark.parametrize(("n", "d_in"), [(21, 20), (60, 20), (200, 64)])
def test_overcomplete_dictionaries_reach_the_welch_bound(n, d_in):
    cosines = off_diagonal(make_dictionary(n, d_in, 0.0, generator(2)))
    assert float(cosines.square().mean().sqrt()) == pytest.approx(math.sqrt((n / d_in - 1) / (n - 1)), rel=1e-4)


def test_overcomplete_dictionaries_reach_their_target_cosine():
    n, d_in, target = 100, 33, 0.3
    directions = correlated_features(n, d_in, target, generator(3))
    assert torch.allclose(directions.norm(dim=1), torch.ones(n, dtype=torch.float64))
    welch = math.sqrt((n / (d_in - 1) - 1) / (n - 1))
    spread = (off_diagonal(directions) - target).square().mean().sqrt()
    assert float(spread) == pytest.approx((1 - target) * welch, rel=1e-4)


@pytest.mark.parametrize(("n", "d_in", "target"), [(3, 5, -0.6), (3, 5, 1.0), (6, 5, -0.01), (3, 5, math.nan)])
def test_impossible_targets_are_refused(n, d_in, target):
    with pytest.raises(UserError, match=r"data\.target_cosine: must be at least"):
        make_dictionary(n, d_in, target, generator(0))


def test_impossible_dimensions_are_refused():
    with pytest.raises(UserError, match=r"data\.d_in: 3 orthonormal features need d_in of at least 3, got 2"):
        orthonormal_features(3, 2, generator(0))
    with pytest.raises(UserError, match=r"data\.d_in: a target cosine of 0.5 needs at least 2 dimensions"):
        make_dictionary(3, 1, 0.5, generator(0))
