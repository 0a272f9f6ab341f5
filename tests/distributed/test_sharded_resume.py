"""Checkpoints of an SAE whose latents are split: stopped or not, and on however many processes, a run ends the same."""

import os
import signal

import fits
import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from hedgelab.errors import Stopped, UserError
from hedgelab.training.checkpoints import LAST, RunCheckpoint
from hedgelab.training.sharding import ShardedStrategy

STEPS, STOP = 24, 10


class Signal(L.Callback):
    """Sends SIGTERM to the last process, in the middle of a step."""

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == STOP and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def make(kind):
    data = fits.toy(chunk_steps=2)
    if kind == "group":
        return fits.group(["clipped", "matryoshka"], data.d_in, False), data
    return fits.make(kind, data.d_in, False), data


def train(rank, kind, folder, processes, checkpoint=None, stop=False, **settings):
    """Train with checkpoints of its own, and write what it logged."""
    module, data = make(kind)
    saving = RunCheckpoint(dirpath=str(folder), save_last=True, save_top_k=0, every_n_train_steps=8)
    recorder = fits.Recorder()
    options = {
        "callbacks": [*([Signal()] if stop else []), fits.Keep(folder, recorder), saving],
        "logger": recorder,
        "enable_checkpointing": True,
        "log_every_n_steps": 4,
        "check_val_every_n_epoch": None,
        "val_check_interval": 12,
        **({"strategy": "sharded", "devices": processes} if processes > 1 else {}),
        **settings,
    }
    if not stop:
        fits.fit(module, data, folder, 1, STEPS, checkpoint, **options)
        return
    with pytest.raises(Stopped) as stopped:
        fits.fit(module, data, folder, 1, STEPS, checkpoint, **options)
    assert stopped.value.code == 128 + signal.SIGTERM
    torch.save(recorder.history, folder / f"stopped{rank}.pt")


def split(on_ranks, kind, folder, *args, processes=2):
    on_ranks(processes, train, kind, folder, processes, *args)


def contents(folder):
    return torch.load(folder / LAST, weights_only=True)


def assert_same(one, other, close=None, path=""):
    """Nested values are equal, or as close as asked for."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            assert_same(value, other[key], close, f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, close, f"{path}/{i}")
    elif isinstance(one, torch.Tensor):
        assert one.shape == other.shape, path
        torch.testing.assert_close(other, one, **(close or {"rtol": 0, "atol": 0}), equal_nan=True, msg=path)
    else:
        assert one == other, path


WHAT = ("state_dict", "optimizer_states", "lr_schedulers", "hedgelab_unreported", "global_step")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["matryoshka", "group"])
def test_stopped_by_a_signal_and_gone_on_with(kind, on_ranks, tmp_path):
    """Weights, the optimiser's states and what was logged are those of a run never stopped, bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    split(on_ranks, kind, whole)
    split(on_ranks, kind, broken, None, True)
    assert contents(broken)["global_step"] == STOP
    split(on_ranks, kind, broken, str(broken / LAST))
    first, second = contents(whole), contents(broken)
    assert first["optimizer_states"][0]
    for name in WHAT:
        assert_same(first[name], second[name], path=name)
    expected = fits.Outcome.read(whole / "rank0.pt")
    resumed = fits.Outcome.read(broken / "rank0.pt")
    logged = dict(torch.load(broken / "stopped0.pt", weights_only=True))
    assert max(logged) <= STOP
    assert not {step for step, _ in resumed.numbers} & logged.keys()
    both = resumed.numbers | {(step, name): v for step, values in logged.items() for name, v in values.items()}
    assert both.keys() == expected.numbers.keys()
    assert all(str(both[key]) == str(value) for key, value in expected.numbers.items())


@pytest.mark.parametrize("kind", ["matryoshka", pytest.param("group", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_gone_on_with_on_another_number_of_processes(kind, before, after, on_ranks, tmp_path):
    """The checkpoint of one process and that of several are the same, optimiser included."""
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    train(0, kind, alone, 1)
    on_ranks(before, train, kind, moved, before, None, True)
    on_ranks(after, train, kind, moved, after, str(moved / LAST))
    first, second = contents(alone), contents(moved)
    for name in WHAT:
        assert_same(first[name], second[name], {"rtol": 1e-5, "atol": 1e-7}, name)


def resume_another(rank, folder):
    data = fits.toy()
    sae = fits.TopKSAE(data.d_in, 16, k=2)
    with pytest.raises(
        UserError, match=r"ckpt_path: the checkpoint is of another SAE: its \S*(W_enc is 10×12|b_enc is 12), the config's"
    ):
        fits.fit(sae, data, None, 1, STEPS, str(folder / LAST), strategy="sharded", devices=2, callbacks=[])
    (folder / "torn.ckpt").write_bytes((folder / LAST).read_bytes()[:-100]) if rank == 0 else None
    torch.distributed.barrier()
    saving = RunCheckpoint(dirpath=str(folder / "new"), save_last=True, save_top_k=0)
    with pytest.raises(UserError, match=r"ckpt_path: cannot use '\S*torn.ckpt'"):
        train(rank, "topk", folder / "new", 2, str(folder / "torn.ckpt"), callbacks=[saving])


def test_a_checkpoint_that_does_not_fit_or_is_torn(on_ranks, tmp_path):
    split(on_ranks, "topk", tmp_path)
    on_ranks(2, resume_another, tmp_path)


def measure(rank, checkpoint, folder):
    """Metrics of a checkpoint, by validate and test."""
    values = {}
    for stage in ("validate", "test"):
        module, data = make("matryoshka")
        strategy = {"strategy": "sharded", "devices": 2} if "RANK" in os.environ else {}
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            **strategy,
        )
        getattr(trainer, stage)(module, datamodule=data, ckpt_path=str(checkpoint), verbose=False)
        values |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save(values, folder / f"measured{rank}.pt")


@pytest.mark.slow
def test_measuring_a_checkpoint(on_ranks, tmp_path):
    split(on_ranks, "matryoshka", tmp_path)
    (tmp_path / "alone").mkdir()
    measure(0, tmp_path / LAST, tmp_path / "alone")
    on_ranks(2, measure, tmp_path / LAST, tmp_path)
    alone = torch.load(tmp_path / "alone" / "measured0.pt", weights_only=True)
    assert {name.split("/")[0] for name in alone} == {"val", "test"}
    first, second = (torch.load(tmp_path / f"measured{rank}.pt", weights_only=True) for rank in range(2))
    assert str(first) == str(second)
    assert first == pytest.approx(alone, rel=1e-5, abs=1e-6, nan_ok=True)


def refused(rank, strategy, message):
    module, data = make("vanilla")
    with pytest.raises(UserError, match=rf"trainer\.strategy: .*{message}"):
        fits.fit(module, data, None, 1, 2, strategy=strategy, devices=2, callbacks=[], precision="32-true")


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (ShardedStrategy(save_distributed_checkpoint=True), r"single files; remove save_distributed_checkpoint"),
        (ShardedStrategy(3), r"data_parallel_size 3 times tensor_parallel_size 2 must be .* trainer\.devices: 2"),
        (ModelParallelStrategy(), r"sharded, not with ModelParallelStrategy"),
    ],
)
def test_strategies_that_are_refused(strategy, message, on_ranks):
    on_ranks(2, refused, strategy, message)
