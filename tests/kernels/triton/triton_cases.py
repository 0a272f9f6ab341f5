"""Cases for the Triton kernels, on the device at hand; ``test_triton.py`` runs them in a process of their own."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hedgelab.kernels import reference, sparse
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.triton import available, products, selection
from hedgelab.kernels.triton.products import Tile
from hedgelab.kernels.triton.selection import SelectionTile
from hedgelab.kernels.values import BatchTopK, Decoder, Encoder, JumpReLU, ReLU, Target, Threshold, TopK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not available(), reason="Triton is missing, or there is neither GPU nor interpreter")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [  # d_in, d_sae, batch, k
    pytest.param(20, 64, 9, 4, id="plain"),
    pytest.param(17, 40, 5, 1, id="k=1"),
    pytest.param(8, 12, 4, 12, id="k=d_sae"),
    pytest.param(8, 40, 0, 2, id="empty-batch"),
    pytest.param(8, 40, 1, 2, id="one-example"),
    pytest.param(300, 20, 3, 1, id="two-tiles"),
]


@pytest.fixture(autouse=True)
def _interpreter_for_recent_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 interprets scalars as arrays of one element, which NumPy 2.4 no longer takes for integers."""
    if DEVICE == "cpu":
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        patch_tensor = interpreter._patch_lang_tensor

        def with_index(tensor: Any, scope: Any) -> None:
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)


@pytest.fixture(autouse=True)
def _always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes would take dense products, and tensors of the interpreter those of the CPU."""
    monkeypatch.setattr(products, "DENSITY_16_BIT", 1.0)
    monkeypatch.setattr(products, "DENSITY_32_BIT", 1.0)
    monkeypatch.setattr(sparse, "products_on", lambda tensor: products)


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30))


def weights(d_in: int, d_sae: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """``W_enc`` (transposed in memory), ``b_enc``, ``W_dec``, ``b_dec``, all leaves."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(*shape, generator=generator) for shape in ((d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,))]
    scaled = [drawn[0].t() / d_in**0.5, 0.1 * drawn[1], drawn[2] / d_in**0.5, 0.1 * drawn[3]]
    return [w.to(DEVICE, dtype).requires_grad_() for w in scaled]


def examples(batch: int, d_in: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]


def check_step(path_codes: Codes, true_codes: Codes, leaves: list[Tensor], x: Tensor, dtype: torch.dtype) -> None:
    """Same codes, same reconstruction and same gradients of a squared error plus an L1 term as the dense reference."""
    tolerance = TOLERANCE[dtype]
    W_dec, b_dec = leaves[2], leaves[3]
    assert path_codes.layout is not None
    assert relative(path_codes.to_dense(), true_codes.to_dense()) <= tolerance
    losses = []
    for decode, codes in ((sparse.decode, path_codes), (reference.decode, true_codes)):
        x_hat = decode(codes, Decoder(W_dec, b_dec))
        losses.append((x_hat - x.detach()).square().sum() + 0.3 * codes.sum_per_latent().sum())
    assert relative(losses[0], losses[1]) <= tolerance
    for found, expected in zip(gradients(losses[0], leaves), gradients(losses[1], leaves), strict=True):
        assert relative(found, expected) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d_in", "d_sae", "batch", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_a_k_sparse_step_equals_the_dense_reference(
    kind: str, d_in: int, d_sae: int, batch: int, k: int, dtype: torch.dtype
) -> None:
    leaves, x = weights(d_in, d_sae, dtype), examples(batch, d_in, dtype)
    W_enc, b_enc, _, b_dec = leaves
    selection = {"topk": TopK, "batch_topk": BatchTopK}[kind](k)
    codes, expected = (path.encode(x, Encoder(W_enc, b_enc, b_dec), selection) for path in (sparse, reference))
    check_step(codes, expected, leaves, x, dtype)


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_selection_by_scaled_pre_activations(kind: str) -> None:
    leaves, x = weights(20, 64, torch.float32), examples(9, 20, torch.float32)
    W_enc, b_enc, W_dec, b_dec = leaves
    scale = W_dec.detach().norm(dim=1) * torch.linspace(0.1, 3, 64, device=DEVICE)
    selection = {"topk": TopK, "batch_topk": BatchTopK}[kind](4)
    codes, expected = (path.encode(x, Encoder(W_enc, b_enc, b_dec, scale), selection) for path in (sparse, reference))
    check_step(codes, expected, leaves, x, torch.float32)


