"""Latents split over processes: the training, the numbers and the files are those of one process."""

import fits
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hedgelab.saes import save_sae, weights_sha256
from hedgelab.saes.io import gathered, load_sae, same_weights

STREAMS = {"toy": (fits.toy, False), "correlated": (fits.Correlated, True), "population": (fits.population, False)}


class Double(fits.Correlated):
    """The rows of that stream in double precision."""

    def __init__(self):
        super().__init__(dtype=torch.float64)


def train_sharded(rank, kind, data, wide, folder, steps, settings):
    source = data()
    module = fits.make(kind, source.d_in, wide)
    fits.fit(module, source, folder, 1, steps, **{"strategy": "sharded", "devices": 2, **settings})


def both(on_ranks, kind, data, wide, folder, steps=30, ranks=2, single=None, **settings):
    source = data()
    one = fits.fit(fits.make(kind, source.d_in, wide), source, folder / "one", 1, steps, **(single or {}))[0]
    on_ranks(ranks, train_sharded, kind, data, wide, folder / "many", steps, settings)
    return one, [fits.Outcome.read(folder / "many" / f"rank{rank}.pt") for rank in range(ranks)]


def check(one, many, tolerance=1e-6):
    for rank in many[1:]:
        assert str(rank.numbers) == str(many[0].numbers)
        assert all(torch.equal(rank.weights[name], value) for name, value in many[0].weights.items())
    fits.assert_as_one(one, many[0], tolerance)
    for key, value in one.numbers.items():
        if "val/" in key[1]:
            assert many[0].numbers[key] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("kind", ["vanilla", "topk", "batch_topk", "jumprelu", "matryoshka"])
def test_two_processes_train_as_one_does(kind, on_ranks, tmp_path):
    check(*both(on_ranks, kind, fits.toy, False, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("kind", fits.KINDS)
def test_two_processes_train_every_kind_for_long(kind, stream, on_ranks, tmp_path):
    """In single precision Adam's first steps, which are of one size however small a gradient is, amplify rounding to 2e-6."""
    check(*both(on_ranks, kind, *STREAMS[stream], tmp_path, steps=200), 5e-6 if stream == "correlated" else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", fits.KINDS)
def test_in_double_precision_only_reports_are_rounded(kind, on_ranks, tmp_path):
    precision = {"precision": "64-true"}
    check(*both(on_ranks, kind, Double, True, tmp_path, 200, single=precision, **precision), 3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka", "clipped"])
def test_rows_split_as_well(kind, on_ranks, tmp_path):
    """Four processes: two groups that share rows, of two that share latents."""
    from hedgelab.saes.parallel import ShardedStrategy

    strategy = ShardedStrategy(data_parallel_size=2, tensor_parallel_size=2)
    check(*both(on_ranks, kind, fits.toy, False, tmp_path, ranks=4, devices=4, strategy=strategy))


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


def train_group(rank, folder):
    data = fits.toy()
    group = fits.group(["vanilla", "matryoshka"], data.d_in, False)
    fits.fit(group, data, folder, 1, 30, strategy="sharded", devices=2)


@pytest.mark.slow
def test_a_group(on_ranks, tmp_path):
    data = fits.toy()
    one = fits.fit(fits.group(["vanilla", "matryoshka"], data.d_in, False), data, tmp_path / "one", 1, 30)[0]
    on_ranks(2, train_group, tmp_path / "many")
    check(one, [fits.Outcome.read(tmp_path / "many" / f"rank{rank}.pt") for rank in range(2)])
