"""Residual hedging against explicit matrices, a closed form, and cases in which nothing hedges."""

import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hedgelab.metrics
from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import ResidualHedgingMetric
from hedgelab.metrics.functional import error_spread, residual_hedging
from hedgelab.metrics.functional.error_spread import influence, pairwise_standard_error, regression

D_IN = 12
ROWS = 6000


def activations(present, absent, rows=ROWS, seed=0, rate=0.25):
    """Feature 0 with a latent, then features without one that fire with p where it fires, with p' elsewhere."""
    rng = torch.Generator().manual_seed(seed)
    parent = torch.rand(rows, 1, generator=rng) < rate
    chances = torch.where(parent, torch.tensor(present), torch.tensor(absent))
    missing = torch.rand(rows, len(present), generator=rng) < chances
    features = torch.cat([parent, missing], 1).double()
    return features @ torch.linalg.qr(torch.randn(D_IN, D_IN, generator=rng, dtype=torch.float64))[0][: 1 + len(present)]


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


def test_rare_features_give_the_true_hedging():
    present, absent = [0.12, 0.1, 0.02] + [0.05] * 4, [0.02, 0.02, 0.1] + [0.05] * 4
    result = residual_hedging(*one_latent(present, absent, rows=16000, rate=0.4))
    hedged = np.linalg.norm(np.array(present) - np.array(absent))
    assert float(result.hedging) == pytest.approx(hedged / math.sqrt(1 + hedged**2), abs=0.03)
    assert float(result.magnitude) == pytest.approx(1, abs=0.05)
    assert 0 < float(result.std) < 0.03
    assert float(result.measured) == 1


def test_closed_form_of_a_parent_that_hedges_children():
    rate, children, others = 0.3, [0.4, 0.35], [0.08] * 6
    result = residual_hedging(*one_latent(children + others, [0.0, 0.0, *others], rows=16000, rate=rate))
    p, q = np.array(children), np.array(others)
    along_row = np.concatenate([p, 0 * q]) / math.sqrt(1 + (p**2).sum())
    gram = np.eye(8) - np.outer(along_row, along_row)  # of the features, off the decoder row

    def squared_norm(amounts, power):
        return amounts @ gram**power @ amounts

    variances = np.concatenate([rate * p * (1 - p), q * (1 - q)])
    thirds = np.concatenate([rate * p * (1 - p) * (1 - 2 * p), q * (1 - q) * (1 - 2 * q)])
    cubed = np.trace(np.linalg.matrix_power(gram * variances, 3))
    m = math.sqrt((squared_norm(thirds, 3) + 4 * cubed) / squared_norm(variances, 2))
    given = np.concatenate([p * (1 - p), 0 * q])
    second = math.sqrt(squared_norm(given, 2))
    third = math.sqrt(squared_norm(given * (1 - 2 * np.concatenate([p, q])), 3))
    expected = second / (m * (1 + third / second / m) / 2) / math.sqrt(1 + (p**2).sum())
    assert float(result.hedging) == pytest.approx(expected, abs=0.03)
    assert expected == pytest.approx(np.linalg.norm(p) / math.sqrt(1 + (p**2).sum()), rel=0.15)


def perfect_latents(seed, rates, tracked, rows=2048):
    """An SAE that knows the first features exactly and nothing of the others, which fire independently of them."""
    rng = torch.Generator().manual_seed(seed)
    n = len(rates)
    firing = (torch.rand(rows, n, generator=rng) < torch.tensor(rates)).double()
    directions = torch.linalg.qr(torch.randn(n + 16, n + 16, generator=rng, dtype=torch.float64))[0][:n]
    x = firing @ directions
    return x, firing[:, tracked:] @ directions[tracked:], firing[:, :tracked], directions[:tracked]


NULLS = {
    "all as often": ([0.1] * 24, 12),
    "all rare": ([0.02] * 24, 12),
    "rare latents, frequent rest": ([0.02] * 12 + [0.2] * 12, 12),
    "one latent": ([0.1] * 7, 1),
}


def over_seeds(name, seeds, rows=2048):
    rates, tracked = NULLS[name]
    results = [residual_hedging(*perfect_latents(seed, rates, tracked, rows)) for seed in seeds]
    return np.array([float(one.hedging) for one in results]), np.array([float(one.std) for one in results])


