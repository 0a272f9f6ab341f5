"""Hedging of constructed SAEs: the component that was put in is the one that comes out, with its sign."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgelab.metrics.functional import (
    decoder_coordinates,
    decoder_cosines,
    encoder_coordinates,
    hedging,
    tracked_features,
)


def score(W_dec, directions, live=None, coordinates=None):
    cosines = decoder_cosines(W_dec, directions)
    tracked = tracked_features(cosines, live)
    return hedging(
        decoder_coordinates(W_dec, directions) if coordinates is None else coordinates, cosines, tracked, live
    )


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


def test_more_features_than_dimensions_fall_back_to_cosines():
    directions = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    W_dec = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(decoder_coordinates(W_dec, directions), decoder_cosines(W_dec, directions))


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
