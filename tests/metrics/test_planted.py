"""Hedging on planted features beside chance."""

import pytest
import torch
from torch.nn.functional import normalize

from hedgelab.metrics.functional.planted import planted_hedging, share_beside
from hedgelab.metrics.functional.recovery import Matching, decoder_cosines
from hedgelab.metrics.functional.true_hedging import tracked_features

D_IN, N = 96, 40


def unit(n, seed):
    return normalize(torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def scored(W_dec, directions, parents=None):
    live = torch.ones(len(W_dec), dtype=torch.bool)
    tracked = tracked_features(decoder_cosines(W_dec, directions), live)
    parents = torch.full((len(directions),), -1) if parents is None else parents
    return planted_hedging(W_dec, directions, unit(90, 9), parents, tracked, live), tracked


def test_a_share_is_the_least_squares_coordinate_beside_the_own_feature():
    p, f = unit(2, 0)
    row = normalize(-0.9 * p + 0.3 * f, dim=0)
    basis = torch.stack([p, f]).t()
    expected = -torch.linalg.lstsq(basis, row[:, None]).solution[1, 0]  # on the parent's side, which is the other
    assert share_beside(row @ f, row @ p, p @ f).item() == pytest.approx(float(expected))


def test_rows_that_hold_chance_alone_score_about_zero():
    directions = unit(N, 1)
    scores = []
    for seed in range(30):
        noise = torch.randn(20, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found, tracked = scored(directions[:20] + 0.05 * noise, directions)
        assert (tracked.feature >= 0).all()
        scores.append(float(found.hedging.sign() * found.hedging.square()))
    mean, error = torch.tensor(scores).mean(), torch.tensor(scores).std() / 30**0.5
    # directions overlap by chance in one draw; over draws of the noise it is the null's own mean that is taken off
    assert abs(mean) < 0.03
    assert error < 0.01


def test_what_rows_hold_is_found_above_chance_with_its_interval():
    directions = unit(N, 1)
    held = torch.zeros(20, N, dtype=torch.float64)
    held[torch.arange(20), torch.arange(20)] = 1
    held[torch.arange(20), 20 + torch.arange(20)] = 0.4
    parents = torch.cat([torch.full((20,), -1), torch.arange(20)])
    found, _ = scored(held @ directions, directions, parents)
    assert float(found.hedging) == pytest.approx(0.4 / 1.16**0.5, abs=0.05)
    assert float(found.child_share) == pytest.approx(0.4 / 1.16**0.5, abs=0.03)
    assert found.child_share_low < found.child_share < found.child_share_high
    assert found.hedging_low < found.hedging < found.hedging_high


def test_children_are_looked_for_in_live_latents_and_nothing_tracked_is_nothing_known():
    eye = torch.eye(4, dtype=torch.float64)
    rows = torch.stack([eye[0], normalize(0.7 * eye[0] - 0.2 * eye[1], dim=0)])
    live, nothing = torch.tensor([False, True]), Matching(torch.full((2,), -1), torch.full((2,), -1))
    found = planted_hedging(rows, eye[:2], eye[2:], torch.tensor([-1, 0]), nothing, live)
    assert found.hedging.isnan()
    assert float(found.child_share) == pytest.approx(-0.2 / 0.53**0.5)