def test_gradient_of_the_activations_and_of_a_strided_input() -> None:
    leaves = weights(20, 64, torch.float32)
    x = examples(18, 20, torch.float32)[::2].requires_grad_()
    W_enc, b_enc, _, b_dec = leaves
    codes = sparse.encode(x, Encoder(W_enc, b_enc, b_dec), TopK(4))
    expected = reference.encode(x, Encoder(W_enc, b_enc, b_dec), TopK(4))
    check_step(codes, expected, [*leaves, x], x, torch.float32)


def test_encoder_gradient_lies_in_memory_like_the_encoder() -> None:
    W_enc, b_enc, W_dec, b_dec = weights(20, 64, torch.float32)
    x = examples(9, 20, torch.float32)
    sparse.decode(sparse.encode(x, Encoder(W_enc, b_enc, b_dec), TopK(4)), Decoder(W_dec, b_dec)).sum().backward()
    assert W_enc.grad is not None
    assert W_enc.grad.stride() == W_enc.stride() == (1, 20)


def test_a_dense_backward_pass_of_the_encoder_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, x = weights(20, 64, torch.float32), examples(9, 20, torch.float32)
    W_enc, b_enc, _, b_dec = leaves
    monkeypatch.setattr(products, "DENSITY_32_BIT", 0.0)
    codes = sparse.encode(x, Encoder(W_enc, b_enc, b_dec), TopK(4))
    check_step(codes, reference.encode(x, Encoder(W_enc, b_enc, b_dec), TopK(4)), leaves, x, torch.float32)


@pytest.mark.parametrize("threshold", ["scalar", "by latent"])
def test_relu_and_thresholds(threshold: str) -> None:
    leaves, x = weights(20, 24, torch.float32), examples(9, 20, torch.float32)
    W_enc, b_enc, _, b_dec = leaves
    limit = torch.tensor(0.7, device=DEVICE) if threshold == "scalar" else torch.linspace(-1, 2, 24, device=DEVICE)
    codes = sparse.encode(x, Encoder(W_enc, b_enc, b_dec), Threshold(limit))
    check_step(codes, reference.encode(x, Encoder(W_enc, b_enc, b_dec), Threshold(limit)), leaves, x, torch.float32)
    codes = sparse.encode(x, Encoder(W_enc, b_enc, b_dec), ReLU())
    check_step(codes, reference.encode(x, Encoder(W_enc, b_enc, b_dec), ReLU()), leaves, x, torch.float32)


@pytest.mark.parametrize("weighted", [False, True])
def test_jumprelu_with_its_straight_through_gradients(weighted: bool) -> None:
    dtype = torch.float32
    leaves, x = weights(20, 24, dtype), examples(30, 20, dtype)
    W_enc, b_enc, W_dec, b_dec = leaves
    threshold = torch.full((24,), 0.6, device=DEVICE, requires_grad=True)
    weight = torch.rand(30, device=DEVICE).softmax(0) if weighted else None
    outcomes = []
    for path in (sparse, reference):
        codes = path.encode(x, Encoder(W_enc, b_enc, b_dec), JumpReLU(threshold, 0.8, weight))
        rates = codes.rates
        assert rates is not None
        x_hat = path.decode(codes, Decoder(W_dec, b_dec))
        loss = (x_hat - x).square().sum() + (rates * torch.arange(24, device=DEVICE)).sum()
        outcomes.append([codes.to_dense(), rates, *gradients(loss, [*leaves, threshold])])
    for found, expected in zip(*outcomes, strict=True):
        assert relative(found, expected) <= 1e-5


@pytest.mark.parametrize(("detach", "tilt"), [(False, 0.0), (True, 0.0), ("all_but_last", 0.0), (False, 0.5)])
@pytest.mark.parametrize("levels", [[64], [7, 30, 64], [1, 2, 40, 63]])
def test_levels_in_one_pass(levels: list[int], detach: Any, tilt: float) -> None:
    dtype = torch.float64
    leaves, x = weights(20, 64, dtype), examples(9, 20, dtype)
    W_enc, b_enc, W_dec, b_dec = leaves
    outcomes = []
    for path in (sparse, reference):
        codes = path.encode(x, Encoder(W_enc, b_enc, b_dec), BatchTopK(6))
        losses, errors = path.level_errors(codes, Decoder(W_dec, b_dec), Target(x, levels, detach, tilt=tilt))
        loss = torch.stack([(level + 1) * loss for level, loss in enumerate(losses)]).sum()
        outcomes.append([*losses, *errors, *gradients(loss, leaves)])
    for found, expected in zip(*outcomes, strict=True):
        assert relative(found, expected) <= 1e-10


