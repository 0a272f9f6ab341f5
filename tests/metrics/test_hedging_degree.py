"""The hedging degree against an independent evaluation of its formula, and constructed cases with a closed form."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import HedgingDegree
from hedgelab.metrics.functional import hedging_degree
from hedgelab.metrics.functional.degree import orthonormal_basis
from hedgelab.seeding import generator

W, D_IN, N = 12, 20, 3


def decoders(seed=0, width=W, d_in=D_IN, n_new=N, dtype=torch.float32, moved=0.3):
    rng = torch.Generator().manual_seed(seed)
    control = torch.randn(width, d_in, generator=rng, dtype=torch.float64)
    extended = torch.randn(width + n_new, d_in, generator=rng, dtype=torch.float64)
    extended[:width] = control + moved * extended[:width]
    scale = 0.5 + torch.rand(width, 1, generator=rng, dtype=torch.float64)
    return (control * scale).to(dtype), extended.to(dtype)


def independently(control, extended, draws=50, covariance=None, live=None, seed=0):
    """SPEC section 5 with NumPy: projectors by pseudo-inverse instead of QR."""
    control, extended = (rows.double().numpy() for rows in (control, extended))
    control, extended = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (control, extended))
    width, d_in = control.shape
    chosen = slice(None) if live is None else live.numpy()
    delta, size = (extended[:width] - control)[chosen], np.linalg.norm(control[chosen], axis=1).mean()

    def projected(vectors):
        return np.linalg.norm(delta @ np.linalg.pinv(vectors) @ vectors, axis=1).mean() / size

    source = generator(seed, "hedging baseline")
    n_new = len(extended) - width
    root = np.eye(d_in) if covariance is None else np.linalg.cholesky(covariance)
    gaussian = [torch.randn(n_new, d_in, generator=source, dtype=torch.float64).numpy() for _ in range(draws)]
    p, b = projected(extended[width:]), [projected(vectors @ root.T) for vectors in gaussian]
    return max(0.0, (p - np.mean(b)) / (1 - np.mean(b))), p, np.mean(b), np.std(b, ddof=1)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 100), st.integers(1, 20), st.integers(1, 8))
def test_agrees_with_an_independent_evaluation(seed, width, n_new):
    control, extended = decoders(seed, width=width, n_new=n_new)
    scores = hedging_degree(control, extended, seed=seed)
    expected = independently(control, extended, seed=seed)
    actual = (scores.degree, scores.projection, scores.baseline, scores.baseline_std)
    assert [float(value) for value in actual] == pytest.approx(expected, abs=1e-6)


def test_live_only_degree_is_the_degree_of_the_live():
    control, extended = decoders()
    live = torch.arange(W) % 3 > 0
    scores = hedging_degree(control, extended, live=live)
    assert float(scores.live_degree) == pytest.approx(independently(control, extended, live=live)[0], abs=1e-6)
    assert scores.live_latents == live.sum()
    assert hedging_degree(control, extended, live=torch.zeros(W, dtype=torch.bool)).live_degree.isnan()


def test_each_latents_baseline_is_its_own():
    control, extended = decoders()
    covariance = torch.diag(torch.linspace(0.1, 4, D_IN, dtype=torch.float64))
    scores = hedging_degree(control, extended, covariance=covariance)
    assert scores.baselines.mean() == pytest.approx(float(scores.baseline))
    assert scores.covariance_baselines.mean() == pytest.approx(float(scores.covariance_baseline))
    for latent in range(W):  # the same alone
        alone = hedging_degree(control[latent : latent + 1], torch.cat([extended[latent : latent + 1], extended[W:]]))
        assert alone.baselines[0] == pytest.approx(float(scores.baselines[latent]))


def test_unchanged_sae_has_degree_zero():
    control, extended = decoders()
    extended[:W] = control
    scores = hedging_degree(control, extended, covariance=torch.eye(D_IN), foreign=[torch.randn(N, D_IN)])
    assert scores.degree == scores.live_degree == scores.covariance_degree == scores.foreign_degree == 0
    assert scores.projection == 0
    assert float(scores.mean_cosine) == pytest.approx(1)


def test_rescaling_decoders_changes_nothing():
    control, extended = decoders(dtype=torch.float64)
    scale = torch.logspace(-2, 2, W + N, dtype=torch.float64)[:, None]
    first, second = hedging_degree(control, extended), hedging_degree(control * scale[:W], extended * scale.flip(0))
    assert float(first.degree) == pytest.approx(float(second.degree), abs=1e-12)


@pytest.mark.parametrize("angle", [0.05, 0.3, 1.0])
def test_hedged_components_that_move_out_are_the_degree(angle):
    """Control latents at ``cos a e_i + sin a e_new``, extended ones at ``e_i``: the part along e_new is sin a."""
    eye = torch.eye(D_IN, dtype=torch.float64)
    control = math.cos(angle) * eye[:W] + math.sin(angle) * eye[W]
    scores = hedging_degree(control, eye[: W + 1])
    assert float(scores.projection) == pytest.approx(math.sin(angle), abs=1e-12)
    b = float(scores.baseline)
    assert float(scores.degree) == pytest.approx((math.sin(angle) - b) / (1 - b), abs=1e-12)
    assert float(scores.delta_norm) == pytest.approx(2 * math.sin(angle / 2), abs=1e-12)
    assert float(scores.mean_cosine) == pytest.approx(math.cos(angle), abs=1e-12)


def test_random_motion_is_not_hedging():
    degrees = [float(hedging_degree(*decoders(seed, width=200)).degree) for seed in range(10)]
    assert max(degrees) < 0.03


def test_covariance_baseline():
    control, extended = decoders()
    mixed = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    covariance = mixed @ mixed.t() / D_IN + 0.1 * torch.eye(D_IN)
    # Spans of vectors with this covariance, whatever its square root: compare means over many draws.
    expected = independently(control, extended, draws=4000, covariance=covariance.numpy())[2]
    scores = hedging_degree(control, extended, covariance=covariance, draws=4000)
    assert float(scores.covariance_baseline) == pytest.approx(expected, rel=0.02)
    assert float(hedging_degree(control, extended, covariance=torch.eye(D_IN)).covariance_degree) == pytest.approx(
        float(hedging_degree(control, extended).degree), abs=0.02
    )


def test_covariance_baseline_in_a_plane_of_activations():
    """All motion in the plane in which activations lie: the baseline there takes in everything, whatever N."""
    eye = torch.eye(D_IN, dtype=torch.float64)
    control = torch.stack([eye[0], eye[1]])
    extended = torch.stack([eye[0] + 0.1 * eye[1], eye[1] - 0.1 * eye[0], *eye[5:8]])
    scores = hedging_degree(control, extended, covariance=torch.diag(torch.tensor([1.0, 1.0] + [0.0] * (D_IN - 2))))
    assert float(scores.covariance_baseline) == pytest.approx(float(scores.delta_norm), abs=1e-9)


def test_foreign_baseline_and_noise_floor():
    control, extended = decoders()
    own = hedging_degree(control, extended, foreign=[extended[W:], extended[W:]], reordered=extended[:W])
    assert float(own.foreign_baseline) == pytest.approx(float(own.projection), abs=1e-12)
    assert own.foreign_degree == 0
    assert float(own.noise_floor) == pytest.approx(float(own.projection), abs=1e-12)
    assert float(own.noise_delta_norm) == pytest.approx(float(own.delta_norm), abs=1e-12)
    without = hedging_degree(control, extended)
    assert without.foreign_baseline.isnan()
    assert without.noise_floor.isnan()
    assert "noise_floor" not in without.scalars()


def test_dependent_new_latents_span_less():
    control, extended = decoders(dtype=torch.float64)
    doubled = torch.cat([extended, extended[-1:] * 2])
    assert hedging_degree(control, doubled).rank == N
    torch.testing.assert_close(hedging_degree(control, doubled).degree, hedging_degree(control, extended).degree)
    basis = orthonormal_basis(doubled[W:])
    torch.testing.assert_close(basis.t() @ basis, torch.eye(N, dtype=torch.float64))


@pytest.mark.parametrize("n_new", [0, D_IN])
def test_impossible_number_of_new_latents(n_new):
    with pytest.raises(UserError, match=r"hedge\.n_new"):
        hedging_degree(*decoders(n_new=n_new))


def test_zero_new_latents_are_refused():
    control, extended = decoders()
    extended[W:] = 0
    with pytest.raises(UserError, match=r"hedge\.new_norm"):
        hedging_degree(control, extended)


@pytest.mark.parametrize("weighted", [False, True])
def test_class_gathers_liveness_and_covariance(weighted):
    control, extended = decoders()
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(60, D_IN, generator=rng) + 3
    weight = torch.rand(60, generator=rng) if weighted else None
    codes = torch.rand(60, W + N, generator=rng)
    codes[:, [2, W + 1]] = 0
    metric = HedgingDegree(control, extended, reordered=control, draws=20)
    for part in (slice(0, 25), slice(25, 60)):
        own = None if weight is None else weight[part]
        metric.update(x[part], Codes.from_dense(codes[part, :W]), Codes.from_dense(codes[part]), own)
    live = torch.arange(W) != 2
    frequencies = np.ones(60) if weight is None else weight.double().numpy()
    covariance = torch.from_numpy(np.cov(x.double().numpy().T, ddof=0, aweights=frequencies))
    expected = hedging_degree(control, extended, live=live, covariance=covariance, reordered=control, draws=20)
    scores = metric.compute()
    assert scores.live_new_latents == N - 1
    for name in ("degree", "live_degree", "covariance_baseline", "noise_floor", "projections", "live"):
        torch.testing.assert_close(getattr(scores, name), getattr(expected, name)), name


def test_class_of_one_latent_and_without_batches():
    with pytest.warns(UserWarning, match="before the ``update``"):
        scores = HedgingDegree(*decoders(width=1, n_new=1)).compute()
    assert scores.projections.shape == (1,)
    assert scores.live_new_latents == 1
    assert scores.covariance_baseline.isnan()
