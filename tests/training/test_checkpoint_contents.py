"""What is written can be read; what cannot be read is not written; every kind of run can be gone on with."""

import functools
import logging
import threading
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import TopKSAE, load_sae
from hedgelab.tracking import RunRecord
from hedgelab.training.checkpoints import RunCheckpoint, VerifiedCheckpointIO
from tests.saes.comparison import same_weights

pytestmark = pytest.mark.filterwarnings("ignore")
KEEP = functools.partial(RunCheckpoint, save_last=True, save_top_k=0, every_n_train_steps=10)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def fit(callbacks, steps=20, ckpt_path=None, chunk=10, optimizer=torch.optim.Adam, **flags):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(
        **{**quiet, "max_steps": steps, "accelerator": "cpu", "num_sanity_val_steps": 0, "log_every_n_steps": 10, **flags},
        callbacks=callbacks,
    )
    torch.manual_seed(0)
    model = TopKSAE(6, 5, k=2, optimizer=optimizer)
    data = ToyDataModule(IndependentFiring([0.3] * 6), d_in=6, batch_size=16, val_batches=2, seed=0, chunk_steps=chunk)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


class Best(L.Callback):
    """A callback whose state is what someone made of it."""

    def __init__(self, best):
        self.best = self.loaded = best

    def state_dict(self):
        return {"best": self.best, "history": [self.best, {"again": (self.best,)}]}

    def load_state_dict(self, state):
        self.loaded = state


@pytest.mark.parametrize("value", [np.float64(1.5), np.float32(1.5), np.int64(2), np.bool_(True)], ids=repr)
def test_scalars_of_numpy_are_saved_as_numbers(value):
    fit([Best(value), KEEP("kept")])
    again = Best(None)
    fit([again, KEEP("kept")], 30, "kept/last.ckpt")
    assert again.loaded == {"best": value.item(), "history": [value.item(), {"again": (value.item(),)}]}
    assert type(again.loaded["best"]) is type(value.item())


@pytest.mark.parametrize(
    "value", [np.arange(3), Path("x"), threading.Lock(), lambda: 1, object()], ids=lambda v: type(v).__name__
)
def test_a_state_that_could_not_be_read_is_refused_when_it_is_to_be_written(value):
    said = "checkpoint: the state of callback Best holds what cannot be read without executing code"
    with pytest.raises(UserError, match=said):
        fit([Best(value), KEEP("kept")])
    assert not list(Path("kept").glob("*.ckpt"))


@pytest.mark.parametrize("value", [torch.arange(3), {1, 2}, b"x", torch.float32, None, torch.Size([2])], ids=repr)
def test_what_pytorch_reads_by_itself_is_saved_as_it_is(value):
    fit([Best(value), KEEP("kept")], 10)
    state = VerifiedCheckpointIO().load_checkpoint("kept/last.ckpt")["callbacks"]["Best"]
    assert torch.equal(state["best"], value) if isinstance(value, torch.Tensor) else state["best"] == value


def test_checkpoints_of_ones_own_go_to_any_place_that_fsspec_knows():
    place = "memory://somewhere/run"
    done = fit([ModelCheckpoint(place, "{step}", every_n_train_steps=10, save_top_k=-1)])
    assert not any(Path().iterdir())
    assert same_weights(fit([], ckpt_path=f"{place}/step=10.ckpt", enable_checkpointing=False), done)


def test_the_runs_own_checkpoints_need_a_local_folder():
    for place in ("s3://bucket/run", "memory://bucket/run"):  # whether or not fsspec could reach it
        with pytest.raises(UserError, match=r"checkpoint\.dirpath: .*(is not a folder of this machine|local folder)"):
            fit([KEEP(place)])
    with pytest.raises(UserError, match=r"checkpoint\.dirpath: must be set to a local folder, since .*'memory://x'"):
        fit([KEEP()], default_root_dir="memory://x")
    assert not any(Path().iterdir())
    fit([KEEP(Path("kept").absolute().as_uri())])
    assert Path("kept/last.ckpt").exists()


@pytest.mark.parametrize(("first", "then"), [(10, 1), (1, 10)])
def test_a_run_goes_on_whether_its_steps_came_one_by_one_or_in_chunks(first, then):
    undisturbed = fit([KEEP("whole")], 60)
    fit([KEEP("cut")], 30, chunk=first)
    assert same_weights(fit([KEEP("cut")], 60, "cut/last.ckpt", chunk=then), undisturbed)


def test_validation_comes_at_the_same_steps_after_chunks():
    class Validated(L.Callback):
        steps: list

        def on_fit_start(self, trainer, module):
            self.steps = []

        def on_validation_end(self, trainer, module):
            self.steps.append(trainer.global_step)

    fit([KEEP("cut")], 30)
    seen = Validated()
    fit([seen, KEEP("cut")], 60, "cut/last.ckpt", val_check_interval=20, check_val_every_n_epoch=None)
    assert seen.steps == [40, 60]


class Uncopyable:
    """An optimiser factory that cannot be copied, as those of a config may be."""

    def __init__(self):
        self.lock = threading.RLock()

    def __call__(self, parameters):
        return torch.optim.Adam(parameters, lr=1e-2)


def test_weight_averaging_can_be_gone_on_with():
    average = functools.partial(EMAWeightAveraging, decay=0.9)
    undisturbed = fit([average(), KEEP("whole")], 40, optimizer=Uncopyable())
    fit([average(), KEEP("cut")], 20, optimizer=Uncopyable())
    resumed = fit([average(), KEEP("cut")], 40, "cut/last.ckpt", optimizer=Uncopyable())
    assert same_weights(resumed, undisturbed)


@pytest.mark.parametrize("logger", [False, CSVLogger], ids=["none", "csv"])
def test_without_mlflow_the_sae_is_kept_beside_the_checkpoints(logger):
    done = fit([RunRecord(), KEEP()], logger=logger and logger("csv"))
    (folder,) = Path().glob("**/sae")
    assert same_weights(load_sae(folder), done)
    assert (folder.parent / "last.ckpt").exists()


def test_a_fit_that_keeps_nothing_leaves_nothing():
    fit([RunRecord()], enable_checkpointing=False)
    assert not any(Path().iterdir())
