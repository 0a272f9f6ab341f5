"""New SAEs like old ones: fresh weights, duplicates, new latents appended."""

import functools

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.saes import BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE, TopKSAE, VanillaSAE, duplicate, fresh, widen
from tests.saes.comparison import same_weights

D_IN, D_SAE, N_NEW = 8, 12, 3
MAKERS = {
    "vanilla": functools.partial(VanillaSAE, d_sae=D_SAE, l1_coefficient=0.1),
    "topk": functools.partial(TopKSAE, d_sae=D_SAE, k=3),
    "batch_topk": functools.partial(BatchTopKSAE, d_sae=D_SAE, k=3, dead_after_steps=2),
    "jumprelu": functools.partial(JumpReLUSAE, d_sae=D_SAE, l0_coefficient=0.1, threshold=0.02),
    "matryoshka": lambda d_in: MatryoshkaSAE(d_in, functools.partial(BatchTopKSAE, d_sae=D_SAE, k=3), [4, D_SAE]),
}


@pytest.fixture(params=MAKERS)
def trained(request):
    """An SAE of each kind after some steps, so that no buffer is as it began."""
    sae = MAKERS[request.param](D_IN)
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)
    rng = torch.Generator().manual_seed(0)
    for _ in range(4):
        result = sae.loss(Batch(torch.randn(32, D_IN, generator=rng)))
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
        sae.after_step(result)
    return sae


def test_widened_sae_keeps_the_old_latents_and_appends_new_ones(trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    wide = widen(trained, N_NEW, norm=0.2, seed=1)
    assert type(wide) is type(trained)
    assert wide.d_sae == D_SAE + N_NEW
    for name, value in wide.state_dict().items():
        old = before[name]
        assert torch.equal(trained.state_dict()[name], old)
        kept = value[tuple(slice(0, size) for size in old.shape)]
        assert torch.equal(kept, old), name
    new = wide.W_dec[D_SAE:].detach()
    torch.testing.assert_close(new.norm(dim=1), torch.full((N_NEW,), 0.2))
    assert torch.equal(wide.W_enc[:, D_SAE:].detach(), new.t())
    assert not wide.b_enc[D_SAE:].any()
    assert not torch.equal(widen(trained, N_NEW, seed=2).W_dec[D_SAE:], widen(trained, N_NEW, seed=1).W_dec[D_SAE:])


def test_widened_sae_trains_and_knows_its_width(trained):
    wide = widen(trained, N_NEW)
    x = torch.randn(16, D_IN, generator=torch.Generator().manual_seed(1))
    result = wide.loss(Batch(x))
    result.total.backward()
    wide.after_step(result)
    assert wide.encode(x).d_sae == D_SAE + N_NEW
    assert wide.dead_latents.shape == (D_SAE + N_NEW,)
    if isinstance(wide, MatryoshkaSAE):
        assert wide.levels == [4, D_SAE + N_NEW]


def test_new_jumprelu_latents_start_at_the_configured_threshold():
    sae = JumpReLUSAE(D_IN, D_SAE, l0_coefficient=0.1, threshold=0.02)
    sae.theta.data.fill_(1.0)
    wide = widen(sae, N_NEW)
    torch.testing.assert_close(wide.theta[D_SAE:].detach(), torch.full((N_NEW,), 0.02))
    assert (wide.theta[:D_SAE] == 1).all()


def test_new_latents_are_not_dead_yet(trained):
    if hasattr(trained, "steps_since_fired"):
        trained.steps_since_fired.fill_(100)
        assert widen(trained, N_NEW).steps_since_fired.tolist() == [100] * D_SAE + [0] * N_NEW


def test_training_arguments_are_taken_over(trained):
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.5)

    trained.optimizer = optimizer
    trained.gradient_clip_norm = 2.0
    for made in (widen(trained, N_NEW), duplicate(trained), fresh(trained, 1)):
        assert made.optimizer is optimizer
        assert made.gradient_clip_norm == 2.0


def test_duplicates_are_equal_and_independent(trained):
    copy = duplicate(trained)
    assert same_weights(copy, trained)
    copy.W_dec.data.add_(1)
    assert not same_weights(copy, trained)


def test_fresh_sae_is_the_one_that_its_seed_would_have_made(trained):
    first, again, other = fresh(trained, 3), fresh(trained, 3), fresh(trained, 4)
    assert torch.equal(first.W_dec, again.W_dec)
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_dec, other.W_dec)
    assert not first.initialized
    assert first.b_enc.abs().sum() == 0


@pytest.mark.parametrize(("arguments", "key"), [({"n_new": 0}, "hedge.n_new"), ({"n_new": 1, "norm": 0}, "hedge.new_norm")])
def test_impossible_widening_names_its_key(arguments, key):
    with pytest.raises(UserError, match=key):
        widen(TopKSAE(D_IN, D_SAE, k=3), **arguments)
