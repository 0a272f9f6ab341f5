"""Credit and adaptive weights of matryoshka levels: against formulas written out, and on a hierarchy."""

import functools
import json

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.kernels import ops
from hedgelab.kernels.codes import Codes
from hedgelab.saes import BatchTopKSAE, MatryoshkaSAE, VanillaSAE, load_sae, save_sae
from hedgelab.saes.balance import asymmetry, outside_span

D_IN, LEVELS = 6, [2, 4, 9]


def make(l1=0.1, **arguments):
    torch.manual_seed(0)
    inner = functools.partial(VanillaSAE, d_sae=LEVELS[-1], l1_coefficient=l1)
    return MatryoshkaSAE(D_IN, lambda d_in: inner(d_in), LEVELS, **arguments).double()


def batch(weighted):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, D_IN, generator=generator, dtype=torch.float64)
    weight = torch.rand(32, generator=generator, dtype=torch.float64)
    return Batch(x, None, weight / weight.sum() if weighted else None)


def dense_loss(sae, given, credit):
    """SPEC's loss with credit, written out: projector from the pseudoinverse, everything dense."""
    weight = torch.full((32,), 1 / 32, dtype=torch.float64) if given.weight is None else given.weight
    a = torch.relu((given.x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    last = a @ sae.W_dec + sae.b_dec
    paid = 0.1 * (weight @ a) * sae.W_dec.norm(dim=1)
    loss = 0
    for level_weight, size in zip(sae.level_weights, LEVELS, strict=True):
        x_hat, rows = a[:, :size] @ sae.W_dec[:size] + sae.b_dec, sae.W_dec[:size].detach()
        outside = torch.eye(D_IN, dtype=torch.float64) - torch.linalg.pinv(rows) @ rows
        target = given.x - credit * (last - x_hat).detach() @ outside
        loss = loss + level_weight * (weight @ (x_hat - target).square().sum(1) + paid[:size].sum())
    return loss


@pytest.mark.parametrize("weighted", [False, True])
def test_credit_is_the_formula(weighted):
    sae, given = make(beta=0.5, credit=0.7), batch(weighted)
    own = sae.loss(given).total
    expected = dense_loss(sae, given, 0.7)
    torch.testing.assert_close(own, expected)
    plain = make(beta=0.5).loss(given).total
    assert (own - plain).abs() > 1e-3
    for a, b in zip(
        torch.autograd.grad(own, list(sae.parameters())), torch.autograd.grad(expected, list(sae.parameters())), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_credit_starts_late(tmp_path):
    late, given = make(beta=0.5, credit=0.7, credit_start=3), batch(weighted=False)
    for steps, credit in ((0, 0.0), (2, 0.0), (3, 0.7), (10, 0.7)):
        late.steps_done = steps
        torch.testing.assert_close(late.loss(given).total, dense_loss(late, given, credit))
    save_sae(late, tmp_path)
    assert load_sae(tmp_path).credit_start == 3
    written = json.loads((tmp_path / "sae.json").read_text())
    del written["credit_start"]  # as it was before the key
    (tmp_path / "sae.json").write_text(json.dumps(written))
    assert load_sae(tmp_path).credit_start == 0


def test_sparse_and_dense_kernels_agree_on_credit():
    torch.manual_seed(0)
    sae = MatryoshkaSAE(40, lambda d_in: BatchTopKSAE(d_in, 600, 8), [8, 32, 100, 600], credit=1.0)
    x, found = torch.randn(64, 40), []
    for name in ("dense", "sparse"):
        sae.zero_grad()
        with ops.backend(name):
            loss = sae.loss(Batch(x)).total
            loss.backward()
        found.append((loss.detach(), sae.W_dec.grad.clone(), sae.W_enc.grad.clone(), sae.b_dec.grad.clone()))
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(dense, sparse, atol=1e-5, rtol=1e-4)


def test_outside_span():
    rows, vectors = torch.randn(3, 7), torch.randn(5, 7)
    rest = outside_span(vectors, rows)
    torch.testing.assert_close(rest @ rows.T, torch.zeros(5, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(outside_span(rest, rows), rest)
    assert outside_span(vectors, torch.randn(7, 7)).count_nonzero() == 0


def test_asymmetry_does_not_depend_on_signs():
    dense = torch.randn(50, 9, generator=torch.Generator().manual_seed(3)).relu()
    flipped = dense * torch.tensor([-1.0, 1.0]).repeat(5)[:9]
    for codes in (Codes.from_dense(flipped), Codes.from_csr(*Codes.from_dense(flipped).csr(), 9)):
        torch.testing.assert_close(asymmetry(codes, 4), asymmetry(Codes.from_dense(dense), 4))


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_asymmetry_is_a_covariance_within_the_active(layout):
    generator = torch.Generator().manual_seed(3)
    dense = (torch.randn(50, 9, generator=generator, dtype=torch.float64)).relu()
    dense[:, 3] = 0.0
    weight = torch.rand(50, generator=generator, dtype=torch.float64)
    codes = Codes.from_dense(dense)
    if layout == "sparse":
        codes = Codes.from_csr(*codes.csr(), 9)
    expected = 0.0
    outer = (dense[:, 4:] > 0).sum(1).double()
    for i in range(4):
        on = dense[:, i] > 0
        if on.any():
            p, a, n = weight[on], dense[on, i], outer[on]
            mean = lambda values, p=p: float(p @ values / p.sum())  # noqa: E731
            expected += float(p.sum()) * (mean(a * n) - mean(a) * mean(n)) / mean(a)
    assert float(asymmetry(codes, 4, weight)) == pytest.approx(expected)
    equal = torch.full_like(weight, 1 / 50)
    torch.testing.assert_close(asymmetry(codes, 4), asymmetry(codes, 4, equal))


def test_adaptive_weights_follow_the_asymmetry(tmp_path):
    sae, given = make(beta=0.5, adaptive=True), batch(True)
    result = sae.loss(given)
    torch.testing.assert_close(result.total, make(beta=0.5).loss(given).total)
    result.total.backward()
    expected = [asymmetry(result.codes, size, given.weight) for size in (2, 4)]
    torch.testing.assert_close(sae.log_factors.grad, torch.stack(expected))
    with torch.no_grad():
        sae.log_factors.copy_(torch.tensor([1.0, -1.0]))
    assert [float(w) for w in sae.current_weights()] == pytest.approx([0.25 * 2.718282, 0.5 / 2.718282, 1.0], rel=1e-5)
    save_sae(sae, tmp_path)
    assert torch.equal(load_sae(tmp_path).log_factors, sae.log_factors.float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"credit": 1.5}, "model.credit: must lie between 0 and 1"),
        ({"credit": 0.5, "detached": True}, "model.credit: has no meaning"),
        ({"credit": 0.5, "credit_start": -1}, "model.credit_start: expected a whole number"),
        ({"adaptive": True, "beta": 0.0}, "model.adaptive: needs a beta above 0"),
        ({"adaptive": True, "detached": True}, "model.adaptive"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        make(**arguments)
