"""Loss and gradients of every mitigation, on dense and sparse paths, against autograd of the formula written out in float64."""

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.kernels import ops
from hedgelab.saes import BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, TopKSAE, VanillaSAE
from hedgelab.saes.mitigations import LISTA, DetachedInnerLevels, RandomPrefixes, SortedLatents, TiltedLoss

D_IN, D_SAE, ROWS, K, LEVELS = 12, 24, 40, 3, [4, 10, 24]
MAKERS = {
    "topk": lambda **more: TopKSAE(D_IN, D_SAE, K, auxiliary_coefficient=0.0, **more),
    "batch_topk": lambda **more: BatchTopKSAE(D_IN, D_SAE, K, auxiliary_coefficient=0.0, norm_aware_selection=True, **more),
    "jumprelu": lambda **more: JumpReLUSAE(D_IN, D_SAE, 0.1, threshold=0.3, bandwidth=0.2, **more),
    "relu": lambda **more: VanillaSAE(D_IN, D_SAE, 0.1, **more),
}


def drawn(make, seed=0):
    """An SAE in float64 with rough weights, and activations."""
    rng = torch.Generator().manual_seed(seed)
    sae = make().double()
    with torch.no_grad():
        for weight in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
            weight += 0.2 * torch.randn(weight.shape, generator=rng, dtype=torch.float64)
    return sae, torch.randn(ROWS, D_IN, generator=rng, dtype=torch.float64)


def plain_activations(sae, x):
    """Activations ``[batch, d_sae]`` and firing rates, selected by sorting; straight-through for thresholds."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    ranked = (pre * sae.W_dec.norm(dim=1)).detach() if getattr(sae, "norm_aware_selection", False) else pre.detach()
    match sae:
        case TopKSAE():
            least = ranked.sort(dim=1, descending=True).values[:, K - 1 : K]
            return torch.where(ranked >= least, pre.clamp_min(0), 0), None
        case BatchTopKSAE():
            least = ranked.flatten().sort(descending=True).values[K * ROWS - 1]
            return torch.where((ranked >= least) & (pre > 0), pre, 0), None
        case JumpReLUSAE():
            theta, width = sae.thresholds(), sae.bandwidth
            moved = theta - theta.detach()  # 0, with a gradient
            fires = (pre > theta).detach().double()
            near = ((pre - theta).abs() < width / 2).detach().double()
            return pre * fires - near * theta.detach() / width * moved, (fires - near / width * moved).mean(0)
        case VanillaSAE():
            return pre.clamp_min(0), None


def penalties(sae, a, rates):
    """What each latent's activity costs."""
    match sae:
        case JumpReLUSAE():
            return sae.l0_coefficient * rates
        case VanillaSAE():
            return sae.l1_coefficient * a.mean(0) * sae.W_dec.norm(dim=1)
    return torch.zeros(D_SAE, dtype=torch.float64)


def passes(sae, x, eta, steps):
    """Activations after LISTA's passes, in the words of pre-activations."""
    seen = x
    for _ in range(steps):
        a, _ = plain_activations(sae, seen)
        seen = seen + eta * (x - a @ sae.W_dec - sae.b_dec)
    return plain_activations(sae, seen)


def level_losses(sae, a, x, levels, order, detach, tilt):
    """Each level's loss, its latents taken from an order."""
    losses = []
    for number, size in enumerate(levels):
        inner, own = order[: levels[number - 1] if number else 0], order[levels[number - 1] if number else 0 : size]
        before = a[:, inner] @ sae.W_dec[inner] + sae.b_dec
        if detach and number and size != levels[-1]:
            before = before.detach()
        squares = (before + a[:, own] @ sae.W_dec[own] - x).square().sum(1)
        weight = torch.softmax(tilt * squares / squares.mean(), 0).detach()
        losses.append((weight * squares).sum())
    return losses


def compare(sae, loss, wanted):
    """The largest error of loss and gradients, relative to the largest gradient of a tensor."""
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(wanted, parameters)
    errors = {"loss": float((loss - wanted).detach().abs() / wanted.detach().abs())}
    for name, one, other in zip(names, found, expected, strict=True):
        assert other.abs().max() > 1e-3, name
        errors[name] = float((one - other).abs().max() / other.abs().max())
    assert max(errors.values()) < 1e-10, errors


