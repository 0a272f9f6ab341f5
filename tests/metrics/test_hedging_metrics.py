"""Hedging of constructed SAEs: the component that was put in is the one that comes out, with its sign."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import FeatureRegression, SAEMetrics, direct
from hedgelab.metrics.functional import (
    decoder_coordinates,
    decoder_cosines,
    encoder_coordinates,
    hedging,
    regressed_hedging,
    tracked_features,
)


def score(W_dec, directions, live=None, coordinates=None):
    cosines = decoder_cosines(W_dec, directions)
    tracked = tracked_features(cosines, live)
    return hedging(decoder_coordinates(W_dec, directions) if coordinates is None else coordinates, cosines, tracked, live)


@settings(max_examples=30, deadline=None)
@given(angle=st.floats(-0.75, 0.75), scale=st.floats(0.1, 10))
def test_a_mixture_hedges_by_its_sine(angle, scale):
    directions = torch.eye(4, dtype=torch.float64)[:2]
    latent = scale * (math.cos(angle) * directions[:1] + math.sin(angle) * directions[1:])
    result = score(latent, directions)
    assert result.components[0].tolist() == pytest.approx([0, math.sin(angle)], abs=1e-9)
    assert result.norm.item() == pytest.approx(abs(math.sin(angle)), abs=1e-9)
    assert result.largest.item() == pytest.approx(math.sin(angle), abs=1e-9)
    encoder = encoder_coordinates(latent.T, directions)
    assert score(latent, directions, coordinates=encoder).largest.item() == pytest.approx(math.sin(angle), abs=1e-9)


def test_tracked_features_are_not_hedging():
    directions = torch.eye(3)
    W_dec = torch.tensor([[0.9, 0.3, 0.3], [0.2, 0.9, 0.0]])
    components = score(W_dec, directions).components
    assert components[0, 1] == 0
    assert components[0, 2].item() == pytest.approx(0.3 / math.sqrt(0.99))
    assert components[1].tolist() == [0, 0, 0]


def test_a_dead_latent_tracks_nothing_and_hedges_nothing():
    directions = torch.eye(2)
    W_dec = torch.tensor([[0.9, 0.3], [0.0, 1.0]])
    alone = score(W_dec, directions, torch.tensor([True, False]))
    assert alone.components[0, 1].item() == pytest.approx(0.3 / math.sqrt(0.9))
    assert alone.norm[1] == 0
    assert score(W_dec, directions).norm.tolist() == [0, 0]


def test_a_latent_of_two_features_may_own_only_one():
    """At 45 degrees both cosines pass the threshold; one latent still tracks one feature."""
    result = score(torch.tensor([[1.0, 1.0]]), torch.eye(2))
    assert result.norm.item() == pytest.approx(math.sqrt(0.5))


def test_signs_are_relative_to_the_own_feature():
    result = score(torch.tensor([[-0.8, -0.2]]), torch.eye(2))
    assert result.largest.item() == pytest.approx(0.2 / math.sqrt(0.68))


def test_overlapping_features_are_no_hedging_by_themselves():
    """A pure latent and its perfectly separating encoder score 0 although the features' cosine is .5."""
    directions = torch.tensor([[1.0, 0, 0], [0.5, math.sqrt(0.75), 0]], dtype=torch.float64)
    pure = directions[:1]
    assert decoder_cosines(pure, directions)[0, 1].item() == pytest.approx(0.5)
    assert score(pure, directions).norm.item() == pytest.approx(0, abs=1e-12)
    separating = torch.linalg.pinv(directions)[:, :1]
    reads = encoder_coordinates(separating, directions)
    assert score(pure, directions, coordinates=reads).norm.item() == pytest.approx(0, abs=1e-12)
    mixed = pure + 0.3 * directions[1:]
    expected = 0.3 / mixed.norm().item()
    assert score(mixed, directions).largest.item() == pytest.approx(expected)