def test_a_frozen_decoder_leaves_other_gradients_alone() -> None:
    leaves, x = weights(20, 64, torch.float32), examples(9, 20, torch.float32)
    W_enc, b_enc, W_dec, b_dec = leaves
    outcomes = []
    for rows in (W_dec, W_dec.detach()):
        codes = sparse.encode(x, Encoder(W_enc, b_enc, b_dec), TopK(4))
        losses, _ = sparse.level_errors(codes, Decoder(rows, b_dec), Target(x, [30, 64]))
        outcomes.append(gradients(losses[0] + losses[1], [W_enc, b_enc, b_dec]))
    for found, expected in zip(*outcomes, strict=True):
        assert torch.equal(found, expected)


def test_signed_topk_takes_the_tiles() -> None:
    leaves, x = weights(20, 64, torch.float32), examples(9, 20, torch.float32)
    W_enc, b_enc, _, b_dec = leaves
    selection = TopK(4, signed=True)
    codes, expected = (path.encode(x, Encoder(W_enc, b_enc, b_dec), selection) for path in (sparse, reference))
    assert bool((codes.values < 0).any())
    check_step(codes, expected, leaves, x, torch.float32)


def test_levels_left_out_of_the_loss() -> None:
    leaves, x = weights(20, 64, torch.float32), examples(9, 20, torch.float32)
    W_enc, b_enc, W_dec, b_dec = leaves
    outcomes = []
    for path in (sparse, reference):
        codes = path.encode(x, Encoder(W_enc, b_enc, b_dec), TopK(4))
        losses, _ = path.level_errors(codes, Decoder(W_dec, b_dec), Target(x, [6, 30, 64]))
        outcomes.append(gradients(losses[1], leaves))
    for found, expected in zip(*outcomes, strict=True):
        assert relative(found, expected) <= 1e-5


@pytest.mark.parametrize("tile", [Tile(16, 1, 1), Tile(16, 8, 2), Tile(64, 2, 1)], ids=str)
def test_any_rows_repeated_indices_and_empty_rows(tile: Tile) -> None:
    """A hand-made layout: an empty row, a latent twice in a row, a silent latent, a hot one, poisoned outputs."""
    d_in, d_sae = 37, 6
    crow = torch.tensor([0, 3, 3, 8, 21], device=DEVICE)
    latents = torch.tensor([5, 1, 5, *[0, 1, 2, 3, 5], *[1] * 13], device=DEVICE)
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(21, generator=generator).to(DEVICE)
    weight = torch.randn(d_sae, d_in, generator=generator).to(DEVICE)
    source = torch.randn(1, 4, d_in, generator=generator).to(DEVICE)
    codes = Codes.from_csr(crow, latents, values, d_sae)
    dense = codes.to_dense()
    assert codes.layout is not None
    assert relative(products.decode_levels(codes.layout, values, weight, [d_sae], tile)[0], dense @ weight) <= 1e-6
    of_weight, of_bias, of_values = products.latent_gradients(
        codes.layout, values, source, [d_sae], torch.float32, weight, bias=True, tile=tile
    )
    assert of_bias is not None
    assert of_values is not None
    assert relative(of_weight, dense.t() @ source[0]) <= 1e-6
    assert relative(of_bias, dense.sum(0)) <= 1e-6
    assert relative(of_values, (source[0] @ weight.t())[codes.rows(), latents]) <= 1e-6
    assert not of_weight[4].any()


