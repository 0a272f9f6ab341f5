"""``hedgelab trial`` end to end at a small size, with the shipped config."""

import csv
from pathlib import Path

import pytest

from hedgelab.cli import main

CONFIG = str(Path(__file__).parents[2] / "configs" / "toy" / "degree_trial.yaml")
HARD = CONFIG.replace("degree_trial", "degree_trial_hard")
TOPK = "{topk: {class_path: TopKSAE, init_args: {k: 2, auxiliary_coefficient: 0.0}}}"
FULL = "correlation.init_args.strength"
SMALL = ["--trial.widths", "[4]", "--trial.steps", "4", "--trial.continued_steps", "3", "--trial.seeds", "1"]
SMALL += ["--trial.val_batches", "2", "--trial.n_new", "2", "--data.init_args.batch_size", "32"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_shipped_trial_runs_small(store, capsys):
    assert main(["trial", "--config", CONFIG, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "30 SAEs" in printed
    assert "residual hedging" in printed
    (table,) = store.rglob("table.csv")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 30
    assert {row["kind"] for row in rows} == {"vanilla", "topk", "batch_topk", "jumprelu", "matryoshka"}
    assert all(len(row["levels"].split()) == 3 * (row["kind"] == "matryoshka") for row in rows)
    (lenses,) = store.rglob("lenses.csv")
    lenses = list(csv.DictReader(lenses.open()))
    assert {row["measure"] for row in lenses} == {"residual_hedging", "degree", "projection", "cosine"}
    assert len(lenses) == 4 * 5
    assert {path.name for path in store.rglob("*.png")} == {"against_truth.png", "widths.png", "levels.png"}


def test_toys_differ_in_what_is_the_datamodules_too(store):
    toys = "{plain: {}, noise: {data.noise: 0.5, strength: 0.2}, spread: {n: 200, data.magnitude_std: 0.3}}"
    words = ["--kinds", TOPK, "--toys", toys.replace("strength", FULL)]
    assert main(["trial", "--config", HARD, *SMALL, *words]) == 0
    (table,) = store.rglob("table.csv")
    rows = {row["toy"]: row for row in csv.DictReader(table.open())}
    assert list(rows) == ["plain", "noise", "spread"]
    assert len({row["true_hedging"] for row in rows.values()}) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trial.seeds", "0"], "trial.seeds: expected a whole number of at least 1, got 0"),
        (["--toys", "{plain: {strength: 2}}"], "strength"),
        (["--kinds", "{topk: {class_path: TopKSAE, init_args: {k: 99}}}"], "k: must lie between 1 and d_sae = 4"),
        (["--toys", "{plain: {data.noise: -1}}"], "noise: must be at least 0 and finite, got -1"),
        (["--kinds", "{}"], "kinds: missing"),
    ],
)
def test_mistakes_of_trial(words, message, store, capsys):
    assert main(["trial", "--config", CONFIG, *SMALL, *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(store.rglob("table.csv"))