def overlapping(n, d_in, rows, rate, seed=0):
    """Independent features along random directions."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n, d_in, generator=rng), dim=1)
    return directions, (torch.rand(rows, n, generator=rng) < rate).float(), rng


def test_more_features_than_dimensions_need_codes():
    directions, features, _ = overlapping(5, 3, 10, 0.3)
    with pytest.raises(UserError, match="5 directions in 3 dimensions overlap"):
        decoder_coordinates(directions[:2], directions)
    with pytest.raises(UserError, match="overlap"):
        direct.hedging(directions[:2], directions)
    with pytest.raises(UserError, match="give both"):
        direct.hedging(directions[:2], directions, features[:, :2])


@pytest.mark.parametrize("width", [128, 384])
def test_perfect_latents_of_overlapping_features_do_not_hedge(width):
    """384 features in 128 dimensions: cosines give 1.57 for a latent a feature."""
    directions, features, _ = overlapping(384, 128, 8192, 0.03)
    metrics = SAEMetrics(128, width, directions, parents=torch.full((384,), -1))
    for part in features.split(1024):
        metrics.update(Batch(part @ directions, part), part @ directions, 3 * part[:, :width])
    results = metrics.compute(directions[:width].t(), directions[:width] / 3)
    assert abs(float(results["hedging/decoder"])) < (0.02 if width < 384 else 1e-12)
    assert abs(float(results["hedging/decoder_signed"])) < 0.02
    assert results["hedging/encoder"].isnan()  # no truth of encoders is known there
    assert results["tracked_features"] == width


def test_a_latent_that_mixes_an_overlapping_feature_in_is_seen():
    """Feature 1 fires on half of feature 0's firings and never else: its coefficient on the parent's code is .5."""
    directions, features, rng = overlapping(12, 6, 8000, 0.1)
    features[:, 1] = features[:, 0] * (torch.rand(8000, generator=rng) < 0.5)
    latents = [0, *range(2, 12)]
    W_dec = directions[latents].clone()
    W_dec[0] += 0.5 * directions[1]
    result = direct.hedging(W_dec, directions, features[:, latents], features)
    expected = 0.5 / float(W_dec[0].norm())
    assert float(result.norm[0]) == pytest.approx(expected, abs=0.02)
    assert float(result.largest[0]) == pytest.approx(expected, abs=0.02)
    assert float(result.components[0, 1]) == pytest.approx(expected, abs=0.02)
    assert float(result.norm[1:].mean()) == pytest.approx(0, abs=0.02)


def test_regression_agrees_with_coordinates_on_orthonormal_features():
    """For the decoder of least squared error on these codes both are the same number."""
    rng = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(10, 10, generator=rng))[0][:6]
    features = (torch.rand(6000, 6, generator=rng) < 0.2).float()
    features[:, 4] *= features[:, 0]
    features[:, 5] *= (features[:, 1] > 0) | (torch.rand(6000, generator=rng) < 0.3)
    codes = features[:, :4]
    x = features @ directions
    W_dec = torch.linalg.lstsq(codes - codes.mean(0), x - x.mean(0)).solution
    plain, regressed = direct.hedging(W_dec, directions), direct.hedging(W_dec, directions, codes, features)
    assert regressed.norm.tolist() == pytest.approx(plain.norm.tolist(), abs=0.04)  # roots of noise where nothing hedges
    assert regressed.norm.tolist()[0] == pytest.approx(float(plain.norm[0]), abs=0.01)
    assert regressed.components.tolist()[0] == pytest.approx(plain.components.tolist()[0], abs=0.01)
    assert float(plain.norm[0]) > 0.1


def test_regression_sums_add_up_and_populations_are_exact():
    directions, features, _ = overlapping(9, 4, 600, 0.3)
    codes = features[:, :5] * torch.tensor([1.0, 2, 3, 4, 5])
    once, parts = FeatureRegression(5, 9), FeatureRegression(5, 9)
    once.update(codes, features)
    for rows in torch.arange(600).split(120):
        parts.update(Codes.from_csr(*Codes.from_dense(codes[rows]).csr(), 5), features[rows])
    for one, other in zip(once.compute(), parts.compute(), strict=True):
        torch.testing.assert_close(one, other)
    population = FeatureRegression(5, 9)
    population.update(codes, features, torch.full((600,), 1 / 600))
    cosines = decoder_cosines(directions[:5], directions)
    tracked = tracked_features(cosines)
    scores = regressed_hedging(population.compute(), directions[:5], directions, cosines, tracked)
    centred, z = (codes - codes.mean(0)).double(), features.double()
    exact = torch.linalg.lstsq(centred, z - z.mean(0)).solution
    scale = ((exact @ directions.double()) * directions[:5]).sum(1).abs()
    assert scores.norm.tolist() == pytest.approx((exact[:, 5:].norm(dim=1) / scale).tolist(), rel=1e-4)


def test_what_is_too_large_to_regress_is_nan_with_a_warning(monkeypatch):
    monkeypatch.setattr("hedgelab.metrics.evaluation.MOST_PAIRS", 10)
    directions, features, _ = overlapping(6, 4, 50, 0.3)
    with pytest.warns(UserWarning, match="hedging/decoder: 6 overlapping features"):
        metrics = SAEMetrics(4, 2, directions)
    metrics.update(Batch(features @ directions, features), features @ directions, features[:, :2])
    assert metrics.compute(directions[:2].t(), directions[:2])["hedging/decoder"].isnan()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_hedging_ignores_order_and_scale(seed):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    W_dec = directions[:3] + 0.3 * torch.randn(3, 8, generator=generator, dtype=torch.float64)
    order = torch.randperm(3, generator=generator)
    features = torch.randperm(5, generator=generator)
    scale = torch.rand(3, 1, generator=generator, dtype=torch.float64) + 0.1
    moved = score((W_dec * scale)[order], directions[features])
    torch.testing.assert_close(moved.components, score(W_dec, directions).components[order][:, features])