@pytest.mark.parametrize(("part", "levels"), [(4, [2, 3, 7]), (4, [7]), (8, [2, 3, 7]), (256, [7])], ids=str)
def test_hot_latents_are_split_over_programs(part: int, levels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that fire on every row, once or twice, beside such that begin and end at multiples of a part, or never fire."""
    monkeypatch.setattr(products, "PART", part)
    d_in, d_sae, batch = 70, 7, 16
    always = torch.tensor([[1, 1, 4]]).expand(batch, 3)  # latent 0 never, 1 twice, 4 once a row; 48 values
    latents = torch.cat([always.flatten(), torch.tensor([2, 6, 6, 6, 3, 3, 3, 3, 5, 5, 5])]).to(DEVICE)
    crow = torch.cat([torch.arange(batch) * 3, torch.tensor([len(latents)])]).to(DEVICE)
    generator = torch.Generator().manual_seed(3)
    values, weight, source = (
        torch.randn(*shape, generator=generator).double().to(DEVICE)
        for shape in ((len(latents),), (d_sae, d_in), (len(levels), batch, d_in))
    )
    codes = Codes.from_csr(crow, latents, values, d_sae)
    assert codes.layout is not None
    level = torch.bucketize(latents, torch.tensor(levels, device=DEVICE), right=True)
    felt = source[level, codes.rows()]
    expected = torch.zeros_like(weight).index_add_(0, latents, values[:, None] * felt)
    for tile in (Tile(64, 4, 1), Tile(32, 8, 1)):  # two tiles, and three
        for wanted in ({"dtype": torch.float64}, {"dtype": None}):
            of_weight, of_bias, of_values = products.latent_gradients(
                codes.layout, values, source, levels, **wanted, weight=weight, bias=True, tile=tile
            )
            assert of_bias is not None
            assert of_values is not None
            assert relative(of_bias, torch.zeros_like(of_bias).index_add_(0, latents, values)) <= 1e-12
            assert relative(of_values, (felt * weight[latents]).sum(1)) <= 1e-12
            assert of_weight is None or relative(of_weight, expected) <= 1e-12
            assert (of_weight is None) == (wanted["dtype"] is None)


def test_rows_beyond_32_bits_are_found(tmp_path: Any) -> None:
    """The last of 2^20 latents 4 096 wide lies behind the 2^32nd number; the file is sparse."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB")
    width, d_sae = 4096, 2**20
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(2 * width * d_sae)
    weight = torch.from_file(str(tmp_path / "weights"), True, width * d_sae, dtype=torch.bfloat16).view(d_sae, width)
    latents = torch.tensor([d_sae - 1, 2**19 - 1, 0])
    weight[latents] = torch.randn(3, width).bfloat16()
    expected = weight[latents].float().sum(0, keepdim=True)
    codes = Codes.from_csr(torch.tensor([0, 3], device=DEVICE), latents.to(DEVICE), torch.ones(3, device=DEVICE), d_sae)
    assert codes.layout is not None
    found = products.decode_levels(codes.layout, codes.values, weight.to(DEVICE), [d_sae], Tile(1024, 1, 1))
    assert relative(found[0], expected.to(DEVICE)) <= 1e-6
    rows = torch.tensor([0, d_sae - 2, d_sae - 1])  # the same numbers as a gradient that comes from above, of 2^20 examples
    weight[rows] = torch.randn(3, width).bfloat16()
    crow = torch.searchsorted(rows, torch.arange(d_sae + 1)).to(DEVICE)
    codes = Codes.from_csr(crow, torch.zeros(3, dtype=torch.long, device=DEVICE), torch.ones(3, device=DEVICE), 1)
    assert codes.layout is not None
    one = torch.ones(1, width, device=DEVICE)
    found, _, dots = products.latent_gradients(
        codes.layout, codes.values, weight[None].to(DEVICE), [1], torch.float32, one, tile=Tile(1024, 1, 1)
    )
    assert found is not None
    assert dots is not None
    assert relative(found[0], weight[rows].float().sum(0).to(DEVICE)) <= 1e-6
    assert relative(dots, weight[rows].float().sum(1).to(DEVICE)) <= 1e-5


def check_top_k(pre: Tensor, k: int, scale: Tensor | None = None, tile: SelectionTile | None = None) -> None:
    """The largest positive entries of each row, lowest latent first among equals, whatever the launch shape."""
    selected = selection.top_k(pre, k, scale, tile or SelectionTile(64, 1))
    assert selected is not None
    ranked = (pre if scale is None else pre.float() * scale).relu()
    order = torch.argsort(ranked, dim=1, descending=True, stable=True)[:, :k]
    expected = torch.zeros_like(pre).scatter_(1, order, (pre * (ranked > 0)).gather(1, order))
    assert torch.equal(selected.to_dense(), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "k"), [(300, 5), (512, 1), (511, 16), (1000, 3)])
def test_top_k_of_rows(width: int, k: int, dtype: torch.dtype) -> None:
    pre = torch.randn(7, width, generator=torch.Generator().manual_seed(width)).to(DEVICE, dtype)
    check_top_k(pre, k)
    check_top_k(pre, k, torch.linspace(0, 2, width, device=DEVICE))


def test_top_k_among_ties_and_rows_with_little_to_choose() -> None:
    pre = torch.full((6, 320), -1.0, device=DEVICE)
    pre[1] = 0.0
    pre[2, 7] = 0.5
    pre[3, ::9] = 2.0  # 36 equal entries for 8 places
    pre[4, ::64] = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0], device=DEVICE)  # all in one group
    pre[5, 10:14] = torch.tensor([1e-30, 1e30, 1.0, float("inf")], device=DEVICE)
    check_top_k(pre, 8)


