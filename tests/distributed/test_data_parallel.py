"""Data-parallel training: losses, metrics and weights on several ranks are those of one."""

import fits
import pytest
import torch

from hedgelab.data.tensors import TensorActivations

STREAMS = {"toy": (fits.toy, False), "correlated": (fits.Correlated, True), "population": (fits.population, False)}
ONE_STREAM = [pytest.param(name, marks=[pytest.mark.slow] if name != "population" else []) for name in STREAMS]


def one_and_many(stream, ranks, folder, kinds=fits.KINDS, steps=200):
    """The outcome on one rank, and those of all ranks, of a group of SAEs of many kinds."""
    data, wide = STREAMS[stream]
    outcomes = []
    for count in (1, ranks):
        source = data()
        outcomes.append(fits.fit(fits.group(kinds, source.d_in, wide), source, folder / str(count), count, steps))
    return outcomes[0][0], outcomes[1]


def check(one, many):
    for rank in many[1:]:
        assert str(rank.numbers) == str(many[0].numbers)  # as text: some are NaN
        assert all(torch.equal(rank.weights[name], value) for name, value in many[0].weights.items())
    fits.assert_as_one(one, many[0])
    validation = [key for key in one.numbers if "val/" in key[1]]
    assert validation
    for key in validation:
        assert many[0].numbers[key] == pytest.approx(one.numbers[key], rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("stream", ONE_STREAM)
def test_two_ranks_train_every_kind_as_one_does(stream, tmp_path):
    one, many = one_and_many(stream, 2, tmp_path, steps=30)
    check(one, many)
    assert any("auxiliary" in name for _, name in one.numbers)


@pytest.mark.parametrize("stream", ONE_STREAM)
def test_two_ranks_train_with_mitigations_as_one_does(stream, tmp_path):
    one, many = one_and_many(stream, 2, tmp_path, ["lista_matryoshka", "random_prefixes"], 30)
    check(one, many)
    rates = [outcome.weights["members.lista_matryoshka.mitigations.2.rates"] for outcome in (one, many[0])]
    assert rates[0].max() > 0
    torch.testing.assert_close(*rates, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_for_200_steps(ranks, tmp_path):
    check(*one_and_many("toy", ranks, tmp_path, ["batch_topk", "matryoshka"]))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stream", STREAMS)
def test_several_ranks_train_every_kind_as_one_does_for_long(stream, ranks, tmp_path):
    check(*one_and_many(stream, ranks, tmp_path))


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("batch_topk", "orthogonal", "penalty", "scheduled")]


@pytest.mark.parametrize("kind", ["matryoshka", "steered", *SLOW])
def test_a_single_sae_in_chunks(kind, tmp_path):
    runs = []
    for ranks in (1, 2):
        data = fits.toy(chunk_steps=10)
        runs.append(fits.fit(fits.make(kind, data.d_in, False), data, tmp_path / str(ranks), ranks, log_every_n_steps=20))
    check(runs[0][0], runs[1])


def test_a_batch_must_be_split_evenly(tmp_path):
    data = fits.Correlated(batch_size=63)
    with pytest.raises(Exception, match=r"data\.batch_size: 63 cannot be split evenly over 2 ranks"):
        fits.fit(fits.make("vanilla", data.d_in, False), data, tmp_path, 2, 2)


def measured(sae, ranks, folder, stage):
    """Metrics of an SAE on some ranks, without training it."""
    import lightning as L

    class Keep(L.Callback):
        def on_test_end(self, trainer, module):
            torch.save({name: float(v) for name, v in trainer.callback_metrics.items()}, folder / str(trainer.global_rank))

        on_validation_end = on_test_end

    folder.mkdir()
    trainer = L.Trainer(
        strategy="ddp_fork" if ranks > 1 else "auto",
        devices=ranks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Keep()],
    )
    getattr(trainer, stage)(sae, datamodule=fits.toy(), verbose=False)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_measuring_is_the_same_on_any_number_of_ranks(stage, tmp_path):
    sae = fits.make("batch_topk", fits.toy().d_in, False)
    (alone,) = measured(sae, 1, tmp_path / "one", stage)
    first, second = measured(sae, 2, tmp_path / "two", stage)
    assert str(first) == str(second)
    assert first.keys() == alone.keys()
    assert len(alone) > 10
    assert first == pytest.approx(alone, rel=1e-6, nan_ok=True)


def test_levels_balanced_in_training(tmp_path):
    """The asymmetry that moves the levels' weights is no mean over examples: it is taken of the whole batch's sums."""
    one, many = one_and_many("toy", 2, tmp_path, ["adaptive"], 60)
    check(one, many)
    name = "members.adaptive.log_factors"
    assert one.weights[name].abs().max() > 1e-3
    torch.testing.assert_close(many[0].weights[name], one.weights[name])


def test_own_activations_on_two_ranks(tmp_path):
    x = torch.cat([fits.Correlated().batch("train", i).x for i in range(20)])
    outcomes = [
        fits.fit(fits.make("batch_topk", 24, True), TensorActivations(x, batch_size=64, seed=0), tmp_path / str(n), n, 30)
        for n in (1, 2)
    ]
    check(outcomes[0][0], outcomes[1])
