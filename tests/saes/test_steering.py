"""Coefficients steered to a target L0, and the quadratic penalty: closed forms, float64 references, resume, a small twin."""

import functools
import math
from itertools import pairwise

import lightning as L
import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.kernels import ops
from hedgelab.saes import Initialization, JumpReLUSAE, MatryoshkaSAE, VanillaSAE
from hedgelab.saes.ensemble import EnsembleSAE
from hedgelab.saes.steering import DAMPING, LARGEST_STEP, RATE, steering_step
from tests.saes.comparison import same_weights

INIT = Initialization(seed=1)
FACTORIES = {
    "vanilla": functools.partial(VanillaSAE, d_sae=12, target_l0=3, init=INIT),
    "coefficient": functools.partial(JumpReLUSAE, d_sae=12, target_l0=3, init=INIT),
    "penalty": functools.partial(JumpReLUSAE, d_sae=12, target_l0=3, l0_control="penalty", init=INIT),
}


def toy(**arguments):
    return ToyDataModule(IndependentFiring([0.3] * 10), d_in=8, batch_size=64, seed=0, val_batches=1, **arguments)


def fit(sae, steps, ckpt_path=None, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", **quiet, **{"enable_checkpointing": False, **settings})
    trainer.fit(sae, datamodule=toy(), ckpt_path=ckpt_path)
    return trainer


def step(before, now, target=20.0):
    return float(steering_step(*(torch.tensor(value, dtype=torch.float64) for value in (before, now)), target))


def test_a_step_follows_its_formula_and_is_bounded():
    assert step(24.0, 24.0) == pytest.approx(RATE * math.log(1.2))
    assert step(24.0, 23.9) == pytest.approx(RATE * math.log(23.9 / 20) + DAMPING * math.log(23.9 / 24))
    assert step(20.0, 20.0) == 0
    assert step(2000.0, 2000.0) == pytest.approx(RATE)  # the integral part
    assert step(20.0, 40.0) == LARGEST_STEP
    assert step(20.0, 0.0) == step(20.0, 10.0) == -LARGEST_STEP


def test_the_steady_state_is_the_coefficient_that_gives_the_target():
    """A plant that follows ``L0 = 60 λ^-1.7`` with a lag of 300 steps comes to rest at ``λ = (60 / 20)^(1 / 1.7)``."""
    log_l0 = log_factor = torch.tensor(math.log(60.0), dtype=torch.float64) * torch.tensor([1.0, 0.0])
    log_l0, log_factor = log_l0[:1].squeeze(), log_factor[1:].squeeze()
    seen = []
    for _ in range(6000):
        later = log_l0 + (math.log(60.0) - 1.7 * log_factor - log_l0) / 300
        log_factor = log_factor + steering_step(log_l0.exp(), later.exp(), 20.0)
        log_l0 = later
        seen.append(float(log_l0.exp()))
    assert seen[-1] == pytest.approx(20, rel=1e-3)
    assert float(log_factor.exp()) == pytest.approx(3 ** (1 / 1.7), rel=1e-3)
    assert min(seen) > 0.9 * 20  # without the proportional part it undershoots much more


@pytest.mark.parametrize("kind", FACTORIES)
def test_a_stopped_fit_goes_on_as_if_it_had_not_stopped(kind, tmp_path):
    straight, first, second = (FACTORIES[kind](8) for _ in range(3))
    fit(straight, 20)
    trainer = fit(first, 10, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "ten.ckpt")
    fit(second, 20, tmp_path / "ten.ckpt")
    assert same_weights(straight, second)
    assert (straight.log_factor is None) == (kind == "penalty")
    assert kind == "penalty" or float(straight.log_factor) != float(first.log_factor) != 0


@pytest.mark.parametrize("kind", FACTORIES)
def test_members_of_an_ensemble_are_steered_as_if_alone(kind):
    ensemble = EnsembleSAE([FACTORIES[kind](8, init=Initialization(seed=seed)) for seed in range(2)])
    ensemble.fit(functools.partial(toy().batch, "train"), 15)
    for seed in range(2):
        alone = FACTORIES[kind](8, init=Initialization(seed=seed))
        optimizer = alone.configure_optimizers()
        for number in range(15):
            terms = alone.loss(toy().batch("train", number))
            terms.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            alone.after_step(terms)
        for name, value in ensemble.member(seed).state_dict().items():
            torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-5, atol=1e-5, msg=name)


def test_steering_waits_for_the_warm_up_and_counts_the_whole_sae():
    inner = functools.partial(VanillaSAE, d_sae=12, l1_warmup_steps=3, target_l0=3, init=INIT)
    sae, batch = MatryoshkaSAE(8, inner, [4, 12]), toy().batch("train", 0)
    for number in range(5):
        terms = sae.loss(batch)
        assert (float(sae.inner.log_factor) != 0) == (number > 3)
        sae.after_step(terms)
    assert float(sae.inner.mean_l0) == pytest.approx(float(terms.codes.active_per_example().double().mean()))
    assert sae.training_numbers() == {"l1_coefficient": pytest.approx(float(sae.inner.log_factor.exp()))}