def test_noise_has_no_favourite_sign():
    """Twelve draws of the case in which a rate estimated from the same noise gave -.038."""
    values, _ = over_seeds("rare latents, frequent rest", range(12))
    assert abs(values.mean()) < 2 * values.std(ddof=1) / math.sqrt(len(values))
    assert min(values) < 0 < max(values)  # of either sign, not clipped


def test_latents_beside_those_that_errors_go_with_do_not_hedge():
    """Errors whose size goes with sixty latents' codes, as on language models, and twenty latents that have no part in it."""
    values = []
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        fires = torch.rand(3000, 80, generator=rng, dtype=torch.float64) < 0.1
        codes = fires * (0.5 + torch.rand(3000, 80, generator=rng, dtype=torch.float64))
        size = 0.2 + codes[:, :60].sum(1, keepdim=True)
        error = torch.randn(3000, 96, generator=rng, dtype=torch.float64) * size
        error[:, :80] = 0  # off the decoder's span
        x = torch.nn.functional.pad(codes, (0, 16)) + error
        values.append(residual_hedging(x, error, codes, torch.eye(96).double()[:80]).latents[60:])
    of_seed = torch.stack(values).mean(1)
    assert abs(float(of_seed.mean())) < 2.5 * float(of_seed.std()) / math.sqrt(len(values))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2048, 6000])
@pytest.mark.parametrize("name", NULLS)
def test_zero_on_average_where_nothing_hedges_with_an_honest_standard_error(name, rows):
    values, errors = over_seeds(name, range(100, 180), rows)
    assert abs(values.mean()) < 2 * values.std(ddof=1) / math.sqrt(len(values))
    assert float(errors.mean()) == pytest.approx(values.std(ddof=1), rel=0.2)


def held_out(seed, present, absent, rows=3200, rate=0.25):
    """The one-latent SAE that knows the population, on a sample that it has not seen."""
    rng = torch.Generator().manual_seed(seed)
    parent = (torch.rand(rows, 1, generator=rng) < rate).double()
    p, q = (torch.tensor(rates, dtype=torch.float64) for rates in (present, absent))
    missing = (torch.rand(rows, len(p), generator=rng) < torch.where(parent > 0, p, q)).double()
    features = torch.cat([parent, missing], 1)
    row = torch.cat([torch.ones(1, dtype=torch.float64), p - q])[None]
    error = features - parent * row - torch.cat([torch.zeros(1, dtype=torch.float64), q])
    return features, error, parent, row


@pytest.mark.slow
@pytest.mark.parametrize("present", [[0.3, 0.2, 0.1, 0.1], [0.12, 0.1, 0.1, 0.1]])
def test_the_standard_error_is_honest_where_something_hedges(present):
    results = [residual_hedging(*held_out(seed, present, [0.05, 0.1, 0.1, 0.1])) for seed in range(80)]
    spread = np.std([float(one.hedging) for one in results], ddof=1)
    assert np.mean([float(one.std) for one in results]) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("own", [0.0, 0.1, 1.0])
def test_standard_error_of_a_mean_over_pairs(own):
    """Blocks that bring a number of their own, or none, and pairs that add noise: the variance of the mean, by simulation."""
    rng, blocks, draws = np.random.default_rng(0), 16, 2000
    first, second = np.triu_indices(blocks, 1)
    of_block = rng.normal(0, own, (draws, blocks))
    pairs = of_block[:, first] + of_block[:, second] + rng.normal(0, 1.0, (draws, len(first)))
    told = np.array([float(pairwise_standard_error(torch.tensor(row), blocks)) for row in pairs[:500]])
    assert told.mean() == pytest.approx(math.sqrt(4 * own**2 / blocks + 1 / len(first)), rel=0.06)


