"""Threads that fit the work: one for tiny toys, whatever the machine has."""

import types

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.trainer.connectors import accelerator_connector

from hedgelab.errors import UserError
from hedgelab.protocols.training_phases import PhaseTrainer
from hedgelab.training import steps
from hedgelab.training.flags import accelerator, check_device


@pytest.fixture
def many(monkeypatch):
    """A machine where nobody has said how many threads there are to be, and PyTorch takes four."""
    for name in ("HEDGELAB_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield monkeypatch
    torch.set_num_threads(before)


def trainer(device="cpu"):
    return types.SimpleNamespace(strategy=types.SimpleNamespace(root_device=torch.device(device)))


@pytest.mark.parametrize(
    ("products", "expected"), [(500 * 50, 1), (2**22, 1), (2**23, 2), (3 * 2**22 + 5, 3), (4096 * 576 * 4608, 4)]
)
def test_a_thread_for_each_piece_of_work(many, products, expected):
    assert steps.use_threads(trainer(), products) == 4
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_environment_says_counts(many, name):
    many.setenv(name, "4")
    assert steps.use_threads(trainer(), 1) is None
    assert torch.get_num_threads() == 4
    many.setenv("HEDGELAB_THREADS", "3")
    assert steps.use_threads(trainer(), 1) == 4
    assert torch.get_num_threads() == 3


def test_a_gpu_and_unknown_work_change_nothing(many):
    assert steps.use_threads(trainer("cuda"), 1) is None
    assert steps.use_threads(trainer(), 0) is None
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("wrong", ["0", "two", "1.5", "-1"])
def test_impossible_numbers_of_threads(many, wrong):
    many.setenv("HEDGELAB_THREADS", wrong)
    with pytest.raises(UserError, match="HEDGELAB_THREADS: expected a whole number of at least 1"):
        steps.use_threads(trainer(), 1)


def test_a_fit_takes_one_thread_for_a_toy_and_gives_the_others_back(many, tmp_path):
    from hedgelab.data.toy import IndependentFiring, ToyDataModule
    from hedgelab.saes import TopKSAE

    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_):
            seen.append(torch.get_num_threads())

    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    fit = L.Trainer(max_steps=2, accelerator="cpu", callbacks=[Watch()], limit_val_batches=0, **quiet)
    fit.fit(TopKSAE(6, 5, k=2), ToyDataModule(IndependentFiring([0.3] * 6), d_in=6, batch_size=16, seed=0))
    assert seen == [1, 1]
    assert torch.get_num_threads() == 4


def test_auto_is_never_a_macs_gpu(monkeypatch):
    """Neither in a config, nor where a study makes its trainers."""
    asked = "_select_auto_accelerator"
    monkeypatch.setattr(accelerator_connector, asked, lambda: pytest.fail("Lightning, which takes MPS, was asked"))
    assert isinstance(PhaseTrainer(logger=False).accelerator, CPUAccelerator)
    assert isinstance(PhaseTrainer(logger=False).another([], [], False).accelerator, CPUAccelerator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert accelerator("auto") == "cpu"
    assert accelerator("mps") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert accelerator("auto") == "cuda"
    with pytest.raises(UserError, match=r"trainer\.accelerator: MPS has no float64"):
        check_device(torch.device("mps"))
    check_device(torch.device("cpu"))
