"""Frozen and soft-frozen weights: they stay where they were, or near it, and everything else trains."""

import functools

import pytest
import torch
from torch.nn.functional import cosine_similarity

from hedgelab.errors import UserError
from hedgelab.saes import BatchTopKSAE, Initialization, MatryoshkaSAE, VanillaSAE, load_sae
from hedgelab.saes.mitigations import FrozenDecoder, FrozenEncoder
from hedgelab.saes.mitigations.frozen import turned_back
from hedgelab.saes.widen import widen

OPTIMIZERS = [functools.partial(torch.optim.Adam, lr=1e-2), functools.partial(torch.optim.SGD, lr=1e-1, momentum=0.9)]


def train(sae, steps=60):
    generator = torch.Generator().manual_seed(1)
    optimizer = sae.optimizer(sae.parameters())
    for step in range(steps):
        sae.steps_done = step
        terms = sae.loss(torch.randn(64, 8, generator=generator).relu())
        optimizer.zero_grad()
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.after_step(terms)
    return sae


def make(*mitigations, **arguments):
    return BatchTopKSAE(8, 12, k=3, init=Initialization(decoder_norm=0.7, seed=0), mitigations=list(mitigations), **arguments)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_frozen_decoder_stays_and_the_rest_trains(optimizer, nested, tmp_path):
    sae = make(FrozenDecoder(), optimizer=optimizer)
    if nested:
        sae = MatryoshkaSAE(8, make(optimizer=optimizer), [4, 12], mitigations=[FrozenDecoder()])
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    train(sae)
    moved = {name.removeprefix("inner.") for name, value in sae.state_dict().items() if not torch.equal(value, before[name])}
    assert moved >= {"W_enc", "b_enc", "b_dec"}
    assert "W_dec" not in moved
    assert sae.W_dec.grad is None
    sae.save(tmp_path)
    assert not load_sae(tmp_path).W_dec.requires_grad


def test_sae_s_say_which_control_they_are():
    assert make(FrozenDecoder(minimum_cosine=0.8)).control == "soft-frozen decoder"
    assert MatryoshkaSAE(8, make(), [4, 12], mitigations=[FrozenDecoder()]).control == "frozen decoder"
    assert MatryoshkaSAE(8, make(FrozenEncoder()), [4, 12]).control == "frozen encoder"
    assert make().control == ""


def test_a_frozen_encoder_stays_and_the_rest_trains():
    sae = make(FrozenEncoder())
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    train(sae)
    assert torch.equal(sae.W_enc, before["W_enc"])
    assert not torch.equal(sae.W_dec, before["W_dec"])
    assert not torch.equal(sae.b_enc, before["b_enc"])


@pytest.mark.parametrize("norm_kept", [False, True])
def test_soft_frozen_rows_stay_in_their_cone(norm_kept, tmp_path):
    start = make().W_dec.detach().clone()
    free = cosine_similarity(train(make(optimizer=OPTIMIZERS[0]), 200).W_dec, start)
    sae = train(make(FrozenDecoder(minimum_cosine=0.8), optimizer=OPTIMIZERS[0], normalize_decoder=norm_kept), 200)
    kept = cosine_similarity(sae.W_dec, start)
    assert free.min() < 0.7  # without it they leave
    assert kept.min() > 0.8 - 1e-6
    assert kept.min() < 0.81  # some rest on the edge
    assert ((sae.W_dec.norm(dim=1) - 1).abs() < 1e-5).all() == norm_kept
    sae.save(tmp_path)
    assert torch.equal(load_sae(tmp_path).mitigations[0].start, sae.mitigations[0].start)


def test_a_stopped_run_keeps_its_start():
    whole, first = (make(FrozenDecoder(minimum_cosine=0.9), optimizer=OPTIMIZERS[1]) for _ in range(2))
    train(whole, 30)
    for step in range(30):  # as a run that is stopped after every step
        sae = make(FrozenDecoder(minimum_cosine=0.9), optimizer=OPTIMIZERS[1])
        sae.load_state_dict(first.state_dict())
        assert torch.equal(sae.mitigations[0].start, first.mitigations[0].start)
        first = sae
        terms = sae.loss(torch.ones(4, 8))
        sae.after_step(terms)
        assert step == 0 or sae.mitigations[0].start.any(1).all()
    torch.testing.assert_close(first.mitigations[0].start, whole.mitigations[0].start)


def test_new_latents_start_where_they_were_put():
    sae = train(make(FrozenDecoder(minimum_cosine=0.9), optimizer=OPTIMIZERS[0]))
    wide = widen(sae, 2, norm=0.5)
    new = wide.W_dec[12:].detach().clone()
    start = sae.mitigations[0].start
    train(wide)
    assert cosine_similarity(wide.W_dec[:12], start).min() > 0.9 - 1e-6
    assert cosine_similarity(wide.W_dec[12:], new).min() > 0.9 - 1e-6


def test_turned_back_is_the_nearest_of_the_cone():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    start = torch.nn.functional.normalize(torch.randn(50, 6, generator=generator, dtype=torch.float64), dim=1)
    turned = turned_back(rows, start, 0.6)
    cosines, before = cosine_similarity(turned, start), cosine_similarity(rows, start)
    torch.testing.assert_close(cosines, before.clamp_min(0.6))
    torch.testing.assert_close(turned.norm(dim=1), rows.norm(dim=1))
    # The nearest direction lies in the plane of both: angles add up.
    angle = before.acos() - cosines.acos()
    torch.testing.assert_close(cosine_similarity(turned, rows), angle.cos())
    torch.testing.assert_close(turned_back(-2 * start, start, 0.6), 2 * start)


@pytest.mark.parametrize("cosine", [0.0, 1.0, -0.5])
def test_mistakes(cosine):
    with pytest.raises(UserError, match=r"model\.mitigations\.minimum_cosine: must lie between 0 and 1, or be null"):
        FrozenDecoder(cosine)


def test_penalties_of_decoder_norms_do_without_their_gradient():
    sae = VanillaSAE(8, 12, l1_coefficient=0.1, mitigations=[FrozenDecoder()])
    sae.loss(torch.ones(4, 8)).total.backward()
    assert sae.W_dec.grad is None
    assert sae.W_enc.grad.any()
