"""Cosines, matching, MCC, uniqueness and detection against closed forms and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgelab.kernels.codes import Codes
from hedgelab.metrics import FeatureDetection
from hedgelab.metrics.functional import accumulate as accumulate_module
from hedgelab.metrics.functional import (
    co_firing,
    decoder_cosines,
    decoder_geometry,
    detection_scores,
    encoder_cosines,
    match_features,
    mcc,
    mean_max_cosine,
    uniqueness,
)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosines_against_numpy():
    W_dec, directions = draw(0, 5, 7), draw(1, 4, 7)
    rows, columns = W_dec.numpy(), directions.numpy()
    expected = rows @ columns.T / np.linalg.norm(rows, axis=1)[:, None] / np.linalg.norm(columns, axis=1)
    np.testing.assert_allclose(decoder_cosines(W_dec, directions).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(encoder_cosines(W_dec.T, directions).numpy(), expected, atol=1e-12)
    assert decoder_cosines(torch.zeros(1, 7), directions).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (5, 3)])
def test_mcc_is_the_best_of_all_assignments(shape):
    cosines = draw(3, *shape).tanh()
    size = cosines.abs().numpy() if shape[0] <= shape[1] else cosines.abs().numpy().T
    brute = max(
        size[np.arange(size.shape[0]), columns].mean()
        for columns in map(list, itertools.permutations(range(size.shape[1]), size.shape[0]))
    )
    assert mcc(cosines).item() == pytest.approx(brute)


def test_matching_skips_dead_latents_and_weak_pairs():
    cosines = torch.tensor([[0.9, 0.1], [0.95, 0.2], [0.0, 0.5]])
    matching = match_features(cosines, torch.tensor([True, False, True]), threshold=0.6)
    assert matching.feature.tolist() == [0, -1, -1]
    assert matching.latent.tolist() == [0, -1]
    assert match_features(cosines, torch.zeros(3, dtype=torch.bool)).latent.tolist() == [-1, -1]


def test_uniqueness_and_mean_max_cosine_by_hand():
    cosines = torch.tensor([[0.9, 0.1, 0.0], [-0.8, 0.2, 0.0]])
    assert uniqueness(cosines).item() == 0.5
    assert mean_max_cosine(cosines).item() == pytest.approx((0.9 + 0.2 + 0.0) / 3)
    assert mean_max_cosine(cosines.T).item() == pytest.approx(0.85)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), d_sae=st.integers(1, 6), n=st.integers(1, 6))
def test_recovery_ignores_order_sign_and_scale(seed, d_sae, n):
    generator = torch.Generator().manual_seed(seed)
    W_dec, directions = draw(seed, d_sae, 4), draw(seed + 1, n, 4)
    signs = torch.randint(0, 2, (d_sae, 1), generator=generator) * 2.0 - 1
    scales = torch.rand(d_sae, 1, generator=generator, dtype=torch.float64) + 0.1
    moved = (W_dec * signs * scales)[torch.randperm(d_sae, generator=generator)]
    before = decoder_cosines(W_dec, directions)
    after = decoder_cosines(moved, directions[torch.randperm(n, generator=generator)])
    for function in (mcc, mean_max_cosine, uniqueness):
        torch.testing.assert_close(function(after), function(before))


def firing(seed, batch=40, d_sae=6, n=5):
    generator = torch.Generator().manual_seed(seed)
    activations = torch.rand(batch, d_sae, generator=generator).sub(0.6).relu()
    features = torch.rand(batch, n, generator=generator).sub(0.7).relu()
    weight = torch.rand(batch, generator=generator, dtype=torch.float64)
    return activations, features, weight / weight.sum()


@pytest.mark.parametrize("threshold", [0.0, 1.0], ids=["dense", "sparse"])
def test_co_firing_against_numpy(monkeypatch, threshold):
    monkeypatch.setattr(accumulate_module, "SPARSE_BELOW", threshold)
    activations, features, weight = firing(0)
    crow, latents, values = Codes.from_dense(activations).csr()
    fired, present = (activations > 0).double(), (features > 0).double()
    for codes in (Codes.from_dense(activations), Codes.from_csr(crow, latents, values, 6)):
        torch.testing.assert_close(co_firing(codes, features).both.double(), fired.T @ present)
        torch.testing.assert_close(co_firing(codes, features, weight).both, (fired * weight[:, None]).T @ present)


def test_detection_by_hand():
    activations = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    features = torch.tensor([[1.0, 0], [1, 1], [1, 0], [0, 0]])
    metric = FeatureDetection(3, 2)
    metric.update(Codes.from_dense(activations[:1]), features[:1])
    metric.update(Codes.from_dense(activations[1:]), features[1:])
    scores = detection_scores(metric.compute(), torch.tensor([0, -1, 1]))
    assert scores.precision[[0, 2]].tolist() == pytest.approx([2 / 3, math.nan], nan_ok=True)  # latent 2 never fires
    assert scores.recall[[0, 2]].tolist() == pytest.approx([2 / 3, 0])
    assert scores.f1[[0, 2]].tolist() == pytest.approx([2 / 3, 0])
    assert all(score[1].isnan() for score in scores)


def test_detection_weights_equal_repetition():
    activations, features, _ = firing(1, batch=4)
    times = torch.tensor([1, 3, 2, 4])
    weighted, repeated = FeatureDetection(6, 5), FeatureDetection(6, 5)
    weighted.update(Codes.from_dense(activations), features, times / 10)
    repeated.update(Codes.from_dense(activations.repeat_interleave(times, 0)), features.repeat_interleave(times, 0))
    for ours, theirs in zip(weighted.compute(), repeated.compute(), strict=True):
        torch.testing.assert_close(ours * 10, theirs, atol=1e-6, rtol=1e-6)


# -- decoder geometry -----------------------------------------------------------------------------------


def test_cosines_block_by_block_are_those_of_the_whole_matrix():
    W_dec = torch.randn(1500, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, 1500)[:, None]
    W_dec[7] = 2 * W_dec[1400] + 0.01
    geometry = decoder_geometry(W_dec)
    unit = torch.nn.functional.normalize(W_dec.double(), dim=1)
    cosines = unit @ unit.T
    pairs = cosines[torch.triu(torch.ones_like(cosines), 1).bool()]
    assert geometry.counts.sum() == 1500 * 1499 // 2
    torch.testing.assert_close(geometry.mean_absolute, pairs.abs().mean(), rtol=1e-5, atol=1e-7)
    others = (cosines.abs().sum(1) - 1) / 1499
    torch.testing.assert_close(geometry.absolute, others, rtol=1e-5, atol=1e-7)
    cosines.fill_diagonal_(-2)
    torch.testing.assert_close(geometry.largest.double(), cosines.max(1).values, rtol=1e-5, atol=1e-6)
    assert geometry.nearest[7] == 1400
    assert geometry.near_duplicates == (cosines.max(1).values >= 0.9).sum()
    expected = torch.histc(pairs, 200, -1, 1)
    assert (geometry.counts - expected).abs().sum() < 40  # float32 puts a few pairs into the next bin


def test_only_live_latents_count():
    W_dec = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert decoder_geometry(W_dec).near_duplicates == 2
    assert decoder_geometry(W_dec, torch.tensor([True, False, True])).near_duplicates == 0
    assert decoder_geometry(W_dec, torch.tensor([False, False, False])).largest.shape == (0,)
