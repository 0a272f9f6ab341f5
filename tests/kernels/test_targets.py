"""What levels learn from: losses and gradients of every target, against the plain formula in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hedgelab.kernels import ops, reference, sparse
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.values import Decoder, Target

D_IN, D_SAE, BATCH = 7, 30, 23
LEVELS = [4, 11, D_SAE]
FACTORS = torch.tensor([3.0, 0.5, 2.0], dtype=torch.float64)
PATHS = {"dense": reference, "sparse": sparse}


def leaves() -> list[Tensor]:
    """Activations (most of them 0), ``W_dec``, ``b_dec`` and x."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*shape, generator=generator).double() for shape in ((BATCH, D_SAE), (D_SAE, D_IN), (D_IN,))]
    x = torch.randn(BATCH, D_IN, generator=generator).double() * torch.rand(BATCH, 1, generator=generator) * 4
    return [leaf.requires_grad_() for leaf in (torch.where(drawn[0] > 0.8, drawn[0], 0.0), *drawn[1:], x)]


def population() -> Tensor:
    weight = torch.rand(BATCH, generator=torch.Generator().manual_seed(5)).double()
    weight[3] = 0
    return weight / weight.sum()


def plain(leaves: list[Tensor], levels: list[int], detach: bool | str, weight: Tensor | None, tilt: float) -> Tensor:
    """Losses of the levels as the definition has them, one reconstruction from scratch for each."""
    a, W_dec, b_dec, x = leaves
    losses = []
    for level, (start, stop) in enumerate(pairwise([0, *levels])):
        inside = a[:, :start] @ W_dec[:start] + b_dec
        if level and (detach is True or (detach == "all_but_last" and stop != levels[-1])):
            inside = inside.detach()
        squares = (inside + a[:, start:stop] @ W_dec[start:stop] - x).square().sum(1)
        shares = torch.full((BATCH,), 1 / BATCH, dtype=torch.float64) if weight is None else weight
        if tilt:
            known = squares.detach()
            shares = shares * torch.exp(tilt * known / (shares @ known))
            shares = shares / shares.sum()
        losses.append(shares @ squares)
    return torch.stack(losses)


