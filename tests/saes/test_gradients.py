"""Losses and gradients of every SAE against SPEC's formulas, written out densely in float64."""

import functools
import math

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.kernels import ops
from hedgelab.saes import AbsTopKSAE, BatchTopKSAE, Initialization, JumpReLUSAE, MatryoshkaSAE, TopKSAE, VanillaSAE

D_IN, D_SAE, K, BATCH = 12, 40, 3, 17
LEVELS = [5, 16, 40]
INIT = Initialization(decoder_norm=0.7, encoder="random", seed=1)


def perturbed(sae):
    """Float64 weights at a generic point: no zeros, no unit norms, no ties."""
    rng = torch.Generator().manual_seed(7)
    sae = sae.double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return sae


def activations(weighted: bool) -> Batch:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, D_IN, generator=rng, dtype=torch.float64)
    weight = torch.rand(BATCH, generator=rng, dtype=torch.float64)
    return Batch(x, weight=weight / weight.sum() if weighted else None)


def weights(sae):
    """Leaf copies of (W_enc, b_enc, W_dec, b_dec), plus theta where there is one."""
    flat = getattr(sae, "inner", sae)
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + (["theta"] if hasattr(flat, "theta") else [])
    return {name: getattr(flat, name).detach().clone().contiguous().requires_grad_() for name in names}


def mean(values, batch):
    return values.mean() if batch.weight is None else (batch.weight * values).sum()