@pytest.mark.parametrize("norms", [[2.0, 2.0], [0.25, 3.0]])
def test_norms_layouts_precisions_and_doors_give_one_number(norms):
    """The same SAE with decoder rows and codes rescaled, as a function, a metric, and an SAE of one's own."""
    rng, norms = torch.Generator().manual_seed(0), torch.tensor(norms, dtype=torch.float64)
    x = activations([0.3, 0.2], [0.05, 0.1], rows=4000)
    codes = torch.relu(x[:, :2] + 0.3 * torch.rand(4000, 2, generator=rng).double())
    W_dec = torch.linalg.lstsq(codes, x).solution
    expected = residual_hedging(x, x - codes @ W_dec, codes, W_dec)
    scaled, rows = codes / norms, norms[:, None] * W_dec
    sparse = Codes.from_csr(*Codes.from_dense(scaled).csr(), 2)
    results = [residual_hedging(x, x - codes @ W_dec, given, rows) for given in (scaled, sparse)]
    metric = ResidualHedgingMetric(rows)
    for part in torch.arange(len(x)).split(900):
        metric.update(x[part], scaled[part] @ rows, scaled[part])
    sae = SimpleNamespace(W_dec=rows, encode=lambda given: scaled[: len(given)], decode=lambda given: given @ rows)
    results += [metric.compute(), hedgelab.metrics.residual_hedging(x, sae)]
    for result in results:
        assert result.latents.tolist() == pytest.approx(expected.latents.tolist(), rel=1e-3)
        assert float(result.std) == pytest.approx(float(expected.std), rel=1e-3)


def test_a_perfect_sae_does_not_hedge():
    x, error, codes, W_dec = one_latent([0.5], [0.1], rows=400)
    assert float(residual_hedging(x, torch.zeros_like(error), codes, W_dec).hedging) == 0


def test_agrees_with_explicit_matrices():
    rng = torch.Generator().manual_seed(3)
    n, width, blocks = 160, 5, 4
    codes = torch.rand(n, width, generator=rng, dtype=torch.float64).clamp_min(0.3) - 0.3
    error, x = (torch.randn(n, D_IN, generator=rng, dtype=torch.float64) for _ in range(2))
    error = error * (0.5 + codes[:, :1])
    W_dec = torch.nn.functional.normalize(torch.randn(width, D_IN, generator=rng, dtype=torch.float64), dim=1)
    c, d = codes.numpy(), W_dec.numpy()
    e = (error - error.mean(0)).numpy() @ (np.eye(D_IN) - np.linalg.pinv(d) @ d)
    spread = e.T @ e / n
    usual = np.trace(spread @ spread) / np.trace(spread)
    even = np.linalg.inv(spread + usual * np.eye(D_IN)) * 2 * usual  # of which the root, by its eigenvalues
    values, vectors = np.linalg.eigh(even)
    e = e @ vectors @ np.diag(np.sqrt(values)) @ vectors.T
    centred = c - c.mean(0)
    shrinkage = width / (width + n)
    covariance = centred.T @ centred / n
    covariance = (1 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance))
    inverse = np.linalg.inv(covariance)
    size = n // blocks
    seconds, thirds = np.zeros((blocks, width, D_IN, D_IN)), np.zeros((blocks, width, D_IN, D_IN, D_IN))
    plain, weights = [], []
    for b in range(blocks):
        part = slice(b * size, (b + 1) * size)
        g = (c[part] - c[part].mean(0)) @ inverse * blocks / n
        weights.append(g)
        seconds[b] = np.einsum("ti,tk,tl->ikl", g, e[part], e[part])
        thirds[b] = np.einsum("ti,tk,tl,tm->iklm", g, e[part], e[part], e[part])
        moments = np.einsum("tk,tl->kl", e[part], e[part]) / size, np.einsum("tk,tl,tm->klm", *[e[part]] * 3) / size
        plain.append(moments)
    pairs = [(a, b) for a in range(blocks) for b in range(a + 1, blocks)]
    second = np.mean([(seconds[a] * seconds[b]).sum((1, 2)) for a, b in pairs], 0)
    third = np.mean([(thirds[a] * thirds[b]).sum((1, 2, 3)) for a, b in pairs], 0)
    own = [g.T @ c[b * size : (b + 1) * size] for b, g in enumerate(weights)]  # M_A: what regression lays on each block
    for means, of_blocks in ((second, seconds), (third, thirds)):
        flat = of_blocks.reshape(blocks, width, -1)
        gram = sum(flat[a] @ flat[b].T + flat[b] @ flat[a].T for a, b in pairs) / len(pairs) / 2
        shared = sum(m @ gram @ m.T for m in own) - blocks * np.mean(own, 0) @ gram @ np.mean(own, 0).T
        means += np.diag(shared) / (blocks * (blocks - 1))
    of_all = [np.mean([(plain[a][k] * plain[b][k]).sum() for a, b in pairs]) for k in range(2)]
    spread = e.T @ e / n
    v = np.trace(spread @ spread @ spread) / np.trace(spread @ spread)
    m = math.sqrt(max(of_all[1] / of_all[0], 0) + 4 * v)
    left = []
    for a, b in pairs:
        kernel = (e[a * size : (a + 1) * size] @ e[b * size : (b + 1) * size].T) ** 2
        left.append(kernel.var(ddof=1) - kernel.mean(0).var(ddof=1) - kernel.mean(1).var(ddof=1))
    amounts = sum((weights[a] ** 2).sum(0) * (weights[b] ** 2).sum(0) for a, b in pairs)
    bend = 1.5 * np.sqrt(np.mean(left) * amounts) / len(pairs)
    ratio = np.sqrt((np.maximum(second * third, 0) + (m * bend) ** 2) / (second**2 + bend**2))
    root = second / (second**2 + bend**2) ** 0.25
    rows = np.abs(((centred @ inverse / n).T @ x.numpy() * d).sum(1))
    expected = 2 * root / (m + np.minimum(ratio, m)) / rows
    result = residual_hedging(x, error, codes, W_dec, blocks)
    assert result.latents.numpy() == pytest.approx(expected, rel=1e-3)
    assert float(result.hedging) == pytest.approx(float(result.latents.mean()))
    assert float(result.magnitude) == pytest.approx(m, rel=1e-4)


