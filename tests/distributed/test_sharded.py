"""Latents split over processes: the training, the numbers and the files are those of one process."""

import fits
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry

from hedgelab.errors import UserError
from hedgelab.saes import save_sae, weights_sha256
from hedgelab.saes.io import gathered, load_sae
from hedgelab.training.guard import FiniteGuard
from hedgelab.training.sharding import ShardedStrategy
from tests.saes.comparison import same_weights

STREAMS = {"toy": (fits.toy, False), "correlated": (fits.Correlated, True), "population": (fits.population, False)}


def make(kinds, d_in, wide):
    return fits.make(kinds, d_in, wide) if isinstance(kinds, str) else fits.group(kinds, d_in, wide)


def train_sharded(rank, kinds, data, wide, folder, steps, settings):
    source = data()
    fits.fit(make(kinds, source.d_in, wide), source, folder, 1, steps, **settings)


def both(on_ranks, kinds, data, wide, folder, steps=30, ranks=2, groups=1, **settings):
    """One kind, or a group of several, on one process; and on several that split latents, and rows if they are in groups."""
    source = data()
    one = fits.fit(make(kinds, source.d_in, wide), source, folder / "one", 1, steps, **settings)[0]
    name, sizes = f"sharded-{groups}", {"data_parallel_size": groups, "tensor_parallel_size": ranks // groups}
    # By name: Lightning takes an instance in single precision only.
    StrategyRegistry.register(name, ShardedStrategy, override=True, **sizes)
    settings |= {"strategy": name, "devices": ranks}
    on_ranks(ranks, train_sharded, kinds, data, wide, folder / "many", steps, settings)
    return one, [fits.Outcome.read(folder / "many" / f"rank{rank}.pt") for rank in range(ranks)]


def check(one, many, tolerance=1e-9):
    for rank in many[1:]:
        assert str(rank.numbers) == str(many[0].numbers)
        assert all(torch.equal(rank.weights[name], value) for name, value in many[0].weights.items())
    fits.assert_as_one(one, many[0], tolerance)
    for key, value in one.numbers.items():
        if "val/" in key[1]:
            assert many[0].numbers[key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("vanilla", "topk", "abs_topk", "steered", "penalty")]


@pytest.mark.parametrize("kind", ["batch_topk", "jumprelu", "matryoshka", "own_row_credit", *SLOW])
def test_two_processes_train_as_one_does(kind, on_ranks, tmp_path):
    check(*both(on_ranks, kind, fits.toy, False, tmp_path))


@pytest.mark.slow
def test_for_200_steps(on_ranks, tmp_path):
    check(*both(on_ranks, "matryoshka", fits.Correlated, True, tmp_path, steps=200))


@pytest.mark.parametrize("stream", ["toy", "correlated"])
def test_single_precision_rounds_and_no_more(stream, on_ranks, tmp_path):
    """Adam's first steps follow even a gradient that is nothing but rounding, so weights differ by some steps' length."""
    check(*both(on_ranks, "matryoshka", *STREAMS[stream], tmp_path, precision="32-true"), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_four_processes(groups, on_ranks, tmp_path):
    """All share latents, or two groups of two share rows."""
    check(*both(on_ranks, ["batch_topk", "matryoshka"], fits.toy, False, tmp_path, ranks=4, groups=groups))


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("kind", fits.KINDS)
def test_two_processes_train_every_kind_for_long(kind, stream, on_ranks, tmp_path):
    check(*both(on_ranks, kind, *STREAMS[stream], tmp_path, steps=200))


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stream", STREAMS)
def test_four_processes_train_every_kind_for_long(stream, groups, on_ranks, tmp_path):
    check(*both(on_ranks, fits.KINDS, *STREAMS[stream], tmp_path, steps=200, ranks=4, groups=groups))


def train_and_save(rank, folder):
    import lightning as L

    class Save(L.Callback):
        def on_fit_end(self, trainer, module):
            save_sae(module, folder / "split")
            whole = gathered(module)
            if rank == 0:
                save_sae(whole, folder / "gathered")

    data = fits.toy()
    checkpoint = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
    settings = {"strategy": "sharded", "devices": 2, "enable_checkpointing": True}
    sae = fits.make("matryoshka", data.d_in, False)
    fits.fit(sae, data, folder, 1, 10, callbacks=[Save(), checkpoint], **settings)


def resume(rank, folder):
    import lightning as L

    class Save(L.Callback):
        def on_fit_end(self, trainer, module):
            save_sae(module, folder / "resumed")

    data = fits.toy()
    L.Trainer(
        strategy="sharded",
        devices=2,
        accelerator="cpu",
        precision="64-true",
        max_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Save()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    ).fit(fits.make("matryoshka", data.d_in, False), datamodule=data, ckpt_path=str(folder / "step=5.ckpt"))


def test_files_are_those_of_one_process(on_ranks, tmp_path):
    on_ranks(2, train_and_save, tmp_path)
    assert weights_sha256(tmp_path / "split") == weights_sha256(tmp_path / "gathered")
    sae = load_sae(tmp_path / "split")
    checkpoint = torch.load(tmp_path / "step=10.ckpt", weights_only=True)
    assert all(torch.equal(checkpoint["state_dict"][name], value) for name, value in sae.state_dict().items())
    on_ranks(2, resume, tmp_path)
    assert same_weights(load_sae(tmp_path / "resumed"), sae)


def uneven(rank):
    data = fits.toy()
    sae = fits.VanillaSAE(data.d_in, 5, 0.1)
    with pytest.raises(ValueError, match=r"model\.d_sae: 5 latents cannot be split evenly over 2 processes"):
        fits.fit(sae, data, None, 1, 2, strategy="sharded", devices=2, callbacks=[])


def test_latents_must_be_split_evenly(on_ranks):
    on_ranks(2, uneven)


class Poisoned(fits.Correlated):
    """That stream with two batches that no SAE can learn from."""

    def batch(self, stage, index):
        batch = super().batch(stage, index)
        if stage == "train" and index in (3, 7):
            batch.x[5] = torch.nan if index == 3 else torch.inf
        return batch


def train_on_poison(rank, kind, on_nonfinite, folder, settings):
    guard = FiniteGuard(on_nonfinite)
    recorder = fits.Recorder()
    options = {"logger": recorder, "callbacks": [guard, fits.Keep(folder, recorder)], **settings}
    fits.fit(fits.make(kind, Poisoned.d_in, True), Poisoned(), folder, 1, 12, **options)


@pytest.mark.parametrize("kind", ["batch_topk", "topk", pytest.param("clipped", marks=pytest.mark.slow)])
def test_batches_are_passed_over_by_all_or_none(kind, on_ranks, tmp_path):
    train_on_poison(0, kind, "skip", tmp_path / "one", {})
    on_ranks(2, train_on_poison, kind, "skip", tmp_path / "many", {"strategy": "sharded", "devices": 2})
    one, *many = (fits.Outcome.read(tmp_path / name) for name in ("one/rank0.pt", "many/rank0.pt", "many/rank1.pt"))
    assert one.numbers[12, "train/skipped_batches"] == 2
    assert (4, "train/loss") not in one.numbers
    check(one, many)


def stopped_by_poison(rank, folder):
    with pytest.raises(UserError, match=r"model: loss term 'mse' is NaN or infinite at step 4 \(batch 3"):
        train_on_poison(rank, "batch_topk", "stop", folder, {"strategy": "sharded", "devices": 2})


def test_a_loss_that_is_not_finite_stops_all(on_ranks, tmp_path):
    on_ranks(2, stopped_by_poison, tmp_path)
