"""L0, dead latents and firing densities, on dense and sparse codes."""

import pickle

import pytest
import torch

from hedgelab.kernels.codes import Codes
from hedgelab.metrics import L0, DeadLatents, FiringDensity
from hedgelab.metrics.functional import dead_latents, density_histogram, firing_rates, l0

DENSE = torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 1], [3, 0, 0, 1], [0, 0, 0, 0]])


def layouts():
    crow = torch.tensor([0, 2, 3, 6, 6])
    latents = torch.tensor([0, 3, 3, 0, 1, 3])
    values = torch.tensor([1.0, 2, 1, 3, 0, 1])  # a stored zero does not fire
    return [Codes.from_dense(DENSE), Codes.from_csr(crow, latents, values, 4)]


@pytest.mark.parametrize("codes", layouts(), ids=["dense", "sparse"])
def test_counts_by_hand(codes):
    assert l0(codes).item() == 5 / 4
    assert firing_rates(codes).tolist() == [0.5, 0, 0, 0.75]
    assert dead_latents(codes).item() == 2
    metric = DeadLatents(4)
    metric.update(codes)
    assert metric.compute().item() == 2


@pytest.mark.parametrize("codes", layouts(), ids=["dense", "sparse"])
def test_population_weights(codes):
    weight = torch.tensor([0.0, 0.5, 0.3, 0.2], dtype=torch.float64)
    assert l0(codes, weight).item() == pytest.approx(0.5 + 2 * 0.3)
    torch.testing.assert_close(firing_rates(codes, weight), torch.tensor([0.3, 0, 0, 0.8], dtype=torch.float64))
    metric = L0()
    for _ in range(3):
        metric.update(codes, weight.float())
    assert metric.compute().item() == pytest.approx(1.1)


def test_a_latent_is_dead_only_if_silent_in_every_batch():
    metric = DeadLatents(4)
    metric.update(Codes.from_dense(DENSE))
    metric.update(Codes.from_dense(DENSE.roll(2, dims=1)))
    assert metric.compute().item() == 0


def test_one_latent_keeps_its_dimension_also_from_the_cache_and_pickled():
    metric = FiringDensity(1)
    metric.update(Codes.from_dense(torch.tensor([[1.0], [0.0]])))
    for result in (metric.compute(), metric.compute(), pickle.loads(pickle.dumps(metric)).compute()):
        assert result.tolist() == [0.5]


def test_density_histogram_puts_every_live_latent_in_one_bin():
    rates = torch.tensor([0.0, 1e-9, 0.05, 0.1, 1.0], dtype=torch.float64)
    histogram = density_histogram(rates, (-3.0, -2.0, -1.0, 0.0))
    assert histogram.counts.tolist() == [1, 1, 2]
    assert histogram.dead.item() == 1
    metric = FiringDensity(4)
    metric.update(Codes.from_dense(DENSE))
    counts, edges, _ = density_histogram(metric.compute())
    assert counts.sum().item() == 2
    assert len(counts) + 1 == len(edges)
