"""The hedging degree on several ranks: all ranks at work, deciding alike, and the degree of one."""

import fits
import pytest
import torch

from hedgelab.data.toy import CopulaFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.protocols.hedge import HedgeOptions
from hedgelab.protocols.hedge_trainer import HedgeTrainer
from hedgelab.protocols.ranks import decided_by_rank_zero, found_by_rank_zero, on_every_rank
from hedgelab.saes import BatchTopKSAE, Initialization, MatryoshkaSAE
from hedgelab.saes.io import same_weights
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.store import create_database

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 10}
OPTIONS = HedgeOptions(n_new=2, new_norm=1.0, seeds=2, lr=1e-2)


def data():
    firing = CopulaFiring(12, strength=0.6, rank=2)
    return ToyDataModule(firing, d_in=12, batch_size=32, val_batches=4, seed=0, chunk_steps=5)


def sae():
    inner = BatchTopKSAE(12, 6, k=2, dead_after_steps=5, init=Initialization(b_dec="mean", seed=0))
    return MatryoshkaSAE(12, lambda d_in: inner, [2, 6])


def hedge(ranks, logger=False, outcome=None, **settings):
    torch.set_num_threads(1)
    trainer = HedgeTrainer(max_steps=30, devices=ranks, logger=logger, **QUIET, **settings)
    trainer.outcome_config = outcome
    said = []
    trainer.announce = said.append
    return trainer.measure_hedging(sae(), data(), OPTIONS), said


def numbers(scores):
    return {seed: {**own.scalars(), "projections": own.projections.tolist()} for seed, own in scores.items()}


def measure(rank, strategy, folder):
    scores, _ = hedge(2, strategy=strategy)
    torch.save(numbers(scores), folder / f"{rank}.pt")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("sharded", marks=pytest.mark.slow)])
def test_two_ranks_measure_what_one_does(strategy, on_ranks, tmp_path):
    on_ranks(2, measure, strategy, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert str(first) == str(second)
    alone = numbers(hedge(1)[0])
    assert alone.keys() == first.keys() == {0, 1}
    for seed, own in alone.items():
        assert own["live_new_latents"] > 0
        assert first[seed].pop("projections") == pytest.approx(own.pop("projections"), rel=1e-4, abs=1e-6)
        assert first[seed] == pytest.approx(own, rel=1e-4, abs=1e-6)


def tracked(rank, uri, folder):
    tracker = MLflowTracker(uri=uri, system_metrics=False)
    scores, said = hedge(2, tracker, {"sae": "tiny"}, strategy="ddp")
    torch.save((numbers(scores), said), folder / f"{rank}.pt")


@pytest.mark.slow
def test_phases_that_one_rank_finds_in_the_store_are_trained_by_none(on_ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_database(tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    outcomes = []
    for again in (False, True):
        folder = tmp_path / str(again)
        folder.mkdir()
        on_ranks(2, tracked, uri, folder)
        first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
        assert str(first) == str(second)
        outcomes.append(first)
    (trained, said), (found, said_again) = outcomes
    assert str(found) == str(trained)
    assert [line.split()[0] for line in said] == ["training", "training", "measuring"]
    assert [line.split(":")[0] for line in said_again] == ["already trained", "already trained", "measuring"]
    # one rank's phases are found by a single process too
    assert str(numbers(hedge(1, MLflowTracker(uri=uri, system_metrics=False), {"sae": "tiny"})[0])) == str(trained)
    from mlflow.tracking import MlflowClient

    runs = MlflowClient(uri).search_runs(["1"])
    assert sum("phase_id" in run.data.tags for run in runs) == 2 + 6
    assert {run.info.status for run in runs} == {"FINISHED"}


def decide(rank):
    torch.distributed.init_process_group("gloo")
    assert decided_by_rank_zero(lambda: ("of", rank)) == ("of", 0)

    def mistaken():
        raise UserError("data.key: wrong")

    def broken():
        raise KeyError("boom")

    with pytest.raises(UserError, match=r"^data\.key: wrong$"):
        decided_by_rank_zero(mistaken)
    with pytest.raises(KeyError if rank == 0 else RuntimeError, match="boom"):
        decided_by_rank_zero(broken)

    torch.manual_seed(rank)
    own = fits.make("topk", 10, False, seed=rank)
    shared = found_by_rank_zero(lambda: own)
    assert same_weights(shared, fits.make("topk", 10, False, seed=0))
    assert shared is not own
    assert found_by_rank_zero(lambda: None) is None


def test_rank_zero_decides_for_all(on_ranks):
    on_ranks(2, decide)


def test_alone_nothing_is_asked():
    own = fits.make("topk", 10, False)
    assert found_by_rank_zero(lambda: own) is own
    assert on_every_rank(HedgeTrainer(logger=False, devices=1, **QUIET), lambda: 7) == 7


def test_processes_that_end_with_a_fit_are_refused():
    trainer = HedgeTrainer(strategy="ddp_fork", devices=2, max_steps=2, logger=False, **QUIET)
    with pytest.raises(UserError, match=r"trainer\.strategy: hedge and sweep train in several fits"):
        trainer.measure_hedging(fits.make("vanilla", 12, False), data(), OPTIONS)
