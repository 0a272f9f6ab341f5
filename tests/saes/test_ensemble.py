"""Every member of an ensemble ends where it would have ended alone."""

import functools

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.data.toy import ConditionalFiring, IndependentFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import BatchTopKSAE, Initialization, JumpReLUSAE, MatryoshkaSAE, TopKSAE, VanillaSAE
from hedgelab.saes.ensemble import EnsembleSAE, stack_batches

STEPS, D_IN = 60, 5
COMMON = {"optimizer": functools.partial(torch.optim.Adam, lr=3e-3)}


def alone(sae, batches):
    optimizer = sae.configure_optimizers()
    for step in range(STEPS):
        sae.steps_done = step
        result = sae.loss(batches(step))
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
        sae.after_step(result)
    return sae


def assert_same(a, b):
    for (name, value), (_, other) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-5, rtol=1e-5, msg=name, equal_nan=True)


def init(seed):
    return Initialization(seed=seed, decoder_norm=0.5)


def matryoshka(seed, beta, **arguments):
    inner = functools.partial(VanillaSAE, d_sae=4, l1_coefficient=0.02 + 0.01 * seed, init=init(seed), **COMMON)
    return MatryoshkaSAE(D_IN, lambda d_in: inner(d_in), levels=[1, 4], beta=beta, **arguments)


KINDS = {
    "vanilla": lambda seed: VanillaSAE(D_IN, 4, l1_coefficient=0.05 * seed, l1_warmup_steps=20, init=init(seed), **COMMON),
    "widths": lambda seed: VanillaSAE(D_IN, 2 + seed, l1_coefficient=0.05, init=init(seed), **COMMON),
    "topk": lambda seed: TopKSAE(D_IN, 4, k=2, auxiliary_coefficient=0.0, init=init(seed), **COMMON),
    "batch_topk": lambda seed: BatchTopKSAE(D_IN, 4, k=2, auxiliary_coefficient=0.0, init=init(seed), **COMMON),
    "jumprelu": lambda seed: JumpReLUSAE(D_IN, 4, l0_coefficient=0.01 * seed, init=init(seed), **COMMON),
    "matryoshka": lambda seed: matryoshka(seed, (0.0, 0.25, 3.0)[seed]),
    "detached": lambda seed: matryoshka(seed, 1.0, detached=True),
    "credit": lambda seed: matryoshka(seed, 0.5, credit=0.5 * seed),
    "adaptive": lambda seed: matryoshka(seed, 0.5, adaptive=True),
}


@pytest.mark.parametrize("sampling", ["samples", "population"])
@pytest.mark.parametrize("kind", KINDS)
def test_members_train_as_if_alone(kind, sampling):
    toys = [
        ToyDataModule(IndependentFiring([0.5, rate, 0.3]), d_in=D_IN, batch_size=16, sampling=sampling, seed=1)
        for rate in (0.1, 0.4, 0.7)
    ]
    make = KINDS[kind]
    ensemble = EnsembleSAE([make(seed) for seed in range(3)])
    ensemble.fit(lambda step: stack_batches([toy.batch("train", step) for toy in toys]), STEPS)
    for seed, toy in enumerate(toys):
        assert_same(ensemble.member(seed), alone(make(seed), lambda step, toy=toy: toy.batch("train", step)))


def test_shared_batches_and_folded_weights():
    toy = ToyDataModule(IndependentFiring([0.5, 0.3]), d_in=D_IN, sampling="population")
    saes = [VanillaSAE(D_IN, 1 + seed, l1_coefficient=0.1, init=init(seed)) for seed in range(2)]
    before = [sae.W_dec.clone() for sae in saes]
    ensemble = EnsembleSAE([*saes, saes[0]])
    ensemble.fit(toy.batch("train", 0), 5)
    assert all(torch.equal(sae.W_dec, old) for sae, old in zip(saes, before, strict=True))
    folded = ensemble.folded()
    torch.testing.assert_close(folded.W_dec[0], folded.W_dec[2])
    torch.testing.assert_close(folded.W_dec[1], ensemble.member(1).folded().W_dec)
    assert folded.W_dec[0, 1].abs().sum() == 0
    own = torch.stack([ensemble.member(i).loss(toy.batch("train", 0)).total for i in range(3)])
    torch.testing.assert_close(ensemble.losses(toy.batch("train", 0)), own)


def test_frozen_parameters_stay():
    toy = ToyDataModule(IndependentFiring([0.5, 0.3]), d_in=D_IN, sampling="population")
    sae = VanillaSAE(D_IN, 2, l1_coefficient=0.1)
    sae.W_dec.requires_grad_(False)
    ensemble = EnsembleSAE([sae])
    ensemble.fit(toy.batch("train", 0), 5)
    assert torch.equal(ensemble.member(0).W_dec, sae.W_dec)
    assert not torch.equal(ensemble.member(0).W_enc, sae.W_enc)


def test_populations_of_different_size_are_padded():
    toys = [
        ToyDataModule(ConditionalFiring([0.3, {"f0": 0.2, "not f0": other}]), d_in=3, sampling="population")
        for other in (0, 0.1)
    ]
    batches = [toy.batch("train", 0) for toy in toys]
    stacked = stack_batches(batches)
    assert stacked.x.shape == (2, 4, 3)
    torch.testing.assert_close(stacked.weight.sum(1), torch.ones(2))
    sae = VanillaSAE(3, 2, l1_coefficient=0.1)
    own = torch.stack([sae.loss(batch).total for batch in batches])
    torch.testing.assert_close(EnsembleSAE([sae, sae]).losses(stacked), own)


def test_mistakes():
    with pytest.raises(UserError, match="at least one"):
        EnsembleSAE([])
    with pytest.raises(UserError, match="members must agree in all but l1_coefficient"):
        EnsembleSAE([VanillaSAE(3, 2, 0.1), TopKSAE(3, 2, k=1)])
    with pytest.raises(UserError, match="members must agree"):
        EnsembleSAE([TopKSAE(3, 2, k=1, auxiliary_coefficient=0.0), TopKSAE(3, 2, k=2, auxiliary_coefficient=0.0)])
    with pytest.raises(UserError, match="auxiliary_coefficient: cannot"):
        EnsembleSAE([TopKSAE(3, 2, k=1)])
    with pytest.raises(UserError, match="normalize_decoder"):
        EnsembleSAE([VanillaSAE(3, 2, 0.1, normalize_decoder=True)])
    with pytest.raises(UserError, match="same size"):
        stack_batches([Batch(torch.zeros(2, 3)), Batch(torch.zeros(4, 3))])