def check(path: str, levels: list[int], detach: bool | str = False, weight: Tensor | None = None, tilt: float = 0.0):
    own, other = leaves(), leaves()
    expected = plain(own, levels, detach, weight, tilt)
    codes = Codes.from_dense(other[0])
    if path == "sparse":
        codes = Codes.from_csr(*codes.csr(), D_SAE)
    target = Target(other[3], levels, detach, weight, tilt)
    losses, _ = PATHS[path].level_errors(codes, Decoder(*other[1:3]), target)
    found = torch.stack(list(losses))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for value in (found, expected):
        (value @ FACTORS[: len(levels)]).backward()
    own[0].grad[own[0] == 0] = 0  # sparse codes have no gradient where nothing is stored, nor would a selection use it
    other[0].grad[other[0] == 0] = 0
    for true, given in zip(own, other, strict=True):
        torch.testing.assert_close(given.grad, true.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levels", [LEVELS, [D_SAE], [4, 11]])
@pytest.mark.parametrize("detach", [False, True, "all_but_last"])
@pytest.mark.parametrize("tilt", [0.0, 0.7, -0.7])
def test_levels_have_the_losses_and_gradients_of_the_plain_formula(path, levels, detach, weighted, tilt):
    check(path, levels, detach, population() if weighted else None, tilt)


@pytest.mark.parametrize("path", PATHS)
def test_all_but_last_differs_from_its_neighbours(path):
    """The innermost latents feel the last level, and not the middle one."""
    gradients = {}
    for detach in (False, True, "all_but_last"):
        a, W_dec, b_dec, x = leaves()
        codes = Codes.from_csr(*Codes.from_dense(a).csr(), D_SAE)
        losses, _ = PATHS[path].level_errors(codes, Decoder(W_dec, b_dec), Target(x.detach(), LEVELS, detach))
        gradients[detach] = [torch.autograd.grad(loss, W_dec, retain_graph=True)[0] for loss in losses]
    inner = slice(LEVELS[0])
    assert [bool(grad[inner].any()) for grad in gradients[False]] == [True, True, True]
    assert [bool(grad[inner].any()) for grad in gradients[True]] == [True, False, False]
    assert [bool(grad[inner].any()) for grad in gradients["all_but_last"]] == [True, False, True]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("levels", [LEVELS, [D_SAE], [4, 11], [11]])
def test_a_decoder_gradient_sums_value_times_upstream_of_its_level(path, levels):
    a = leaves()[0].detach() - 0.1 * leaves()[0].detach().square()  # some are negative
    upstream = torch.randn(len(levels), BATCH, D_IN, generator=torch.Generator().manual_seed(1)).double()
    codes = Codes.from_dense(a.requires_grad_())
    if path == "sparse":
        codes = Codes.from_csr(*codes.csr(), D_SAE)
    expected = torch.zeros(D_SAE, D_IN).double()
    for latent in range(levels[-1]):
        level = next(number for number, stop in enumerate(levels) if latent < stop)
        expected[latent] = sum(a[b, latent].detach() * upstream[level, b] for b in range(BATCH))
    found = ops.decoder_gradient(codes, upstream, levels)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_it_is_what_the_decoder_learns_from(path):
    a, W_dec, b_dec, x = leaves()
    codes = Codes.from_csr(*Codes.from_dense(a.detach()).csr(), D_SAE)
    target = Target(x.detach(), LEVELS, "all_but_last", population(), 0.4)
    losses, errors = PATHS[path].level_errors(codes, Decoder(W_dec, b_dec), target)
    (torch.stack(list(losses)) @ FACTORS).backward()
    errors = torch.stack(list(errors))
    weight = reference.tilted(errors.square().sum(2), target)
    upstream = sparse.level_upstream(FACTORS, errors, weight, "all_but_last")
    with ops.backend(path):
        torch.testing.assert_close(ops.decoder_gradient(codes, upstream, LEVELS), W_dec.grad, rtol=1e-10, atol=1e-12)


def tilted_loss(squares: list[float], tilt: float, path: str = "sparse") -> tuple[float, Tensor]:
    """Loss of one latent that never fires on examples of these squared errors, and the gradient of ``b_dec``."""
    x = torch.tensor(squares).double().sqrt()[:, None]
    codes = Codes.from_csr(torch.zeros(len(x) + 1, dtype=torch.long), torch.zeros(0, dtype=torch.long), x[:0, 0], 1)
    b_dec = torch.zeros(1).double().requires_grad_()
    decoder = Decoder(torch.ones(1, 1).double(), b_dec)
    (loss,), _ = PATHS[path].level_errors(codes, decoder, Target(x, [1], tilt=tilt))
    loss.backward()
    return loss.item(), b_dec.grad


@pytest.mark.parametrize("path", PATHS)
def test_a_tilt_in_closed_form(path):
    """Losses 1 and 3 have mean 2: with tilt 2 ln 3 their weights are as 1 to 9 (exponents ln 3 and 3 ln 3)."""
    loss, gradient = tilted_loss([1.0, 3.0], 2 * torch.log(torch.tensor(3.0)).item(), path)
    assert loss == pytest.approx(0.1 * 1 + 0.9 * 3)
    assert gradient.item() == pytest.approx(-2 * (0.1 + 0.9 * 3**0.5))


@pytest.mark.parametrize("path", PATHS)
def test_outliers_and_perfect_reconstructions_do_not_overflow(path):
    assert tilted_loss([0.0] * 5 + [1e30], 1e6, path)[0] == pytest.approx(1e30)
    assert tilted_loss([0.0, 0.0], 5.0, path)[0] == 0
    assert tilted_loss([1.0, 1.0, 4.0], -1e9, path)[0] == pytest.approx(1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_without_a_tilt_nothing_changes_by_a_bit_and_a_small_one_is_near_it(weighted, backend):
    results = []
    for tilt in (0.0, 1e-4):
        a, W_dec, b_dec, x = (leaf.detach().float() for leaf in leaves())
        codes = Codes.from_csr(*Codes.from_dense(a).csr(), D_SAE)
        weight = population().float() * 3 if weighted else None  # what does not sum to 1 keeps its sum
        with ops.backend(backend):
            losses, (*_, error) = ops.level_errors(codes, Decoder(W_dec, b_dec), Target(x, [D_SAE], False, weight, tilt))
        expected = error.square().sum() / BATCH if weight is None else weight @ error.square().sum(1)
        results.append((losses[0], expected))
    torch.testing.assert_close(*results[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(*results[1], rtol=1e-3, atol=0)
    assert results[1][0] > results[0][0]