@pytest.fixture(params=["dense", "sparse"], autouse=True)
def path(request):
    with ops.backend(request.param):
        yield request.param


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", MAKERS)
def test_lista(name, steps):
    sae, x = drawn(lambda: MAKERS[name](mitigations=[LISTA(eta=0.3, steps=steps)]))
    a, rates = passes(sae, x, 0.3, steps)
    result = sae.loss(x)
    torch.testing.assert_close(result.codes.to_dense(), a)
    squares = (a @ sae.W_dec + sae.b_dec - x).square().sum(1)
    compare(sae, result.total, squares.mean() + penalties(sae, a, rates).sum())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("tilt", [2e-3, 1.0])
def test_tilted_loss(name, tilt):
    sae, x = drawn(lambda: MAKERS[name](mitigations=[TiltedLoss(tilt)]))
    a, rates = plain_activations(sae, x)
    (wanted,) = level_losses(sae, a, x, [D_SAE], torch.arange(D_SAE), False, tilt)
    compare(sae, sae.loss(x).total, wanted + penalties(sae, a, rates).sum())


MIXES = {
    "detached": [DetachedInnerLevels],
    "sorted": [SortedLatents],
    "tilted": [TiltedLoss],
    "prefixes": [RandomPrefixes],
    "all": [LISTA, DetachedInnerLevels, SortedLatents, TiltedLoss, RandomPrefixes],
    "lista-matryoshka": [LISTA, DetachedInnerLevels, SortedLatents, TiltedLoss],
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("mix", MIXES)
def test_levels(name, mix):
    kinds = MIXES[mix]
    made = [kind() for kind in kinds]
    sae, x = drawn(lambda: MatryoshkaSAE(D_IN, MAKERS[name](), LEVELS, beta=0.5, mitigations=made))
    order, levels = torch.arange(D_SAE), LEVELS
    if SortedLatents in kinds:
        rates = made[kinds.index(SortedLatents)].rates
        rates.copy_(torch.rand(D_SAE, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
        order = torch.tensor(sorted(range(D_SAE), key=lambda i: -float(rates[i])))
        assert torch.equal(sae.latent_order(), order)
    sae.steps_done = 7
    if RandomPrefixes in kinds:
        levels = made[kinds.index(RandomPrefixes)].sizes(7, 3, D_SAE)
        assert levels != LEVELS
    detach = DetachedInnerLevels in kinds
    a, rates = passes(sae.inner, x, 0.3, LISTA in kinds)
    losses = level_losses(sae, a, x, levels, order, detach, 2e-3 if TiltedLoss in kinds else 0.0)
    paid = penalties(sae.inner, a, rates)[order]
    starts = [0, *levels[:-2], 0] if detach else [0, 0, 0]
    wanted = sum(
        w * (loss + paid[first:stop].sum())
        for w, loss, first, stop in zip([0.25, 0.5, 1.0], losses, starts, levels, strict=True)
    )
    result = sae.loss(x)
    torch.testing.assert_close(result.codes.to_dense(), a)
    compare(sae, result.total, wanted)


def test_weighted_examples_are_weighed_in_every_mitigation():
    kinds = MIXES["lista-matryoshka"]
    sae, x = drawn(lambda: MatryoshkaSAE(D_IN, MAKERS["topk"](), LEVELS, mitigations=[kind() for kind in kinds]))
    counts = torch.randint(1, 5, (ROWS,), generator=torch.Generator().manual_seed(2))
    weight = counts.double() / counts.sum()
    repeated = x.repeat_interleave(counts, 0)
    weighted, many = sae.loss(Batch(x, None, weight)), sae.loss(repeated)
    compare(sae, weighted.total, many.total)
    sae.after_step(many)
    many_rates = sae.mitigations[2].rates.clone()
    sae.mitigations[2].rates.zero_()
    sae.loss(Batch(x, None, weight))
    sae.after_step(weighted)
    torch.testing.assert_close(sae.mitigations[2].rates, many_rates, rtol=1e-12, atol=0)