def keep_top(ranked, count):
    mask = torch.zeros_like(ranked, dtype=torch.bool)
    mask.view(-1)[ranked.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return mask


def dense_activation(sae, w, batch):
    """Activations and per-latent penalties of the SAE (the inner one of a matryoshka), straight from SPEC section 2."""
    pre = (batch.x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].norm(dim=1)
    ranked = (pre * norms if getattr(sae, "norm_aware_selection", False) else pre).detach()
    if isinstance(sae, VanillaSAE):
        a = pre.relu()
        cost = a if batch.weight is None else a * batch.weight[:, None] * BATCH
        return a, sae.l1_coefficient * cost.mean(0) * norms
    if isinstance(sae, TopKSAE):
        mask = torch.stack([keep_top(row, sae.k) for row in ranked])
        return pre.relu() * mask, None
    if isinstance(sae, AbsTopKSAE):
        return pre * torch.stack([keep_top(row.abs(), sae.k) for row in ranked]), None
    if isinstance(sae, BatchTopKSAE):
        return pre.relu() * keep_top(ranked.relu(), sae.k * BATCH), None
    theta = w["theta"]
    fires = (pre > theta).double()
    near = ((pre - theta).abs() < sae.bandwidth / 2).double().detach()
    # Straight-through estimates as surrogates: the value of the first part, the gradient of the second.
    jump = -(theta.detach() / sae.bandwidth) * near * (theta - theta.detach())
    a = pre * fires.detach() + jump
    step = fires.detach() - near / sae.bandwidth * (theta - theta.detach())
    cost = step if batch.weight is None else step * batch.weight[:, None] * BATCH
    return a, sae.l0_coefficient * cost.mean(0)


def dense_auxiliary(sae, w, batch, x_hat, latents):
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[latents] = sae.dead_latents[latents]
    count, k_aux = int(dead.sum()), D_IN // 2
    pre = (batch.x - w["b_dec"].detach()) @ w["W_enc"] + w["b_enc"]
    signed = isinstance(sae, AbsTopKSAE)
    hidden = (pre.abs() if signed else pre).masked_fill(~dead, -torch.inf)
    mask = torch.stack([keep_top(row, min(k_aux, count)) for row in hidden.detach()])
    guess = torch.where(mask, pre if signed else pre.relu(), 0.0) @ w["W_dec"]
    residual = (batch.x - x_hat).detach()
    return min(1, count / k_aux) * mean((guess - residual).square().sum(1), batch)


def dense_loss(sae, w, batch):
    flat = getattr(sae, "inner", sae)
    a, penalty = dense_activation(flat, w, batch)
    dead = bool(flat.dead_latents.any())
    if flat is sae:
        x_hat = a @ w["W_dec"] + w["b_dec"]
        total = mean((batch.x - x_hat).square().sum(1), batch)
        total = total + (0 if penalty is None else penalty.sum())
        return total + (dense_auxiliary(sae, w, batch, x_hat, slice(0, D_SAE)) if dead else 0)
    total, start, running, count = 0, 0, w["b_dec"], len(sae.levels)
    for level, stop in enumerate(sae.levels):
        delta = a[:, start:stop] @ w["W_dec"][start:stop]
        running = (running.detach() if sae.detached and level else running) + delta
        weight = sae.beta ** (count - 1 - level) / (count if sae.beta > 1 else 1)
        cost = 0 if penalty is None else penalty[start if sae.detached else 0 : stop].sum()
        total = total + weight * (mean((batch.x - running).square().sum(1), batch) + cost)
        if dead and sae.auxiliary_per_level:
            total = total + dense_auxiliary(flat, w, batch, running, slice(start, stop))
        start = stop
    if dead and not sae.auxiliary_per_level:
        total = total + dense_auxiliary(flat, w, batch, running, slice(0, D_SAE))
    return total


FLAT = {
    "vanilla": functools.partial(VanillaSAE, d_sae=D_SAE, l1_coefficient=0.3, init=INIT),
    "topk": functools.partial(TopKSAE, d_sae=D_SAE, k=K, init=INIT),
    "topk_norm_aware": functools.partial(TopKSAE, d_sae=D_SAE, k=K, norm_aware_selection=True, init=INIT),
    "abs_topk": functools.partial(AbsTopKSAE, d_sae=D_SAE, k=K, init=INIT),
    "abs_topk_norm_aware": functools.partial(AbsTopKSAE, d_sae=D_SAE, k=K, norm_aware_selection=True, init=INIT),
    "batch_topk": functools.partial(BatchTopKSAE, d_sae=D_SAE, k=K, init=INIT),
    "batch_topk_norm_aware": functools.partial(BatchTopKSAE, d_sae=D_SAE, k=K, norm_aware_selection=True, init=INIT),
    "jumprelu": functools.partial(JumpReLUSAE, d_sae=D_SAE, l0_coefficient=0.2, threshold=0.4, bandwidth=0.3, init=INIT),
}
WEIGHTINGS = {
    "plain": {},
    "balanced": {"beta": 0.3},
    "ordinary": {"beta": 0.0},
    "outward": {"beta": 2.0},
    "detached": {"detached": True},
    "per_level_auxiliary": {"beta": 0.5, "auxiliary_per_level": True},
    "detached_per_level": {"detached": True, "auxiliary_per_level": True},
}
CASES = [(name, None) for name in FLAT] + [(name, weighting) for name in FLAT for weighting in WEIGHTINGS]


def build(name, weighting):
    make = FLAT[name]
    return perturbed(make(D_IN) if weighting is None else MatryoshkaSAE(D_IN, make, LEVELS, **WEIGHTINGS[weighting]))


def kill_some_latents(sae):
    flat = getattr(sae, "inner", sae)
    flat.steps_since_fired[torch.tensor([1, 7, 20, 21, 35])] = flat.dead_after_steps
    sae.steps_done = flat.dead_after_steps


def check(sae, batch):
    w = weights(sae)
    expected = dense_loss(sae, w, batch)
    expected.backward()
    result = sae.loss(batch)
    result.total.backward()
    torch.testing.assert_close(result.total, expected, rtol=1e-10, atol=1e-12)
    flat = getattr(sae, "inner", sae)
    for parameter, value in w.items():
        gradient = getattr(flat, parameter).grad
        assert value.grad.abs().max() > 1e-6, f"{parameter} has no gradient to compare"
        torch.testing.assert_close(gradient, value.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize(("name", "weighting"), CASES)
def test_loss_and_gradients_equal_the_formula(name, weighting, path):
    with ops.backend(path):
        check(build(name, weighting), activations(weighted=False))


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize(("name", "weighting"), [case for case in CASES if "topk" in case[0]])
def test_auxiliary_loss_equals_the_formula(name, weighting, path):
    sae = build(name, weighting)
    kill_some_latents(sae)
    with ops.backend(path):
        assert any(term.startswith("auxiliary") for term in sae.loss(activations(False)).terms)
        check(sae, activations(weighted=False))


@pytest.mark.parametrize("name", ["vanilla", "topk", "jumprelu"])
@pytest.mark.parametrize("weighting", [None, "balanced", "detached"])
def test_weighted_batches_average_by_probability(name, weighting):
    check(build(name, weighting), activations(weighted=True))


@pytest.mark.parametrize("name", FLAT)
def test_equal_weights_change_nothing(name):
    sae, batch = build(name, None), activations(weighted=False)
    uniform = batch._replace(weight=torch.full((BATCH,), 1 / BATCH, dtype=torch.float64))
    torch.testing.assert_close(sae.loss(uniform).total, sae.loss(batch).total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FLAT)
def test_one_level_is_the_inner_sae(name):
    flat, nested = build(name, None), perturbed(MatryoshkaSAE(D_IN, FLAT[name], [D_SAE]))
    batch = activations(weighted=False)
    torch.testing.assert_close(nested.loss(batch).total, flat.loss(batch).total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FLAT)
def test_measuring_the_loss_changes_nothing(name):
    sae, batch = build(name, "plain"), activations(weighted=False)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    first, second = sae.loss(batch).total, sae.loss(batch).total
    assert first == second
    assert all(torch.equal(before[key], value) or math.isnan(value) for key, value in sae.state_dict().items())


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("weighting", [None, "balanced"])
def test_bf16_stays_near_full_precision(name, weighting):
    sae, batch = build(name, weighting).float(), Batch(activations(weighted=False).x.float())
    full = sae.loss(batch).total
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sae.loss(batch).total
    mixed.backward()
    assert mixed.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in sae.parameters())
    torch.testing.assert_close(mixed, full, rtol=0.05, atol=0.0)
    half = sae.to(torch.bfloat16).loss(Batch(batch.x.bfloat16())).total
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.0)
