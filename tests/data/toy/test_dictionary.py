import time

import pytest
import torch
from torch.nn.functional import normalize

from hedgelab.data.toy.dictionary import Dictionary, Orthogonalised, orthogonalised, overlap_gradient
from hedgelab.errors import UserError
from hedgelab.seeding import generator


def objective(e: torch.Tensor) -> torch.Tensor:
    """The formula as it is written: over all ordered pairs, with an n x n matrix."""
    gram = e @ e.T
    norms = gram.diagonal()
    return (gram - norms.diag()).square().sum() + len(e) * (norms - 1).square().sum()


def largest_cosines(e: torch.Tensor) -> torch.Tensor:
    rows = range(0, len(e), 1024)
    return torch.cat([(e[i : i + 1024] @ e.T).abs().topk(2, dim=1).values[:, 1] for i in rows])


def autograd(e: torch.Tensor) -> torch.Tensor:
    e = e.clone().requires_grad_(True)
    return torch.autograd.grad(objective(e), e)[0]


@pytest.mark.parametrize(("n", "d_in"), [(1, 3), (7, 3), (5, 9), (40, 130), (60, 257)])
def test_gradient_is_that_of_the_plain_formula(n, d_in):
    e = torch.randn(n, d_in, generator=generator(0), dtype=torch.float64)
    torch.testing.assert_close(overlap_gradient(e), autograd(e), rtol=1e-12, atol=1e-9)


def test_steps_are_those_of_adam_on_the_plain_formula():
    start = normalize(torch.randn(90, 24, generator=generator(1), dtype=torch.float64), dim=1)
    e, mean, square = start.clone(), torch.zeros(()), torch.zeros(())
    for step in range(1, 61):
        gradient = autograd(e)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        e = e - 1e-2 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(orthogonalised(start, 60, 1e-2), e, rtol=0, atol=1e-10)
    assert objective(start) > 300  # expected: n (n - 1) / d_in
    assert objective(e) < 90**2 / 24 - 90  # Welch's bound for unit vectors; these may shrink a little


def test_directions_depend_on_the_generator_alone():
    first, again, other = (Orthogonalised(3).directions(50, 8, generator(seed)) for seed in (2, 2, 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float64
    torch.testing.assert_close(first.norm(dim=1), torch.ones(50, dtype=torch.float64))
    assert isinstance(Orthogonalised(), Dictionary)


def test_steps_push_directions_apart():
    random, pushed = (Orthogonalised(steps, 3e-3).directions(256, 32, generator(4)) for steps in (0, 100))
    assert largest_cosines(pushed).mean() < 0.97 * largest_cosines(random).mean()
    few = Orthogonalised(steps=400, lr=3e-3).directions(20, 32, generator(4))
    assert largest_cosines(few).max() < 1e-3  # where they fit, they end up orthogonal


@pytest.mark.parametrize(("steps", "lr", "key"), [(-1, 0.1, "steps"), (1.5, 0.1, "steps"), (3, 0.0, "lr")])
def test_mistakes(steps, lr, key):
    with pytest.raises(UserError, match=rf"data\.dictionary\.{key}: "):
        Orthogonalised(steps, lr)


@pytest.mark.slow
def test_the_size_of_synth_sae_bench():
    """Every direction's largest |cosine| is about .15 on average (arXiv 2602.14687), in well under a minute of a quiet core."""
    start = time.process_time()
    e = Orthogonalised().directions(16_384, 768, generator(42)).float()
    assert time.process_time() - start < 90
    assert float(largest_cosines(e).mean()) == pytest.approx(0.15, abs=0.01)
