"""Own-row credit: its gradient against autograd of a surrogate that splits every row, and what it does to hedging."""

import functools

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.kernels import ops
from hedgelab.saes import BatchTopKSAE, Initialization, MatryoshkaSAE, TopKSAE, VanillaSAE
from hedgelab.saes.mitigations import DetachedInnerLevels, OwnRowCredit, SortedLatents, TiltedLoss

D_IN, LEVELS, ROWS = 9, [4, 11, 30], 23


def make(*mitigations, **arguments):
    """More latents than dimensions, at a generic point."""
    inner = BatchTopKSAE(D_IN, LEVELS[-1], k=5, init=Initialization(decoder_norm=0.7, encoder="random", seed=1))
    sae = MatryoshkaSAE(D_IN, inner, LEVELS, mitigations=list(mitigations), **arguments).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae


def batch(weighted=False):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, D_IN, generator=generator, dtype=torch.float64)
    weight = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    return Batch(x, None, weight / weight.sum() if weighted else None)


def surrogate(sae, given, codes, W_dec, share, tilt=0.0, detach=False):
    """A loss whose autograd is the definition: rows learn along themselves from their level, off themselves from both.

    The loss of each level sees rows whose part off their own direction is detached; a linear term gives that part its gradient.
    """
    a, b_dec = codes.to_dense().detach(), sae.b_dec.detach()
    own = (W_dec / W_dec.norm(dim=1, keepdim=True)).detach()
    along = (W_dec * own).sum(1, keepdim=True) * own
    off = W_dec - along
    seen = along + off.detach()
    last = (a @ W_dec + b_dec - given.x).detach()
    even = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64) if given.weight is None else given.weight
    total, start = 0.0, 0
    for number, (weight, size) in enumerate(zip(sae.level_weights, LEVELS, strict=True)):
        learns = torch.zeros(LEVELS[-1], 1, dtype=torch.float64)
        learns[0 if not detach or (detach == "all_but_last" and size == LEVELS[-1]) else start : size] = 1
        error = a[:, :size] @ (learns * seen + (1 - learns) * seen.detach())[:size] + b_dec - given.x
        squares = error.square().sum(1)
        mean = even
        if tilt:
            mean = even * torch.exp(tilt * squares / (even @ squares)).detach()
            mean = mean / mean.sum()
        taught = (1 - share) * error.detach() + share * last if number < len(LEVELS) - 1 else error.detach()
        linear = 2 * (taught * (a[:, :size] @ (learns * off)[:size])).sum(1)
        total = total + weight * (mean @ (squares + linear))
        start = size
    return total


CASES = {
    "plain": ({}, []),
    "weights": ({"beta": 0.4}, []),
    "outward": ({"beta": 2.0}, []),
    "detached": ({"detached": True}, []),
    "all_but_last": ({}, [DetachedInnerLevels]),
    "tilted": ({"beta": 0.7}, [functools.partial(TiltedLoss, tilt=0.5)]),
}


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_decoder_learns_as_defined_and_nothing_else_changes(case, weighted, path):
    arguments, others = CASES[case]
    sae = make(OwnRowCredit(share=0.7), *(other() for other in others), **arguments)
    plain = make(*(other() for other in others), **arguments)
    given = batch(weighted)
    with ops.backend(path):
        result = sae.loss(given)
        result.total.backward()
        expected = plain.loss(given)
        expected.total.backward()
    assert torch.equal(result.total, expected.total)
    assert result.terms["own_row_credit"] == 0
    for name in ("W_enc", "b_enc", "b_dec"):
        torch.testing.assert_close(getattr(sae, name).grad, getattr(plain, name).grad, rtol=1e-12, atol=1e-14)
    how = {"detached": True, "all_but_last": "all_but_last"}.get(case, False)
    for share, found in ((0.7, sae), (0.0, plain)):
        W_dec = sae.W_dec.detach().clone().requires_grad_()
        surrogate(sae, given, result.codes, W_dec, share, tilt=0.5 if case == "tilted" else 0.0, detach=how).backward()
        torch.testing.assert_close(found.W_dec.grad, W_dec.grad, rtol=1e-10, atol=1e-12)
    assert (sae.W_dec.grad - plain.W_dec.grad).abs().max() > 1e-3


