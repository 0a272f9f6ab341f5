"""Fits through Lightning: honest step counts, the same result for the same seed, resumed or not, whatever the chunk."""

import functools
import logging

import lightning as L
import pytest
import torch

from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import AbsTopKSAE, BatchTopKSAE, Initialization, JumpReLUSAE, MatryoshkaSAE, TopKSAE, VanillaSAE
from hedgelab.saes.mitigations import FrozenDecoder, OrthogonalDecoder, OwnRowCredit
from tests.saes.comparison import same_weights

FEATURES = [0.3, {"f0": 0.3, "not f0": 0.1}, 0.2, {"f2": 0.4, "otherwise": 0}]
MAKERS = {
    "vanilla": functools.partial(VanillaSAE, d_sae=3, l1_coefficient=0.01, l1_warmup_steps=30),
    "abs_topk": functools.partial(AbsTopKSAE, d_sae=6, k=2, dead_after_steps=5),
    "topk": functools.partial(TopKSAE, d_sae=6, k=2, dead_after_steps=5),
    "batch_topk": functools.partial(BatchTopKSAE, d_sae=6, k=2, dead_after_steps=5),
    "jumprelu": functools.partial(JumpReLUSAE, d_sae=6, l0_coefficient=0.01),
}


def make(kind, seed):
    init = Initialization(seed=seed, b_dec="mean")
    if kind in ("matryoshka", "mitigated"):
        some = [OrthogonalDecoder(chunk=3, every=3), OwnRowCredit(start=30), FrozenDecoder(minimum_cosine=0.9)]
        mitigations = some if kind == "mitigated" else None
        inner = functools.partial(MAKERS["batch_topk"], init=init)
        return MatryoshkaSAE(10, inner, [2, 6], beta=0.5, mitigations=mitigations)
    return MAKERS[kind](10, init=init)


pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def fit(kind, seed=0, steps=60, chunk=10, folder=None, resume=None, callbacks=(), **trainer):
    data = ToyDataModule(ConditionalFiring(FEATURES), d_in=10, batch_size=32, seed=seed, chunk_steps=chunk, val_batches=2)
    sae = make(kind, seed)
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=20, save_top_k=-1)
    fitted = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=folder is not None,
        callbacks=[*callbacks, *([checkpoint] if folder else [])],
        log_every_n_steps=20,
        num_sanity_val_steps=0,
        **trainer,
    )
    fitted.fit(sae, datamodule=data, ckpt_path=resume)
    assert fitted.global_step == steps
    return sae, fitted


@pytest.mark.parametrize("kind", [*MAKERS, "matryoshka"])
def test_same_seed_same_weights_other_seed_others(kind):
    first, _ = fit(kind)
    again, _ = fit(kind)
    other, _ = fit(kind, seed=1)
    assert same_weights(first, again)
    assert not same_weights(first, other)


@pytest.mark.parametrize("kind", ["vanilla", "matryoshka"])
def test_chunks_change_nothing(kind):
    assert same_weights(fit(kind, chunk=1)[0], fit(kind, chunk=20)[0])


@pytest.mark.parametrize("kind", [*MAKERS, "matryoshka", "mitigated"])
def test_resumed_fits_end_bit_identical(kind, tmp_path):
    whole, _ = fit(kind, folder=tmp_path / "whole")
    (middle,) = (tmp_path / "whole").glob("step=40.ckpt")
    resumed, _ = fit(kind, folder=tmp_path / "resumed", resume=str(middle))
    assert same_weights(whole, resumed)


class Validations(L.Callback):
    """Notes at which steps validation ran, and what it measured."""

    def __init__(self):
        self.steps = []

    def on_validation_end(self, trainer, module):
        self.steps.append(trainer.global_step)
        self.explained_variance = float(trainer.callback_metrics["val/explained_variance"])


def test_validation_runs_at_the_end_and_at_intervals_of_steps():
    seen = Validations()
    fit("topk", callbacks=[seen])
    assert seen.steps == [60]
    assert -1 < seen.explained_variance <= 1
    often = Validations()
    fit("topk", callbacks=[often], val_check_interval=20, check_val_every_n_epoch=None)
    assert often.steps == [20, 40, 60]


def test_loss_falls_and_is_reported_as_the_mean_over_the_interval():
    _, early = fit("vanilla", steps=20)
    _, late = fit("vanilla", steps=2000, chunk=100)
    assert float(late.callback_metrics["train/loss"]) < 0.5 * float(early.callback_metrics["train/loss"])


def test_gradient_clipping_limits_what_the_optimiser_sees():
    norms = []

    class Spy(VanillaSAE):
        def before_optimizer_step(self):
            norms.append(torch.stack([p.grad.norm() for p in self.parameters()]).norm())

    sae = Spy(10, 3, l1_coefficient=0.0, gradient_clip_norm=1e-3)
    data = ToyDataModule(ConditionalFiring(FEATURES), d_in=10, batch_size=32, seed=0)
    trainer = L.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(sae, datamodule=data)
    assert len(norms) == 3
    assert max(norms) <= 1e-3 * 1.001


def test_a_fit_needs_an_end():
    data = ToyDataModule(ConditionalFiring(FEATURES), d_in=10, batch_size=32, seed=0)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        trainer.fit(make("topk", 0), datamodule=data)
