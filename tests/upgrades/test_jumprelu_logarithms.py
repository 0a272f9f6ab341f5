"""A group's checkpoint of before JumpReLU SAEs trained θ itself goes on: thresholds, optimiser states, schedules.

``jumprelu_of_2874e67.ckpt`` is of step 20 of 40: ``a`` is a JumpReLU SAE, ``c`` one in a matryoshka, ``b`` a TopK SAE.
"""

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.saes import Initialization, JumpReLUSAE, MatryoshkaSAE, SAEGroup, TopKSAE, sae_from_checkpoint

OLD = Path(__file__).with_name("jumprelu_of_2874e67.ckpt")
INIT, COSINE = Initialization(seed=1), partial(CosineAnnealingLR, T_max=100)


def logarithms(prefix):
    return torch.load(OLD, weights_only=True)["state_dict"][f"{prefix}.log_threshold"]


def test_its_saes_have_the_thresholds_that_they_had():
    for member, prefix in (("a", "members.a"), ("c", "members.c.inner")):
        sae = sae_from_checkpoint(OLD, member=member)
        torch.testing.assert_close(getattr(sae, "inner", sae).thresholds().detach(), logarithms(prefix).exp())


def test_its_fit_goes_on():
    def jumprelu(d_in):
        return JumpReLUSAE(d_in, 12, l0_coefficient=0.01, init=INIT, lr_scheduler=COSINE)

    topk = TopKSAE(8, 12, k=2, lr_scheduler=partial(LambdaLR, lr_lambda=lambda step: 1.0))
    group = SAEGroup({"a": jumprelu(8), "b": topk, "c": MatryoshkaSAE(8, jumprelu, [4, 12])})
    toy = ToyDataModule(IndependentFiring([0.3] * 10), d_in=8, batch_size=64, seed=0, val_batches=1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=40, accelerator="cpu", limit_val_batches=0, **quiet)
    trainer.fit(group, datamodule=toy, ckpt_path=OLD)
    moved = group.members["a"].thresholds().detach() - logarithms("members.a").exp()
    assert 0.02 < float(moved.abs().max()) < 0.1  # 20 steps at ten times 3e-4
    groups = trainer.optimizers[0].param_groups
    rates = [group["lr"] for group in groups]
    assert [len(group["params"]) for group in groups] == [4, 1, 4, 4, 1]
    assert rates[1] == pytest.approx(10 * rates[0])
    assert rates[0] < rates[2]  # the cosine's, a constant one
