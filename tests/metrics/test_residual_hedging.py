"""Residual hedging against explicit matrices, a closed form, and cases in which nothing hedges."""

import math

import numpy as np
import pytest
import torch

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import ResidualHedgingMetric
from hedgelab.metrics.functional.residual_hedging import residual_hedging, signed_root

D_IN = 12
ROWS = 6000


def activations(present, absent, rows=ROWS, seed=0, rate=0.25):
    """Feature 0 with a latent, then features without one that fire with p where it fires, with p' elsewhere."""
    rng = torch.Generator().manual_seed(seed)
    parent = torch.rand(rows, 1, generator=rng) < rate
    chances = torch.where(parent, torch.tensor(present), torch.tensor(absent))
    missing = torch.rand(rows, len(present), generator=rng) < chances
    features = torch.cat([parent, missing], 1).double()
    return (
        features @ torch.linalg.qr(torch.randn(D_IN, D_IN, generator=rng, dtype=torch.float64))[0][: 1 + len(present)]
    )


def regressed(x, parent):
    """Codes, unit decoder and errors of the one-latent SAE of least squared error whose latent fires with the parent."""
    centred = parent - parent.mean()
    row = (centred[:, None] * x).sum(0) / centred.square().sum()
    error = x - x.mean(0) - centred[:, None] * row
    return (parent * row.norm())[:, None], (row / row.norm())[None], error


def one_latent(present, absent, **options):
    x = activations(present, absent, **options)
    rng = torch.Generator().manual_seed(options.get("seed", 0))
    parent = (torch.rand(len(x), 1, generator=rng) < options.get("rate", 0.25)).double()[:, 0]  # the same draw
    codes, W_dec, error = regressed(x, parent)
    return x, error, codes, W_dec


def test_closed_form_of_a_hedging_latent():
    present, absent = [0.3, 0.25, 0.05], [0.05, 0.05, 0.25]
    x, error, codes, W_dec = one_latent(present, absent, rows=12000)
    result = residual_hedging(x, error, codes, W_dec)
    p, q = np.array(present), np.array(absent)
    expected = np.linalg.norm(p * (1 - p) - q * (1 - q)) / (1 + np.sum((p - q) ** 2))
    true = np.linalg.norm(p - q) / math.sqrt(1 + np.sum((p - q) ** 2))
    assert float(result.hedging) == pytest.approx(expected, abs=0.02)
    assert expected < true < 1.6 * expected  # the price of p (1 - p) for p
    assert 0 < float(result.std) < 0.03
    assert float(result.measured) == 1


def test_rare_features_are_measured_as_they_are():
    present, absent = [0.1, 0.1], [0.02, 0.02]
    result = residual_hedging(*one_latent(present, absent, rows=16000, rate=0.5))
    assert float(result.hedging) == pytest.approx(0.08 * math.sqrt(2), abs=0.02)


def test_nothing_where_features_are_independent():
    values = []
    for seed in range(12):
        values.append(float(residual_hedging(*one_latent([0.2] * 6, [0.2] * 6, rows=3000, seed=seed)).hedging))
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values)) + 1e-9
    assert min(values) < 0 < max(values)  # unbiased, not clipped


def test_a_perfect_sae_does_not_hedge():
    x, error, codes, W_dec = one_latent([0.5], [0.1], rows=400)
    assert float(residual_hedging(x, torch.zeros_like(error), codes, W_dec).hedging) == 0


def test_agrees_with_explicit_matrices():
    rng = torch.Generator().manual_seed(3)
    n, width, blocks = 80, 5, 4
    codes = torch.rand(n, width, generator=rng, dtype=torch.float64).clamp_min(0.3) - 0.3
    error, x = (torch.randn(n, D_IN, generator=rng, dtype=torch.float64) for _ in range(2))
    error = error * (0.5 + codes[:, :1])
    W_dec = torch.nn.functional.normalize(torch.randn(width, D_IN, generator=rng, dtype=torch.float64), dim=1)
    c, e = codes.numpy(), (error - error.mean(0)).float().double().numpy()
    matrices = np.zeros((blocks, width, D_IN, D_IN))
    for b in range(blocks):
        part = slice(b * n // blocks, (b + 1) * n // blocks)
        for i in range(width):
            deviation = c[part, i] - c[part, i].mean()
            matrices[b, i] = np.einsum("t,tk,tl->kl", deviation, e[part], e[part]) / (len(deviation) * c[:, i].var())
    pairs = [(matrices[a] * matrices[b]).sum((1, 2)) for a in range(blocks) for b in range(a + 1, blocks)]
    rows = ((c - c.mean(0)).T @ x.numpy()) / (n * c.var(0))[:, None]
    size = (c**2).mean(0) / c.mean(0) * np.abs((rows * W_dec.numpy()).sum(1))
    square = np.mean(pairs, 0) / size**2
    result = residual_hedging(x, error, codes, W_dec)
    assert result.latents.numpy() == pytest.approx(np.sign(square) * np.sqrt(np.abs(square)), rel=1e-4)
    assert float(result.hedging) == pytest.approx(float(result.latents.mean()))


def test_latents_that_hardly_fire_are_left_out():
    x, error, codes, W_dec = one_latent([0.3], [0.1], rows=2000)
    silent = torch.zeros(len(x), 1, dtype=torch.float64)
    result = residual_hedging(x, error, torch.cat([codes, silent], 1), torch.cat([W_dec, W_dec]))
    assert float(result.measured) == 1
    assert result.latents[1].isnan()
    assert float(result.hedging) == float(result.latents[0])


def test_metric_takes_batches_and_folds_norms():
    x, error, codes, W_dec = one_latent([0.3, 0.2], [0.05, 0.1], rows=4000)
    metric = ResidualHedgingMetric(2 * W_dec, rows=3000)
    for part in torch.arange(len(x)).split(700):
        metric.update(x[part], (x - error)[part], Codes.from_dense(codes[part] / 2))
    expected = residual_hedging(x[:3000], error[:3000], codes[:3000], W_dec)
    result = metric.compute()
    assert metric.kept == 3000
    assert result.latents.shape == (1,)
    assert float(result.hedging) == pytest.approx(float(expected.hedging), rel=1e-3)


def test_signed_root_and_mistakes():
    assert signed_root(torch.tensor([4.0, -9.0, 0.0])).tolist() == [2.0, -3.0, 0.0]
    x, error, codes, W_dec = one_latent([0.3], [0.1], rows=7)
    with pytest.raises(UserError, match="need at least 8"):
        residual_hedging(x, error, codes, W_dec)
    with pytest.raises(UserError, match="blocks: must be at least 3"):
        residual_hedging(x, error, codes, W_dec, blocks=2)
