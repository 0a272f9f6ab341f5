"""SAEMetrics as a whole: its numbers, two ranks against one, pickling, cloning, resetting."""

import copy
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.utilities import dim_zero_sum

from hedgelab.batch import Batch
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import (
    L0,
    DeadLatents,
    ExplainedVariance,
    FeatureDetection,
    FeatureHierarchy,
    FiringDensity,
    MeanSquaredError,
    SAEMetrics,
    Shrinkage,
)

D_IN, D_SAE, N = 8, 5, 4


class Toy(nn.Module):
    """A random SAE near the first features of a hierarchical dictionary."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.directions = torch.eye(D_IN)[:N]
        self.W_dec = torch.randn(D_SAE, D_IN, generator=generator) * 0.1
        self.W_dec[:3] += self.directions[:3]
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        self.W_enc = self.W_dec.T.clone()
        self.parents = torch.tensor([-1, 0, -1, -1])

    def batch(self, seed, size=300):
        generator = torch.Generator().manual_seed(seed)
        fires = torch.rand(size, N, generator=generator) < torch.tensor([0.4, 0.5, 0.3, 0.2])
        fires[:, 1] &= fires[:, 0]
        features = fires * (1 + 0.1 * torch.randn(size, N, generator=generator))
        return Batch(100 + features @ self.directions, features)

    def forward(self, batch):
        codes = Codes.from_dense(((batch.x - 100) @ self.W_enc - 0.3).relu())
        return 100 + codes.to_dense() @ self.W_dec, codes


def every_metric():
    return {
        "ev": (ExplainedVariance(D_IN), "x"),
        "mse": (MeanSquaredError(), "x"),
        "shrinkage": (Shrinkage(), "x"),
        "l0": (L0(), "codes"),
        "dead": (DeadLatents(D_SAE), "codes"),
        "density": (FiringDensity(D_SAE), "codes"),
        "detection": (FeatureDetection(D_SAE, N), "both"),
        "hierarchy": (FeatureHierarchy(N), "features"),
    }


def measure(toy, batches):
    """Every metric and SAEMetrics over the batches."""
    metrics, whole = every_metric(), SAEMetrics(D_IN, D_SAE, toy.directions)
    for batch in batches:
        x_hat, codes = toy(batch)
        whole.update(batch, x_hat, codes)
        arguments = {"x": (batch.x, x_hat), "codes": (codes,), "both": (codes, batch.features), "features": (batch.features,)}
        for metric, takes in metrics.values():
            metric.update(*arguments[takes], batch.weight)
    return {name: metric.compute() for name, (metric, _) in metrics.items()} | whole.compute(toy.W_enc, toy.W_dec)


def on_rank(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(minutes=2))
    toy = Toy()
    batches = [toy.batch(seed, size) for seed, size in ((0, 100), (1, 300), (2, 50), (3, 250))]
    torch.save(measure(toy, batches[rank::2]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_on_all_the_data(tmp_path):
    # forked, like DataLoader workers: importing torch and torchmetrics again would take most of the suite's time
    mp.start_processes(on_rank, (tmp_path / "store", tmp_path), nprocs=2, start_method="fork")
    toy = Toy()
    parts = [toy.batch(seed, size) for seed, size in ((0, 100), (1, 300), (2, 50), (3, 250))]
    merged = Batch(torch.cat([part.x for part in parts]), torch.cat([part.features for part in parts]))
    expected = measure(toy, [merged])
    assert expected["hierarchy"].tolist() == toy.parents.tolist()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9, equal_nan=True, msg=name)


def test_metrics_pickle_clone_and_leave_no_state_dict():
    toy = Toy()
    batch = toy.batch(0)
    x_hat, codes = toy(batch)
    metric = ExplainedVariance(D_IN)
    metric.update(batch.x, x_hat)
    value = metric.compute()
    assert pickle.loads(pickle.dumps(metric)).compute() == value
    assert metric.clone().compute() == value
    whole = SAEMetrics(D_IN, D_SAE, toy.directions)
    whole.update(batch, x_hat, codes)
    first = whole.compute(toy.W_enc, toy.W_dec)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(whole)))
    torch.testing.assert_close(twin.compute(toy.W_enc, toy.W_dec), first, equal_nan=True)
    assert whole.state_dict() == {}
    assert whole.half().explained_variance.total.dtype == torch.float64


def test_metrics_work_in_a_collection_and_as_functions():
    toy = Toy()
    batch = toy.batch(0)
    x_hat, codes = toy(batch)
    collection = MetricCollection([ExplainedVariance(D_IN), Shrinkage(), L0()])
    collection.update(x=batch.x, x_hat=x_hat, codes=codes)
    assert collection.compute()["L0"] == L0()(codes)
    assert collection.compute()["ExplainedVariance"] == ExplainedVariance(D_IN)(batch.x, x_hat)


def test_a_result_stays_what_it_was_when_more_batches_come():
    toy = Toy()
    for metric, takes in every_metric().values():
        for seed in range(2):
            batch = toy.batch(seed)
            x_hat, codes = toy(batch)
            arguments = {"x": (batch.x, x_hat), "codes": (codes,), "both": (codes, batch.features)}
            metric.update(*arguments.get(takes, (batch.features,)))
            if seed == 0:
                first = metric.compute()
                kept = copy.deepcopy(first)
        torch.testing.assert_close(first, kept, rtol=0, atol=0, equal_nan=True)


def test_autocast_leaves_counts_and_cosines_exact():
    toy = Toy()
    batch = toy.batch(0, 1500)
    results = []
    for enabled in (False, True):
        metrics = SAEMetrics(D_IN, D_SAE, toy.directions)
        x_hat, codes = toy(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            metrics.update(batch, x_hat, codes)
            results.append(metrics.compute(toy.W_enc, toy.W_dec))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)


def test_every_metric_declares_what_torchmetrics_asks():
    for metric, _ in every_metric().values():
        assert metric.full_state_update is False
        assert metric.higher_is_better in (True, False, None)
        assert all(reduction is dim_zero_sum for reduction in metric._reductions.values())


def test_without_known_features_only_the_plain_metrics():
    toy = Toy()
    batch = toy.batch(0)
    metrics = SAEMetrics(D_IN, D_SAE)
    metrics.update(Batch(batch.x), *toy(batch))
    results = metrics.compute(toy.W_enc, toy.W_dec)
    reconstruction = {"explained_variance", "mse", "shrinkage", "norm_ratio"}
    residual = {"hedging/residual_hedging", "hedging/residual_hedging_std"}
    assert set(results) == reconstruction | {"l0", "dead_latents", "dead_fraction"} | residual
    early = SAEMetrics(D_IN, D_SAE, last=False)
    early.update(Batch(batch.x), *toy(batch))
    assert set(early.compute(toy.W_enc, toy.W_dec)) == set(results) - residual
    assert all(value.shape == () and value.dtype == torch.float64 for value in results.values())


def test_features_must_travel_where_directions_are_known():
    toy = Toy()
    batch = toy.batch(0)
    with pytest.raises(ValueError, match="features"):
        SAEMetrics(D_IN, D_SAE, toy.directions).update(Batch(batch.x), *toy(batch))


def constructed(W_enc, W_dec):
    """All results for the hierarchical toy's population (P(f1) = .25, P(f2 | f1) = .2)."""
    features = torch.tensor([[0.0, 0], [1, 0], [1, 1]])
    directions = torch.eye(3)[:2]
    weight = torch.tensor([0.75, 0.2, 0.05])
    batch = Batch(features @ directions, features, weight)
    codes = Codes.from_dense((batch.x @ W_enc).relu())
    metrics = SAEMetrics(3, W_enc.shape[1], directions)
    metrics.update(batch, codes.to_dense() @ W_dec, codes)
    scale = W_dec.norm(dim=1)
    return metrics.compute(W_enc * scale, W_dec / scale[:, None])


