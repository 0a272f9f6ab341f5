"""``hedgelab balance`` end to end, at a small size."""

import csv
from pathlib import Path

import pytest

from hedgelab.cli import main

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "10", "--betas.points", "3", "--starts", "[1.0]"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(ROOT)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("config", ["balance_alike", "balance"])
def test_every_balance_config_runs(config, store, capsys):
    words = ["--config", f"configs/theory/{config}.yaml", *SMALL, "--search.members", "8", "--search.rounds", "1"]
    assert main(["balance", *words]) == 0
    assert "credit, β = 1" in capsys.readouterr().out
    (table,) = store.rglob("methods.csv")
    rows = list(csv.DictReader(table.open()))
    assert [row["method"] for row in rows][:4] == [
        "β = 0, no inner levels", "β = 1, plain matryoshka", "best β", "one weight a level",
    ]  # fmt: skip
    assert rows[0]["level_weights"] == "0 1"
    (curves,) = store.rglob("curves.csv")
    assert len(list(csv.DictReader(curves.open()))) == 6
    assert [path.name for path in store.rglob("*.png")] == ["balance.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.init_args.sampling", "samples"], "sampling: population"),
        (["--parent", "7"], "parent: must be a feature, 0 to 3, got 7"),
        (["--steps", "0"], "steps: expected a whole number of at least 1, got 0"),
        (["--starts", "[0.0]"], "starts: needs values of β above 0"),
        (["--betas.low", "9"], "betas: need 0 < low < high"),
    ],
)
def test_mistakes(words, message, store, capsys):
    assert main(["balance", "--config", "configs/theory/balance.yaml", *SMALL, *words]) == 2
    assert message in capsys.readouterr().err
