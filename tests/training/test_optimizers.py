"""Optimisers and schedules that cannot train an SAE are refused before anything begins."""

import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import optim
from torch.optim import lr_scheduler

from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import SAEGroup, TopKSAE, VanillaSAE
from hedgelab.training.optimizers import make_optimizer

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(model, **flags):
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(max_steps=20, limit_val_batches=0, **{**quiet, "accelerator": "cpu", **flags})
    data = ToyDataModule(IndependentFiring([0.3] * 6), d_in=6, batch_size=16, seed=0)
    trainer.fit(model, datamodule=data)
    return data


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": optim.LBFGS}, "model.optimizer: LBFGS evaluates"),
        ({"optimizer": optim.SparseAdam}, "model.optimizer: SparseAdam takes sparse gradients"),
        ({"optimizer": functools.partial(optim.Adam, fused=True, foreach=True)}, "model.optimizer: .*fused.*foreach"),
        ({"optimizer": functools.partial(optim.Adam, lr=-1.0)}, "model.optimizer: Invalid learning rate"),
        ({"lr_scheduler": lr_scheduler.ReduceLROnPlateau}, "model.lr_scheduler: ReduceLROnPlateau follows a metric"),
        (
            {"lr_scheduler": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=19)},
            "model.lr_scheduler: OneCycleLR ends after 19 steps, the run after 20; set model.lr_scheduler.total_steps to 20",
        ),
        ({"lr_scheduler": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1)}, "model.lr_scheduler: You must define"),
    ],
)
def test_what_cannot_train_is_refused_before_data_is_made(options, said, grouped, monkeypatch):
    monkeypatch.setattr(ToyDataModule, "setup", lambda *_: pytest.fail("too late"))
    model = TopKSAE(6, 5, k=2, **options)
    with pytest.raises(UserError, match=said) as error:
        fit(SAEGroup({"a": model}) if grouped else model)
    assert "\n" not in str(error.value)


def test_a_schedule_as_long_as_the_run_trains_to_its_end():
    schedule = functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20)
    fit(TopKSAE(6, 5, k=2, lr_scheduler=schedule))


def test_optimisers_are_fused_unless_something_else_is_asked_for():
    weights = [torch.nn.Parameter(torch.zeros(3))]
    assert make_optimizer(optim.Adam, weights).param_groups[0]["fused"]
    assert not make_optimizer(optim.Adam, weights, fused=False).param_groups[0]["fused"]
    assert not make_optimizer(functools.partial(optim.Adam, fused=False), weights).param_groups[0]["fused"]
    assert not make_optimizer(functools.partial(optim.Adam, foreach=True), weights).param_groups[0]["fused"]


class Norms(L.Callback):
    """Norms of the weights' movement in each step of SGD with rate 1, which are the norms of the gradients used."""

    def __init__(self):
        self.seen, self.before = [], None

    def on_train_batch_start(self, trainer, module, *_):
        self.before = [parameter.detach().clone() for parameter in module.parameters()]

    def on_train_batch_end(self, trainer, module, *_):
        moved = [(b - p.detach()).norm() for b, p in zip(self.before, module.parameters(), strict=True)]
        self.seen.append(float(torch.stack(moved).norm()))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_gradient_scaler_has_unscaled_gradients_before_they_are_clipped(grouped):
    """With scaled gradients the step would be 2^10 times too short, or clipping would not limit it."""
    sgd = functools.partial(optim.SGD, lr=1.0)
    model = VanillaSAE(6, 5, 0.0, optimizer=sgd, gradient_clip_norm=1e-2)
    norms = Norms()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(SAEGroup({"a": model}) if grouped else model, plugins=[plugin], callbacks=[norms])
    assert norms.seen == pytest.approx([1e-2] * 20, rel=1e-3)


def test_a_gradient_scaler_and_adam_agree_with_training_without(monkeypatch):
    adam = functools.partial(optim.Adam, lr=1e-2)
    plain, scaled = (VanillaSAE(6, 5, 0.0, optimizer=adam, gradient_clip_norm=1e-1) for _ in range(2))
    scaled.load_state_dict(plain.state_dict())
    fit(plain)
    fit(scaled, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))])
    torch.testing.assert_close(scaled.W_dec, plain.W_dec, atol=2e-2, rtol=2e-2)