def test_an_absorbing_sae_reconstructs_perfectly_and_is_caught():
    """Parent's encoder f1 - f2, child's decoder f1 + f2."""
    results = constructed(torch.tensor([[1.0, 0], [-1, 1], [0, 0]]), torch.tensor([[1.0, 0, 0], [1, 1, 0]]))
    assert results["mse"].item() == pytest.approx(0, abs=1e-12)
    assert results["explained_variance"].item() == pytest.approx(1)
    assert results["absorption"].item() == pytest.approx(1)
    assert results["absorption_missed"].item() == pytest.approx(1)
    assert results["absorption_encoder"].item() == pytest.approx(-(0.5**0.5))
    assert results["hedging/decoder"].item() == 0
    assert results["l0"].item() == pytest.approx(0.25)


def test_a_hedging_sae_is_caught_with_its_sign():
    """One latent, encoder and decoder at the angle of the closed form (f2 component .2434)."""
    latent = torch.tensor([[(1 - 0.2434**2) ** 0.5, 0.2434, 0]])
    results = constructed(latent.T, 2 * latent)
    assert all(value.shape == () and value.dtype == torch.float64 for value in results.values())
    for name in ("hedging/decoder", "hedging/decoder_signed", "hedging/encoder", "hedging/encoder_signed"):
        assert results[name].item() == pytest.approx(0.2434, abs=1e-6)
    assert results["tracked_features"].item() == 1
    assert results["detector_f1"].item() == pytest.approx(1)
    assert results["absorption"].item() == 0
    assert results["absorption_encoder"].item() == pytest.approx(0.2434, abs=1e-6)
    assert results["mcc"].item() == pytest.approx((1 - 0.2434**2) ** 0.5)