def test_of_one_latent_by_hand():
    """x = (1, 1), level 1 writes (1, 0), level 2 adds (0, 1): off its row, latent 0 has nothing left to learn."""
    sae = MatryoshkaSAE(2, TopKSAE(2, 2, k=2), [1, 2], mitigations=[OwnRowCredit()]).double()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    x = torch.ones(1, 2, dtype=torch.float64)
    sae.loss(x).total.backward()
    assert sae.W_dec.grad.tolist() == [[0, 0], [0, 0]]
    plain = MatryoshkaSAE(2, sae.inner, [1, 2])
    sae.zero_grad()
    plain.loss(x).total.backward()
    assert sae.W_dec.grad.tolist() == [[0, -2], [0, 0]]  # plain matryoshka: the row hedges


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_sorted_latents_get_the_credit_of_their_level(path):
    """Renumbering latents by hand, or by the mitigation, gives the same gradients."""
    given, place = batch(), torch.randperm(LEVELS[-1], generator=torch.Generator().manual_seed(5))
    sae = make(SortedLatents(), OwnRowCredit())
    sorting = sae.mitigations[0]
    sorting.rates.copy_(torch.linspace(1, 0.5, LEVELS[-1])[place.argsort()])
    order = sae.latent_order()
    by_hand = make(OwnRowCredit())
    with torch.no_grad():
        by_hand.W_dec.copy_(sae.W_dec[order])
        by_hand.inner.W_enc_rows.copy_(sae.inner.W_enc_rows[order])
        by_hand.b_enc.copy_(sae.b_enc[order])
        by_hand.b_dec.copy_(sae.b_dec)
    assert not torch.equal(order, torch.arange(LEVELS[-1]))
    with ops.backend(path):
        for one in (sae, by_hand):
            one.loss(given).total.backward()
    torch.testing.assert_close(sae.W_dec.grad[order], by_hand.W_dec.grad, rtol=1e-10, atol=1e-12)


def test_the_parents_row_hedges_less_than_in_a_plain_matryoshka_sae():
    """A parent, whose latent is level 1 alone, and a child on half of its firings, exactly: the population."""
    toy = ToyDataModule(ConditionalFiring([0.25, {"f0": 0.5, "otherwise": 0}]), d_in=3, sampling="population")
    population, directions = toy.batch("train", 0), toy.feature_directions

    def childs_part(*mitigations):
        inner = VanillaSAE(3, 2, l1_coefficient=1e-2, init=Initialization(at_features=True))
        sae = MatryoshkaSAE(3, inner, [1, 2], mitigations=list(mitigations))
        sae.initialize(population, directions)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for _ in range(300):
            terms = sae.loss(population)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            sae.after_step(terms)
        return float(torch.nn.functional.normalize(sae.W_dec.detach()[0], dim=0) @ directions[1])

    assert abs(childs_part(OwnRowCredit())) < 0.15 < 0.3 < childs_part()


def test_it_starts_when_told():
    sae, given = make(OwnRowCredit(start=3)), batch()
    for sae.steps_done in (0, 2):
        assert "own_row_credit" not in sae.loss(given).terms
    sae.steps_done = 3
    assert "own_row_credit" in sae.loss(given).terms


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: OwnRowCredit(share=1.5), r"model\.mitigations\.share: must lie between 0 and 1"),
        (lambda: OwnRowCredit(start=-1), r"model\.mitigations\.start: expected a whole number"),
        (lambda: make(OwnRowCredit(), credit=0.5), r"model\.credit: cannot be used together with OwnRowCredit"),
        (lambda: TopKSAE(4, 8, k=2, mitigations=[OwnRowCredit()]), r"model\.mitigations: OwnRowCredit needs levels"),
    ],
)
def test_mistakes(make_it, said):
    with pytest.raises(UserError, match=said):
        make_it()