def test_errors_of_tracked_features_do_not_count():
    x, error, codes, W_dec = one_latent([0.2] * 4, [0.2] * 4, rows=3000)
    missed = error + codes * torch.randn(len(x), 1, generator=torch.Generator().manual_seed(1)).double() @ W_dec
    clean, disturbed = (residual_hedging(x, rows, codes, W_dec) for rows in (error, missed))
    assert float(disturbed.hedging) == pytest.approx(float(clean.hedging), abs=1e-4)


def test_influence_gives_regression_coefficients():
    rng = torch.Generator().manual_seed(0)
    codes = torch.rand(400, 3, generator=rng, dtype=torch.float64) @ torch.rand(3, 3, generator=rng, dtype=torch.float64)
    y = codes @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    parts = [Codes.from_dense(part) for part in codes.split(100)]
    shrunk = torch.cat([*influence(parts, *regression(parts))]).double().t() @ y
    covariance = torch.cov(codes.t(), correction=0)
    between = (1 - 3 / 403) * covariance + 3 / 403 * covariance.diagonal().diag()
    exact = torch.linalg.solve(between, covariance @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    assert shrunk.tolist() == pytest.approx(exact.tolist(), rel=1e-5)


@pytest.mark.parametrize(("joint", "kept"), [(9, True), (9, False), (4, True)])
def test_moments_of_sparse_codes_are_those_of_dense_weights(monkeypatch, joint, kept):
    monkeypatch.setattr(error_spread, "JOINT_LATENTS", joint)  # of 9 latents, as correlated or not
    rng = torch.Generator().manual_seed(0)
    blocks, size = 5, 40
    codes = (torch.rand(blocks * size, 9, generator=rng) * (torch.rand(blocks * size, 9, generator=rng) < 0.3)).split(size)
    errors = torch.randn(blocks * size, 6, generator=rng).split(size)
    parts = [Codes.from_dense(part) for part in codes]
    mean, inverse = regression(parts)
    weights = [(g - g.mean(0)).double() for g in influence(parts, mean, inverse)]
    sizes = [g.square().sum(0) for g in weights]
    monkeypatch.setattr(error_spread, "_FEW", 1000 if kept else 0)
    monkeypatch.setattr(error_spread, "_shared", lambda *_: (0.0, 0.0))  # above, against explicit matrices
    products = error_spread._products(errors)
    (q, t), of_all, _ = error_spread._moments(products, parts, inverse, sizes)
    kernels = [[errors[a].double() @ errors[b].double().t() for b in range(blocks)] for a in range(blocks)]
    slopes = torch.randn(2, 9, generator=rng, dtype=torch.float64)
    for power, found, column, slope in ((2, q, 0, slopes[0]), (3, t, 1, slopes[1])):
        pairs = list(combinations(range(blocks), 2))
        expected = [blocks**2 * ((kernels[a][b] ** power @ weights[b]) * weights[a]).sum(0) for a, b in pairs]
        torch.testing.assert_close(found.double(), torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)
        everywhere = torch.stack([(kernels[a][b] ** power).mean() for a, b in pairs])
        torch.testing.assert_close(of_all[:, column], everywhere, rtol=1e-4, atol=1e-5)
        alone = torch.stack([slope, torch.zeros_like(slope)][:: 1 if power == 2 else -1])
        by_pair = error_spread._by_pair(products, parts, inverse, list(alone))
        torch.testing.assert_close(by_pair, torch.stack(expected) @ slope, rtol=1e-4, atol=1e-5)


def test_inference_mode_and_autocast_change_nothing():
    x, error, codes, W_dec = (part.float() for part in one_latent([0.3, 0.2], [0.05, 0.1], rows=2000))
    expected = residual_hedging(x, error, codes, W_dec)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = residual_hedging(x, error, Codes.from_dense(codes), W_dec)
    assert (found.hedging, found.std) == pytest.approx((float(expected.hedging), float(expected.std)), rel=1e-5)


def test_latents_that_hardly_fire_are_left_out():
    x, error, codes, W_dec = one_latent([0.3], [0.1], rows=2000)
    silent = torch.zeros(len(x), 1, dtype=torch.float64)
    result = residual_hedging(x, error, torch.cat([codes, silent], 1), torch.cat([W_dec, W_dec]))
    assert float(result.measured) == 1
    assert result.latents[1].isnan()
    assert float(result.hedging) == float(result.latents[0])


def test_metric_keeps_the_first_rows_of_batches():
    x, error, codes, W_dec = one_latent([0.3, 0.2], [0.05, 0.1], rows=4000)
    metric = ResidualHedgingMetric(2 * W_dec, rows=3000)
    for part in torch.arange(len(x)).split(700):
        metric.update(x[part], (x - error)[part], Codes.from_dense(codes[part] / 2))
    expected = residual_hedging(x[:3000], error[:3000], codes[:3000], W_dec)
    result = metric.compute()
    assert sum(map(len, metric.x)) == 3000
    assert result.latents.shape == (1,)
    assert float(result.hedging) == pytest.approx(float(expected.hedging), rel=1e-3)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that anything gives, in numbers."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(one.numel() for one in _tensors(result) if not one.is_sparse)])
        return result


def _tensors(result):
    return [one for one in (result if isinstance(result, list | tuple) else [result]) if isinstance(one, torch.Tensor)]


def sparse_case(width, rows, d_in, k):
    rng = torch.Generator().manual_seed(0)
    steps = torch.randint(1, width // k, (rows, k), generator=rng)
    index = (torch.randint(width, (rows, 1), generator=rng) + steps.cumsum(1)) % width
    codes = Codes.from_topk(index, torch.rand(rows, k, generator=rng) + 0.5, width)
    x, error = torch.randn(2, rows, d_in, generator=rng)
    return x, error, codes, torch.randn(width, d_in, generator=rng)


def test_codes_stay_sparse():
    x, error, codes, W_dec = sparse_case(128, 4096, 16, 4)
    metric = ResidualHedgingMetric(W_dec)
    with Largest() as largest:
        residual_hedging(x, error, codes, W_dec)
        metric.update(x, x - error, codes)
        metric.compute()
    assert largest.size <= 4096 * 128 / 8  # weights of a block are a sixteenth


@pytest.mark.slow
def test_memory_of_many_latents():
    """4 096 latents and 20 000 rows, in a process of its own, take less than 2 GB beyond what they are given."""
    program = """
import resource
from tests.metrics.test_residual_hedging import residual_hedging, sparse_case
given = sparse_case(4096, 20000, 512, 32)
residual_hedging(*sparse_case(16, 64, 8, 2))
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
residual_hedging(*given)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""
    root = Path(__file__).parents[2]
    grown = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 2e9


def test_mistakes():
    x, error, codes, W_dec = one_latent([0.3], [0.1], rows=31)
    with pytest.raises(UserError, match="need at least 32"):
        residual_hedging(x, error, codes, W_dec)
    with pytest.raises(UserError, match="blocks: must be at least 4"):
        residual_hedging(x, error, codes, W_dec, blocks=3)
