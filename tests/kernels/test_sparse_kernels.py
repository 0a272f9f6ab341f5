"""The sparse CPU path against dense autograd: same codes, same reconstructions, same gradients."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hedgelab.kernels import ops, reference, sparse
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, JumpReLU, ReLU, Target, Threshold, TopK


class Weights:
    """Leaf parameters of an SAE, the encoder laid out like its transpose."""

    def __init__(self, d_in: int, d_sae: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.W_enc = draw(d_sae, d_in).t().requires_grad_()
        self.b_enc = (0.1 * draw(d_sae)).requires_grad_()
        self.W_dec = draw(d_sae, d_in).requires_grad_()
        self.b_dec = draw(d_in).requires_grad_()
        self.threshold = (0.3 * draw(d_sae)).exp().requires_grad_()

    def encoder(self, scaled: bool = False) -> Encoder:
        return Encoder(self.W_enc, self.b_enc, self.b_dec, self.W_dec.detach().norm(dim=1) if scaled else None)

    def decoder(self) -> Decoder:
        return Decoder(self.W_dec, self.b_dec)

    def gradients(self) -> list[Tensor]:
        leaves = (self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold)
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


Encode = Callable[..., Codes]

ENCODERS: dict[str, Encode] = {
    "relu": lambda m, x, w, k: m.encode(x, w.encoder(), ReLU()),
    "topk": lambda m, x, w, k: m.encode(x, w.encoder(), TopK(k)),
    "topk_norm_aware": lambda m, x, w, k: m.encode(x, w.encoder(scaled=True), TopK(k)),
    "signed_topk": lambda m, x, w, k: m.encode(x, w.encoder(), TopK(k, signed=True)),
    "signed_topk_norm_aware": lambda m, x, w, k: m.encode(x, w.encoder(scaled=True), TopK(k, signed=True)),
    "signed_columns": lambda m, x, w, k: m.encode(x, w.encoder(), TopK(k, torch.arange(w.W_enc.shape[1])[-k:], True)),
    "batch_topk": lambda m, x, w, k: m.encode(x, w.encoder(), BatchTopK(k)),
    "batch_topk_norm_aware": lambda m, x, w, k: m.encode(x, w.encoder(scaled=True), BatchTopK(k)),
    "columns": lambda m, x, w, k: m.encode(x, w.encoder(), TopK(k, torch.arange(w.W_enc.shape[1])[-k:])),
    "threshold": lambda m, x, w, k: m.encode(x, w.encoder(), Threshold(w.threshold.detach())),
    "negative_threshold": lambda m, x, w, k: m.encode(x, w.encoder(), Threshold(torch.tensor(-0.5))),
    "jumprelu": lambda m, x, w, k: m.encode(x, w.encoder(), JumpReLU(w.threshold, 0.5)),
}


def run(m, name: str, x: Tensor, w: Weights, k: int, levels: list[int], detach: bool = False) -> list[Tensor]:
    """Everything a step produces on a path: activations, reconstructions, gradients of the weights and of ``x``."""
    x = x.detach().clone().requires_grad_()
    codes = ENCODERS[name](m, x, w, k)
    losses, errors = m.level_errors(codes, w.decoder(), Target(x.detach(), levels, detach))
    loss = sum((i + 1) * value for i, value in enumerate(losses)) * len(x)
    if len(levels) == 1:
        loss = loss + m.decode(codes, w.decoder()).sin().sum()
    loss = loss + codes.sum_per_latent().dot(w.W_dec.norm(dim=1))
    if codes.rates is not None:
        loss = loss + (codes.rates * torch.arange(len(codes.rates))).sum()
    loss.backward()
    return [codes.to_dense().detach(), *errors, *w.gradients(), x.grad]


def assert_same(name: str, batch: int, d_in: int, d_sae: int, k: int, levels: list[int], **options) -> None:
    dtype = options.pop("dtype", torch.float64)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    x = torch.randn(batch, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense = run(reference, name, x, Weights(d_in, d_sae, dtype), k, levels, **options)
    fast = run(sparse, name, x, Weights(d_in, d_sae, dtype), k, levels, **options)
    for expected, actual in zip(dense, fast, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        assert (actual - expected).norm() <= tolerance * expected.norm() + 1e-30


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("levels", [[203], [3, 50, 203]])
@pytest.mark.parametrize("name", ENCODERS)
def test_equals_dense_autograd(name, levels, detach):
    assert_same(name, 37, 12, 203, 5, levels, detach=detach)


@pytest.mark.parametrize("name", ENCODERS)
def test_several_tiles_in_single_precision(name):
    assert_same(name, 1100, 16, 520, 4, [520], dtype=torch.float32)


@given(
    name=st.sampled_from(sorted(ENCODERS)),
    batch=st.integers(0, 40),
    d_in=st.integers(1, 9),
    d_sae=st.integers(1, 150),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(name, batch, d_in, d_sae, data):
    if batch == 0 and name == "jumprelu":
        batch = 1  # a mean over no examples is NaN on every path
    k = data.draw(st.integers(1, d_sae), label="k")
    inner = data.draw(st.sets(st.integers(1, d_sae), max_size=3), label="levels")
    assert_same(name, batch, d_in, d_sae, k, sorted({*inner, d_sae}))


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
@pytest.mark.parametrize("k", [1, 64])
def test_k_one_and_k_all(name, k):
    assert_same(name, 20, 6, 64, k, [64])


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_tied_pre_activations_keep_as_many_and_as_large(name):
    """Integer weights make masses of ties: the kept set is ambiguous, its values are not."""
    x = torch.randint(-2, 3, (600, 3), generator=torch.Generator().manual_seed(0)).double()
    w = Weights(3, 520)
    with torch.no_grad():
        w.W_enc.copy_(w.W_enc.round())
        w.b_enc.zero_()
        w.b_dec.zero_()
    kept = [ENCODERS[name](m, x, w, 6).to_dense().detach() for m in (reference, sparse)]
    if name == "topk":
        kept = [activations.sort(dim=1).values for activations in kept]
    assert torch.equal(*(activations.flatten().sort().values for activations in kept))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("m", [reference, sparse], ids=["dense", "sparse"])
def test_signed_topk_keeps_the_largest_by_size_with_their_sign_and_gradient(m, scaled):
    """Against a plain formula; d_sae is large enough for the sparse path to look at groups."""
    x = torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    w, own = Weights(8, 1001), Weights(8, 1001)
    codes = m.encode(x, w.encoder(scaled), TopK(7, signed=True))
    pre = (x - own.b_dec) @ own.W_enc + own.b_enc
    size = pre.abs() * own.W_dec.norm(dim=1) if scaled else pre.abs()
    kept = size >= size.sort(dim=1, descending=True).values[:, 6:7]
    plain = pre * kept
    torch.testing.assert_close(codes.to_dense(), plain, rtol=1e-12, atol=1e-12)
    assert codes.active_per_example().tolist() == [7] * 60
    assert 0.3 < float((codes.csr()[2] < 0).double().mean()) < 0.7
    codes.to_dense().sin().sum().backward()
    plain.sin().sum().backward()
    for found, expected in zip(w.gradients()[:2], own.gradients()[:2], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_ties_of_a_batch_go_to_the_lowest_row_then_latent():
    x = torch.ones(3, 1, dtype=torch.float64)
    W_enc = torch.tensor([[1.0, 3.0, 1.0, 1.0]], dtype=torch.float64)
    codes = sparse.encode(x, Encoder(W_enc, torch.zeros(4).double(), torch.zeros(1).double()), BatchTopK(2))
    assert codes.to_dense().tolist() == [[1, 3, 1, 1], [0, 3, 0, 0], [0, 3, 0, 0]]


@pytest.mark.parametrize("name", ["topk", "batch_topk", "relu", "threshold", "jumprelu"])
def test_rows_without_active_latents(name):
    """Latents silent on all of the batch, and on single rows: zeros everywhere, no NaN."""
    x = torch.randn(30, 5, dtype=torch.float64)
    for silent in (slice(None), slice(10, 20)):
        shifted = x.clone()
        shifted[silent] -= 1e3
        results = []
        for m in (reference, sparse):
            w = Weights(5, 70)
            with torch.no_grad():
                w.W_enc.abs_()
            results.append(run(m, name, shifted, w, 3, [70]))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_strides_of_inputs_do_not_matter_and_gradients_keep_the_weights_layout():
    x, w = torch.randn(40, 12, dtype=torch.float64), Weights(6, 100)
    strided = Weights(6, 100)
    with torch.no_grad():
        strided.W_enc = w.W_enc.detach().contiguous().requires_grad_()
        strided.W_dec = w.W_dec.detach().t().contiguous().t().requires_grad_()
    expected = run(sparse, "topk", x[:, ::2].contiguous(), w, 4, [10, 100])
    actual = run(sparse, "topk", x[:, ::2], strided, 4, [10, 100])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert w.W_enc.grad.stride() == w.W_enc.stride() == (1, 6)


@pytest.mark.parametrize("levels", [[6], [2, 6], [2, 4]])
def test_repeated_indices_add_up(levels):
    crow, latents = torch.tensor([0, 3, 3, 5]), torch.tensor([1, 1, 4, 5, 5])
    results = []
    for m in (reference, sparse):
        w = Weights(3, 6)
        values = torch.arange(1.0, 6.0, dtype=torch.float64).requires_grad_()
        codes = Codes.from_csr(crow, latents, values, 6)
        losses, errors = m.level_errors(codes, w.decoder(), Target(torch.zeros(3, 3).double(), levels))
        (torch.stack(list(losses)).sum() + m.decode(codes, w.decoder()).square().sum()).backward()
        results.append([*errors, values.grad, w.W_dec.grad, w.b_dec.grad])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["W_dec", "W_enc"])
def test_frozen_weights_cost_no_product_and_leave_other_gradients_alone(frozen, monkeypatch):
    x, found, products = torch.randn(40, 12, dtype=torch.float64), [], []
    product = torch.addmm

    def counting(*args, **kwargs):
        products.append(args[1].layout)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", counting)
    for names in ((), (frozen,)):
        w = Weights(12, 203)
        for name in names:
            getattr(w, name).requires_grad_(False)
        codes = sparse.encode(x, w.encoder(), TopK(5))
        losses, _ = sparse.level_errors(codes, w.decoder(), Target(x, [50, 203]))
        products.clear()
        torch.stack(list(losses)).sum().backward()
        assert products == [torch.sparse_csr] * (2 - len(names))
        found.append({name: leaf.grad for name, leaf in vars(w).items()})
    assert found[1].pop(frozen) is None
    for name, grad in found[1].items():
        assert grad is found[0][name] is None or torch.equal(grad, found[0][name])


@pytest.mark.parametrize("one_level", [False, True])
def test_gradients_by_finite_differences(one_level):
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    w = Weights(3, 9)

    def step(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, ...]:
        codes = sparse.encode(x, Encoder(W_enc, b_enc, b_dec), TopK(3))
        decoder = Decoder(W_dec, b_dec)
        if one_level:
            return (sparse.decode(codes, decoder),)
        return tuple(sparse.level_errors(codes, decoder, Target(x, [4, 9]))[0])

    assert torch.autograd.gradcheck(step, (x, w.W_enc, w.b_enc, w.W_dec, w.b_dec))


@pytest.mark.parametrize("name", ["topk", "batch_topk", "relu"])
def test_bf16_weights_and_autocast_work_in_single_precision_after_the_product(name):
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(2))
    for narrow in (Weights(8, 96, torch.bfloat16), Weights(8, 96, torch.float32)):
        autocast = narrow.W_enc.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            codes = ENCODERS[name](sparse, x.to(narrow.W_enc.dtype), narrow, 4)
            x_hat = sparse.decode(codes, narrow.decoder())
            loss = (x_hat.float() - x).square().sum()
        loss.backward()
        assert codes.values.dtype == torch.float32
        assert x_hat.dtype == narrow.W_dec.dtype
        wide = Weights(8, 96, torch.float32)
        with torch.no_grad():
            for a, b in zip((wide.W_dec, wide.b_dec), (narrow.W_dec, narrow.b_dec), strict=True):
                a.copy_(b)
        dense = reference.decode(Codes.from_dense(codes.to_dense().detach()), wide.decoder())
        torch.testing.assert_close(x_hat.float(), dense, rtol=1e-2, atol=1e-2)
        for parameter in (narrow.W_enc, narrow.b_enc, narrow.W_dec, narrow.b_dec):
            assert parameter.grad.dtype == parameter.dtype
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("name", ["relu", "jumprelu"])
def test_lean_dense_path_equals_autograd(name):
    x = torch.randn(37, 12, dtype=torch.float64)
    results = []
    for lean in (False, True):
        w, leaf = Weights(12, 203), x.clone().requires_grad_()
        selection = ReLU() if name == "relu" else JumpReLU(w.threshold, 0.5)
        codes = reference.encode(leaf, w.encoder(), selection, lean)
        loss = reference.decode(codes, w.decoder()).square().sum()
        (loss if codes.rates is None else loss + (codes.rates * torch.arange(203)).sum()).backward()
        results.append([codes.to_dense().detach(), leaf.grad, *w.gradients()])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert w.W_enc.grad.stride() == w.W_enc.stride()


@pytest.mark.parametrize(
    ("rows", "d_sae", "k", "is_dense"),
    [
        (8, 64, 4, True),
        (8, 1024, 4, False),
        (8, 1024, 512, True),
        (1024, 256, 9, False),
        (1024, 256, 20, True),
        (64, 256, 9, True),
    ],
)
def test_auto_goes_sparse_where_it_pays(rows, d_sae, k, is_dense):
    w, x = Weights(4, d_sae), torch.randn(rows, 4, dtype=torch.float64)
    assert (ops.encode(x, w.encoder(), TopK(k)).layout is None) == is_dense
    with ops.backend("sparse"):
        assert ops.encode(x, w.encoder(), TopK(k)).layout is not None
    with ops.backend("dense"):
        assert ops.encode(x, w.encoder(), TopK(k)).layout is None


def test_auto_compresses_relu_latents_only_when_few_fire():
    w, x = Weights(4, 1024), torch.randn(64, 4, dtype=torch.float64)
    assert ops.encode(x, w.encoder(), ReLU()).layout is None
    with torch.no_grad():
        w.b_enc.sub_(8.0)
    assert ops.encode(x, w.encoder(), ReLU()).layout is not None


@pytest.mark.parametrize("name", ["relu", "topk", "batch_topk", "threshold", "jumprelu"])
def test_stacked_saes_vmap_over_the_dense_path(name):
    """Many small SAEs trained as one: ``torch.func`` over the dense kernels equals a loop."""
    x, stack = torch.randn(16, 5, dtype=torch.float64), [Weights(5, 7, seed=seed) for seed in range(3)]

    def loss(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        selections = {
            "relu": ReLU(),
            "topk": TopK(2),
            "batch_topk": BatchTopK(2),
            "threshold": Threshold(torch.tensor(0.1)),
            "jumprelu": JumpReLU(torch.ones_like(b_enc), 0.5),
        }
        codes = ops.encode(x, Encoder(W_enc, b_enc, b_dec), selections[name])
        loss = (ops.decode(codes, Decoder(W_dec, b_dec)) - x).square().sum()
        return loss if codes.rates is None else loss + codes.rates.sum()

    leaves = [torch.stack([getattr(w, leaf) for w in stack]).detach() for leaf in ("W_enc", "b_enc", "W_dec", "b_dec")]
    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*leaves)
    for i in range(3):
        one = [leaf[i].clone().requires_grad_() for leaf in leaves]
        expected = torch.autograd.grad(loss(*one), one)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("levels", [[700], [300, 700]])
@pytest.mark.parametrize("weighted", [False, True])
def test_coherent_rows_with_an_encoder_just_off_have_the_gradients_of_dense_autograd_in_double(levels, weighted):
    """4 096 rows of one latent, the encoder 3e-7 off: a row's gradient is near its rounding, their sum is far from it."""
    generator = torch.Generator().manual_seed(4)
    w = Weights(48, 700, torch.float32, seed=3)
    with torch.no_grad():
        w.W_dec.div_(w.W_dec.norm(dim=1, keepdim=True))
        w.W_enc.copy_(w.W_dec.t() * (1 + 3e-7))
        w.b_enc.zero_()
        w.b_dec.zero_()
    x = w.W_dec.detach()[torch.arange(4096) % 4] * (1 + torch.rand(4096, 1, generator=generator))
    weight = torch.rand(4096, generator=generator) / 2048 if weighted else None

    def gradient(m, x, w, weight):
        codes = m.encode(x, w.encoder(), TopK(1))
        losses, _ = m.level_errors(codes, w.decoder(), Target(x, levels, False, weight))
        torch.stack(list(losses)).sum().backward()
        return w.W_enc.grad, w.b_enc.grad, w.W_dec.grad

    found = gradient(sparse, x, w, weight)
    exact = Weights(48, 700, torch.float64, seed=3)
    for own, other in zip(vars(exact).values(), vars(w).values(), strict=True):
        own.data.copy_(other.data)
    expected = gradient(reference, x.double(), exact, None if weight is None else weight.double())
    for own, true in zip(found, expected, strict=True):
        assert (own.double() - true).norm() <= 0.05 * true.norm()
