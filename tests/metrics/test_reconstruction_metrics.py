"""Explained variance, squared error and shrinkage against float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgelab.metrics import ExplainedVariance, MeanSquaredError, Shrinkage
from hedgelab.metrics.functional import explained_variance, mean_squared_error, shrinkage


def reference_explained_variance(x, x_hat, weight=None):
    x, x_hat = x.double().numpy(), x_hat.double().numpy()
    weight = np.full(len(x), 1 / len(x)) if weight is None else weight.double().numpy() / weight.double().sum().item()
    mean = weight @ x
    return 1 - (weight @ (x - x_hat) ** 2).sum() / (weight @ (x - mean) ** 2).sum()


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e4])
def test_explained_variance_is_safe_on_large_means(mean):
    generator = torch.Generator().manual_seed(0)
    x = mean + torch.randn(1000, 24, generator=generator)
    x_hat = x + 0.5 * torch.randn(1000, 24, generator=generator)
    metric = ExplainedVariance(24)
    for rows in torch.arange(1000).split(130):
        metric.update(x[rows], x_hat[rows])
    assert metric.compute().item() == pytest.approx(reference_explained_variance(x, x_hat), abs=1e-6)


def test_explained_variance_counts_the_scatter_between_batches():
    metric = ExplainedVariance(1)
    for level in (10_000.0, 10_001.0, 10_002.0):
        metric.update(torch.full((4, 1), level), torch.full((4, 1), 10_001.0))
    assert metric.compute().item() == pytest.approx(0.0, abs=1e-6)


def test_weights_equal_repetition():
    generator = torch.Generator().manual_seed(1)
    x, x_hat = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    times = torch.tensor([1, 2, 3, 1, 3])
    weight = times / times.sum()
    many, many_hat = x.repeat_interleave(times, 0), x_hat.repeat_interleave(times, 0)
    for function in (explained_variance, mean_squared_error, shrinkage):
        torch.testing.assert_close(function(x, x_hat, weight), function(many, many_hat))


def test_explained_variance_of_the_mean_is_zero_and_of_truth_one():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
    assert explained_variance(x, x).item() == 1
    assert explained_variance(x, x.double().mean(0).expand(64, -1)).item() == pytest.approx(0, abs=1e-7)
    assert explained_variance(x[:0], x[:0]).isnan()


def test_explained_variance_takes_bfloat16_and_batches_without_weight():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(3)).bfloat16()
    metric = ExplainedVariance(5)
    metric.update(x, 0.5 * x)
    metric.update(x, x, torch.zeros(64))
    assert metric.compute().item() == pytest.approx(reference_explained_variance(x, 0.5 * x), abs=1e-6)


def test_mean_squared_error_sums_over_dimensions():
    x = torch.zeros(4, 3)
    metric = MeanSquaredError()
    metric.update(x, x + 2)
    metric.update(x[:2], x[:2])
    assert metric.compute().item() == pytest.approx(3 * 4 * 4 / 6)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.1, 3), seed=st.integers(0, 1000))
def test_shrinkage_is_the_factor_that_shrank(scale, seed):
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed))
    projection = torch.cat([x[:, :3], torch.zeros(32, 3)], dim=1)
    metric = Shrinkage()
    metric.update(x, scale * projection)
    assert metric.compute().item() == pytest.approx(scale, rel=1e-5)
