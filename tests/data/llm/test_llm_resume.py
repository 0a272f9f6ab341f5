"""A signal within a block of activations, live or cached: gone on with, the weights are those of a run never stopped."""

import logging
import os
import signal

import lightning as L
import pytest
import torch

from hedgelab.data.llm.cache_writing import write_cache
from hedgelab.errors import Stopped
from hedgelab.saes import BatchTopKSAE
from hedgelab.training.checkpoints import LAST, RunCheckpoint
from tests.saes.comparison import same_weights

pytestmark = pytest.mark.filterwarnings("ignore")


class Signal(L.Callback):
    """Sends this process SIGUSR1 after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def fit(data, folder, checkpoint=None, stop_at=None):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    saving = RunCheckpoint(dirpath=str(folder), save_last=True, save_top_k=0, every_n_train_steps=1000)
    trainer = L.Trainer(
        max_steps=60,
        accelerator="cpu",
        logger=False,
        log_every_n_steps=20,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Signal(stop_at), saving],
    )
    sae = BatchTopKSAE(data.d_in, 48, k=4, dead_after_steps=10, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    trainer.fit(sae, datamodule=data, ckpt_path=checkpoint)
    return sae


@pytest.mark.parametrize("source", ["live", "cache"])
@pytest.mark.parametrize("step", [3, 29])
def test_stopped_and_gone_on_with(source, step, make_data, tmp_path):
    options = {}
    if source == "cache":
        written = make_data()
        write_cache(written, str(tmp_path / "cache"), shard=32)
        written.teardown("fit")
        options = {"cache": str(tmp_path / "cache")}
    whole = fit(make_data(**options), tmp_path / "whole")
    with pytest.raises(Stopped, match=f"SIGUSR1 after step {step}; saved in"):
        fit(make_data(**options), tmp_path / "cut", stop_at=step)
    resumed = fit(make_data(**options), tmp_path / "cut", str(tmp_path / "cut" / LAST))
    assert same_weights(whole, resumed)
