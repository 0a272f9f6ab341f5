"""Groups: each member trained exactly as if alone, honest steps, exact resume."""

import functools

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import LinearLR

from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import BatchTopKSAE, Initialization, JumpReLUSAE, MatryoshkaSAE, SAEGroup, TopKSAE, VanillaSAE, duplicate
from hedgelab.training.steps import StepBatches
from tests.saes.comparison import same_weights

D_IN = 10


def members():
    batch_topk = functools.partial(BatchTopKSAE, d_sae=6, k=2, dead_after_steps=5)
    return {
        "vanilla": VanillaSAE(
            D_IN, 4, 1e-2, l1_warmup_steps=7, lr_scheduler=lambda o: LinearLR(o, total_iters=20), gradient_clip_norm=0.1
        ),
        "sgd/topk": TopKSAE(D_IN, 5, k=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
        "batch_topk": batch_topk(D_IN, init=Initialization(b_dec="mean", seed=3)),
        "jumprelu": JumpReLUSAE(D_IN, 7, 1e-3, normalize_decoder=True),
        "matryoshka": MatryoshkaSAE(D_IN, batch_topk, [2, 6], auxiliary_per_level=True),
    }


class OtherStream(ToyDataModule):
    """A toy whose batches give one member data of its own: those of the batch after."""

    def batches(self, stage, start, stop):
        for index in range(start, stop):
            batch = self.batch(stage, index)
            yield StepBatches(batch, {"other": self.batch(stage, index + 1)}) if stage == "train" else batch


def toy(cls=ToyDataModule, **options):
    return cls(IndependentFiring([0.3] * 6), d_in=D_IN, batch_size=32, val_batches=2, seed=0, **options)


def fit(module, data, max_steps=20, ckpt_path=None, **options):
    torch.set_num_threads(1)
    settings = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=max_steps, accelerator="cpu", num_sanity_val_steps=0, **{**settings, **options})
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("chunk_steps", [1, 10])
def test_members_end_as_if_trained_alone(chunk_steps):
    group = SAEGroup(members())
    trainer = fit(group, toy(chunk_steps=chunk_steps), log_every_n_steps=10)
    assert trainer.global_step == 20
    for name, alone in members().items():
        single = fit(alone, toy(), log_every_n_steps=10)
        assert same_weights(group.saes()[name], alone), name
        for key in ("train/loss", "val/explained_variance"):
            torch.testing.assert_close(trainer.callback_metrics[f"{name}/{key}"], single.callback_metrics[key])


def test_resumed_group_ends_the_same(tmp_path):
    undisturbed, interrupted, resumed = (SAEGroup(members()) for _ in range(3))
    fit(undisturbed, toy(chunk_steps=1))
    trainer = fit(interrupted, toy(chunk_steps=1), max_steps=9)
    trainer.save_checkpoint(tmp_path / "group.ckpt")
    assert fit(resumed, toy(chunk_steps=1), ckpt_path=tmp_path / "group.ckpt").global_step == 20
    for name, sae in undisturbed.saes().items():
        assert same_weights(sae, resumed.saes()[name]), name


def test_a_member_may_see_other_data():
    start = TopKSAE(D_IN, 5, k=2)
    group = SAEGroup({"shared": duplicate(start), "other": duplicate(start)})
    fit(group, toy(OtherStream))
    fit(start, toy())
    assert same_weights(group.saes()["shared"], start)
    assert not same_weights(group.saes()["other"], start)


def test_initialized_members_are_not_initialised_again():
    sae = BatchTopKSAE(D_IN, 5, k=2, init=Initialization(b_dec="mean"), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    sae.initialized = True
    fit(SAEGroup({"old": sae}), toy(), max_steps=1)
    assert not sae.b_dec.any()


def test_member_loggers_get_their_own_numbers():
    class Numbers:
        def __init__(self):
            self.seen = {}

        def log_metrics(self, values, step):
            self.seen[step] = self.seen.get(step, {}) | values

    loggers = {"a": Numbers(), "b": Numbers()}
    fit(SAEGroup({"a": TopKSAE(D_IN, 5, k=2), "b": TopKSAE(D_IN, 9, k=2)}, loggers), toy(), log_every_n_steps=10)
    assert set(loggers["a"].seen) == {10, 20}
    assert {"train/loss", "val/l0"} <= loggers["a"].seen[20].keys()
    assert loggers["a"].seen[20]["train/loss"] != loggers["b"].seen[20]["train/loss"]


@pytest.mark.parametrize(
    "wrong", [{}, {"a": TopKSAE(3, 5, k=2), "b": TopKSAE(4, 5, k=2)}, {"a.b": TopKSAE(3, 5, k=2)}], ids=str
)
def test_impossible_groups_are_refused(wrong):
    with pytest.raises(UserError, match="members"):
        SAEGroup(wrong)
