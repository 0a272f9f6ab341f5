"""OrtSAE's penalty: against the formula written out, its chunks, and what it does to parallel rows."""

import pytest
import torch

from hedgelab.errors import UserError
from hedgelab.kernels import ops
from hedgelab.saes import Initialization, MatryoshkaSAE, TopKSAE
from hedgelab.saes.mitigations import OrthogonalDecoder
from hedgelab.saes.mitigations.orthogonal import largest_cosines

X = torch.randn(24, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make(seed=0, d_sae=30, **arguments):
    init = Initialization(decoder_norm=0.7, seed=seed)
    return TopKSAE(10, d_sae, k=3, init=init, mitigations=[OrthogonalDecoder(**{"every": 1, **arguments})]).double()


def penalty(W_dec, chunks):
    """The definition: mean over rows of the largest squared cosine with another row of the chunk."""
    rows = W_dec / W_dec.norm(dim=1, keepdim=True)
    worst = []
    for latents in chunks:
        for i in latents.tolist():
            worst.append(max((rows[i] @ rows[j]) ** 2 for j in latents.tolist() if j != i))
    return torch.stack(worst).mean()


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("chunk", [7, 100])
@pytest.mark.parametrize("nested", [False, True])
def test_loss_and_gradients_are_the_formula(path, chunk, nested):
    sae = make(coefficient=0.4, chunk=chunk)
    sae.steps_done = 5
    mitigation, plain = sae.mitigations[0], make(coefficient=0.0)
    if nested:
        sae = MatryoshkaSAE(10, TopKSAE(10, 30, k=3, init=sae.init), [8, 30], mitigations=[mitigation]).double()
        plain = MatryoshkaSAE(10, plain, [8, 30])
        sae.steps_done = 5
    with ops.backend(path):
        result = sae.loss(X)
        result.total.backward()
        plain.loss(X).total.backward()
    W_dec = sae.W_dec.detach().clone().requires_grad_()
    order, sizes = mitigation.chunks(sae)
    expected = 0.4 * penalty(W_dec, order.split(sizes))
    expected.backward()
    torch.testing.assert_close(result.terms["orthogonality"], expected.detach())
    torch.testing.assert_close(sae.W_dec.grad - plain.W_dec.grad, W_dec.grad, rtol=1e-9, atol=1e-12)
    assert torch.equal(sae.W_enc.grad, plain.W_enc.grad)
    along = (W_dec.grad * W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-15, rtol=0)  # norms are left alone


def test_chunks_follow_from_seed_and_step():
    def chunks(seed, step, chunk=7):
        sae = make(seed, chunk=chunk)
        torch.rand(step)  # what else was drawn does not matter
        sae.steps_done = step
        order, sizes = sae.mitigations[0].chunks(sae)
        return order.split(sizes)

    first = chunks(0, 3)
    assert sorted(torch.cat(first).tolist()) == list(range(30))
    assert [len(part) for part in first] == [8, 8, 7, 7]
    assert all(torch.equal(a, b) for a, b in zip(first, chunks(0, 3), strict=True))
    assert not torch.equal(first[0], chunks(0, 4)[0])
    assert not torch.equal(first[0], chunks(1, 3)[0])
    assert [len(part) for part in chunks(0, 3, chunk=16)] == [30]


def test_every_few_steps_it_counts_as_often():
    sae, each = make(chunk=100, every=4), make(chunk=100)
    found = []
    with torch.no_grad():
        for sae.steps_done in range(8):
            found.append(float(sae.loss(X).terms.get("orthogonality", 0.0)))
        assert [bool(one) for one in found] == [True, False, False, False] * 2
        assert sum(found) / 8 == pytest.approx(float(each.loss(X).terms["orthogonality"]))


def test_rows_that_point_alike_are_driven_apart():
    """Two features that mostly fire together: a latent for the pair is a shortcut that the penalty forbids."""

    def largest_cosine(*mitigations):
        generator = torch.Generator().manual_seed(1)
        sae = TopKSAE(8, 3, k=2, init=Initialization(seed=0), mitigations=list(mitigations))
        optimizer = torch.optim.Adam(sae.parameters(), lr=2e-2)
        for _ in range(150):
            pair = (torch.rand(128, 1, generator=generator) < 0.3).float()
            x = torch.cat([pair * (torch.rand(128, 2, generator=generator) < 0.9), torch.zeros(128, 6)], dim=1)
            terms = sae.loss(x)
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
            sae.after_step(terms)
        return float(largest_cosines(sae.W_dec.detach()).abs().max())

    assert largest_cosine(OrthogonalDecoder(every=1)) < 0.3 < 0.6 < largest_cosine()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"coefficient": -1.0}, r"model\.mitigations\.coefficient: must not be negative"),
        ({"chunk": 1}, r"model\.mitigations\.chunk: expected a whole number of at least 2"),
        ({"every": 0}, r"model\.mitigations\.every"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(UserError, match=said):
        make(**arguments)


def test_one_latent_has_none_to_compare_with():
    with pytest.raises(UserError, match=r"model\.d_sae: OrthogonalDecoder compares latents, so it needs 2 or more"):
        TopKSAE(4, 1, k=1, mitigations=[OrthogonalDecoder()])