def quadratic(sae, batch, theta):
    """``λ (2 / L0*) (L0 - L0*)²`` and L0's parts, whose straight-through gradients are those of the rectangle kernel."""
    pre = (batch.x - sae.b_dec) @ sae.W_enc + sae.b_enc
    near = ((pre - theta).abs() < sae.bandwidth / 2).double().detach()
    rates = ((pre > theta).double() - near / sae.bandwidth * (theta - theta.detach())).mean(0)
    return sae.l0_coefficient * 2 / sae.target_l0 * (rates.sum() - sae.target_l0) ** 2, rates


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("target", [1.5, 9.0])
def test_the_quadratic_penalty_equals_its_formula(target, path):
    sae = JumpReLUSAE(8, 12, threshold=0.4, bandwidth=0.5, target_l0=target, l0_control="penalty", init=INIT).double()
    batch = Batch(toy().batch("train", 0).x.double())
    theta = sae.theta.detach().clone().requires_grad_()
    expected, rates = quadratic(sae, batch, theta)
    expected.backward()
    with ops.backend(path):
        activation = sae.activate(batch)
        activation.penalty.sum().backward()
    torch.testing.assert_close(activation.penalty.sum(), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(sae.theta.grad, theta.grad, rtol=1e-10, atol=1e-12)
    assert theta.grad.abs().max() > 0
    share = rates.detach() / rates.detach().sum()
    torch.testing.assert_close(activation.penalty.detach(), expected.detach() * share)  # a level pays its latents' part


def test_the_penalty_counts_the_global_batch():
    """Two ranks with unlike halves of a batch: the mean of their gradients is that of one rank with all of it."""
    sae = FACTORIES["penalty"](8, bandwidth=0.5).double()
    x = toy().batch("train", 0).x.double() * torch.linspace(0.1, 3, 64, dtype=torch.float64)[:, None]
    sae.activate(Batch(x)).penalty.sum().backward()
    expected, sae.theta.grad = sae.theta.grad, None
    both = [sae.activate(Batch(half)).codes.rates.sum().detach() for half in x.chunk(2)]

    class OneOfTwo:
        def mean(self, value):
            return sum(both) / 2

    sae.ranks = OneOfTwo()
    for half in x.chunk(2):
        (sae.activate(Batch(half)).penalty.sum() / 2).backward()
    torch.testing.assert_close(sae.theta.grad, expected, rtol=1e-10, atol=1e-12)


def test_thresholds_never_fall_below_zero():
    sae = JumpReLUSAE(8, 12, l0_coefficient=0.0, init=INIT)
    sae.theta.data.fill_(-0.2)
    sae.after_step(sae.loss(toy().batch("train", 0)))
    assert not sae.theta.any()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: VanillaSAE(8, 12), "model.l1_coefficient: give it, or the L0"),
        (lambda: JumpReLUSAE(8, 12), "model.l0_coefficient: give it, or the L0"),
        (lambda: VanillaSAE(8, 12, 0.0, target_l0=3), "model.l1_coefficient: must be above 0"),
        (lambda: VanillaSAE(8, 12, target_l0=13), "model.target_l0: must be above 0 and at most d_sae = 12, got 13"),
        (lambda: JumpReLUSAE(8, 12, 1.0, l0_control="penalty"), "model.l0_control: penalty pulls toward model.target_l0"),
        (lambda: FACTORIES["vanilla"](8).loss(toy(sampling="population").batch("train", 0)), "model.target_l0: needs"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(make, said):
    with pytest.raises(UserError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_quadratic_penalty_works_on_populations():
    batch = toy(sampling="population").batch("train", 0)
    assert FACTORIES["penalty"](8).loss(batch).terms["l0_penalty"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", FACTORIES)
def test_from_the_default_start_a_small_twin_of_synth_sae_bench_ends_within_five_percent_of_its_target(kind):
    """1 024 features of Zipf rates in 96 dimensions, magnitudes 4 to 5, 256 latents; batches of 256."""
    law = torch.arange(1, 1025, dtype=torch.float64) ** -0.5
    rates = 5e-4 + (law - law[-1]) / (law[0] - law[-1]) * (0.4 - 5e-4)
    means = torch.linspace(5, 4, 1024).tolist()
    data = ToyDataModule(IndependentFiring(rates.tolist()), 96, 256, magnitude_mean=means, magnitude_std=0.9, bias=0.5, seed=0)
    sae = FACTORIES[kind](96, d_sae=256, target_l0=25, init=Initialization(decoder_norm=0.1, seed=0))
    optimizer = sae.configure_optimizers()
    found = []
    for number in range(7000):
        terms = sae.loss(data.batch("train", number).x)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(terms)
        if number >= 6900:
            found.append(float(terms.codes.active_per_example().double().mean()))
    assert sum(found) / len(found) == pytest.approx(25, rel=0.05)
    assert all(abs(math.log(b / a)) < 0.3 for a, b in pairwise(found))
