"""The hedging degree on several ranks: all ranks at work, deciding alike, and the degree of one."""

import io
from contextlib import redirect_stdout

import fits
import pytest
import torch

from hedgelab.data.toy import CopulaFiring, LowRankCorrelation, ToyDataModule, Zipf
from hedgelab.errors import UserError
from hedgelab.protocols.hedge import Hedge, HedgeOptions
from hedgelab.protocols.ranks import decided_by_rank_zero, on_every_rank
from hedgelab.protocols.study import Bench
from hedgelab.protocols.training_phases import PhaseTrainer
from hedgelab.saes import BatchTopKSAE, Initialization, MatryoshkaSAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.store import create_database
from tests.saes.comparison import same_weights

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 10}
OPTIONS = HedgeOptions(n_new=2, new_norm=1.0, seeds=2, lr=1e-2)


def data():
    firing = CopulaFiring(12, Zipf(), LowRankCorrelation(2, strength=0.6))
    return ToyDataModule(firing, d_in=12, batch_size=32, val_batches=4, seed=0, chunk_steps=5)


def sae():
    inner = BatchTopKSAE(12, 6, k=2, dead_after_steps=5, init=Initialization(b_dec="mean", seed=0))
    return MatryoshkaSAE(12, lambda d_in: inner, [2, 6])


def hedge(ranks, logger=False, outcome=None, **settings):
    """What was measured, with every latent's own numbers, and the lines that rank zero told."""
    torch.set_num_threads(1)
    trainer = PhaseTrainer(max_steps=30, devices=ranks, logger=logger, **QUIET, **settings)
    study = Hedge(sae(), data(), trainer, OPTIONS, outcome)
    said = io.StringIO()
    with redirect_stdout(said):
        found = study.run(Bench(tracker=logger or None))
    if logger:
        logger.finalize("success")
    return (dict(found.metrics), found.tables["hedging/latents.csv"]), said.getvalue().splitlines()


def measure(rank, strategy, folder):
    found, _ = hedge(2, strategy=strategy)
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_ranks_measure_what_one_does(strategy, on_ranks, tmp_path):
    on_ranks(2, measure, strategy, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert str(first) == str(second)
    (metrics, latents), _ = hedge(1)
    assert metrics["hedging/live_new_latents"] > 0
    assert first[0] == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert {row["seed"] for row in latents} == {0, 1}
    for one, other in zip(first[1], latents, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def tracked(rank, uri, folder):
    tracker = MLflowTracker(uri=uri, system_metrics=False)
    torch.save(hedge(2, tracker, {"sae": "tiny"}, strategy="ddp"), folder / f"{rank}.pt")


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
        assert str(first[0]) == str(second[0])
        outcomes.append(first)
    (trained, said), (found, said_again) = outcomes
    assert str(found) == str(trained)
    assert [line.split()[0] for line in said] == ["training", "training", "measuring"]
    assert [line.split(":")[0] for line in said_again] == ["already trained", "already trained", "measuring"]
    # one rank's phases are found by a single process too
    assert str(hedge(1, MLflowTracker(uri=uri, system_metrics=False), {"sae": "tiny"})[0]) == str(trained)
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
    shared = decided_by_rank_zero(lambda: own)
    assert same_weights(shared, fits.make("topk", 10, False, seed=0))
    assert rank == 0 or shared is not own


def test_rank_zero_decides_for_all(on_ranks):
    on_ranks(2, decide)


def test_alone_nothing_is_asked():
    own = fits.make("topk", 10, False)
    assert decided_by_rank_zero(lambda: own) is own
    assert on_every_rank(PhaseTrainer(logger=False, devices=1, **QUIET), lambda: 7) == 7


def test_processes_that_end_with_a_fit_are_refused():
    trainer = PhaseTrainer(strategy="ddp_fork", devices=2, max_steps=2, logger=False, **QUIET)
    with pytest.raises(UserError, match=r"trainer\.strategy: hedge and sweep train in several fits"):
        Hedge(fits.make("vanilla", 12, False), data(), trainer, OPTIONS).run(Bench())