def test_top_k_hands_masses_of_ties_back() -> None:
    assert selection.top_k(torch.ones(3, 320, device=DEVICE), 8) is None
    ones = torch.ones(3, 1, device=DEVICE)
    leaves = [torch.ones(1, 320, device=DEVICE), torch.zeros(320, device=DEVICE), torch.zeros(1, device=DEVICE)]
    codes = sparse.encode(ones, Encoder(*leaves), TopK(8))
    assert codes.active_per_example().tolist() == [8, 8, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 30, 700])
@pytest.mark.parametrize("kind", ["normal", "skewed", "ties", "few positive"])
def test_batch_top_k_is_the_set_a_full_sort_keeps(kind: str, count: int, dtype: torch.dtype) -> None:
    pre = torch.randn(9, 320, generator=torch.Generator().manual_seed(count)).to(DEVICE)
    if kind == "skewed":
        pre[2] += 4
    elif kind == "ties":
        pre = (2 * pre).round()
    elif kind == "few positive":
        pre -= 2.5
    pre = pre.to(dtype)
    selected = selection.batch_top_k(pre, count, None, SelectionTile(64, 1))
    flat = pre.flatten().relu()
    kept = torch.argsort(flat, descending=True, stable=True)[:count]
    expected = torch.zeros_like(flat).scatter_(0, kept, flat[kept]).view_as(pre)
    assert torch.equal(selected.to_dense(), expected.float())
    layout = selected.layout
    assert layout is not None
    assert all((layout.latents[a:b].diff() > 0).all() for a, b in pairwise(layout.crow.tolist()))


@pytest.mark.parametrize("kind", ["normal", "few positive"])
def test_a_selection_of_fixed_shape_keeps_the_same(kind: str) -> None:
    """What it stores beyond the positive entries is 0, and learns nothing."""
    pre = torch.randn(9, 320, generator=torch.Generator().manual_seed(0)).to(DEVICE) - 2.5 * (kind == "few positive")
    for scale in (None, torch.linspace(0.5, 2, 320, device=DEVICE)):
        few = selection.small_top_k(pre, 700, scale, per_row=False)
        assert torch.equal(few.to_dense().relu(), selection.batch_top_k(pre, 700, scale).to_dense())
        assert len(few.values) == 700
        each = selection.small_top_k(pre, 8, scale, per_row=True)
        expected = selection.top_k(pre, 8, scale, SelectionTile(64, 1))
        assert expected is not None
        assert torch.equal(each.to_dense().relu(), expected.to_dense())
    W_enc, b_enc, b_dec = (torch.eye(320, device=DEVICE), torch.zeros(320, device=DEVICE), torch.zeros(320, device=DEVICE))
    b_enc.requires_grad_()
    sparse.encode(pre, Encoder(W_enc, b_enc, b_dec), BatchTopK(700 / 9)).values.sum().backward()
    assert b_enc.grad is not None
    largest = pre.flatten().topk(700).indices
    assert b_enc.grad.sum() == (pre.flatten()[largest] > 0).sum()


@pytest.mark.skipif(DEVICE == "cpu", reason="bf16 products are a matter of the GPU")
@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_bf16_autocast_stays_near_float64(kind: str) -> None:
    """Codes are compared through their own selection: rounding may swap entries that are nearly equal."""
    d_in, d_sae, batch, k = 256, 8192, 64, 8
    leaves = weights(d_in, d_sae, torch.float32)
    W_enc, b_enc, W_dec, b_dec = leaves
    x = examples(batch, d_in, torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        codes = sparse.encode(x, Encoder(W_enc, b_enc, b_dec), {"topk": TopK, "batch_topk": BatchTopK}[kind](k))
        x_hat = sparse.decode(codes, Decoder(W_dec, b_dec))
        loss = (x_hat.float() - x.float()).square().sum()
    assert x_hat.dtype == torch.float32
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    pre = (x.double() - exact[3]) @ exact[0] + exact[1]
    dense = torch.where(codes.to_dense() > 0, pre, 0.0)
    exact_loss = (dense @ exact[2] + exact[3] - x.double()).square().sum()
    assert relative(codes.to_dense(), dense) <= 1e-2
    assert relative(loss, exact_loss) <= 1e-2
    for found, expected in zip(gradients(loss, leaves), gradients(exact_loss, exact), strict=True):
        assert relative(found, expected) <= 1e-2
