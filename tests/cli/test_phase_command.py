"""``hedgelab phase`` and ``hedgelab figures`` end to end, and every shipped config of theirs at a small size."""

import csv
from pathlib import Path

import pytest

from hedgelab.cli import main

ROOT = Path(__file__).parents[2]
SMALL = ["--x.points", "2", "--y.points", "3", "--steps", "20", "--seeds", "2"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(ROOT)
    return tmp_path


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(file, id=file.stem, marks=[] if file.stem == "phase_correlation" else [pytest.mark.slow])
        for file in sorted((ROOT / "configs" / "theory").glob("phase_*.yaml"))
    ],
)
def test_every_phase_config_runs(config, store, capsys):
    assert main(["phase", "--config", str(config), *SMALL]) == 0
    assert "12 SAEs" in capsys.readouterr().out
    (table,) = store.rglob("table.csv")
    rows = list(csv.reader(table.open()))
    assert len(rows) == 13
    assert rows[0][2:4] == ["seed", "loss"]
    assert list(store.rglob("*.png"))


def test_figures_draw_toys_and_landscapes(store, capsys):
    words = ["figures", "--toys", '["configs/toy/hierarchical.yaml"]', "--landscapes", "[[0.3, 0.1]]"]
    assert main(words) == 0
    assert "hierarchical" in capsys.readouterr().out
    assert {path.name for path in store.rglob("*.png")} == {"cosines.png", "b_dec.png", "loss_landscapes.png"}
    (table,) = store.rglob("toys.csv")
    decoder = {(row["latent"], row["feature"]): float(row["decoder"]) for row in csv.DictReader(table.open())}
    assert decoder["0", "1"] == pytest.approx(0.2434, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--x.key", "data.init_args.firing.init_args.features.7.f0"], "the config has no '7' there"),
        (["--x.key", "trainer.max_steps"], "x.key: must start with 'data.' or 'model.'"),
        (["--data.init_args.sampling", "samples"], "sampling: population"),
        (["--x.whole", "true"], "are not all whole numbers"),
        (["--seeds", "0"], "seeds: expected a whole number of at least 1, got 0"),
        (["--quantities", '["hedgin"]'], "quantities[0]: expected one of 'hedging'"),
    ],
)
def test_mistakes_of_phase(words, message, store, capsys):
    config = str(ROOT / "configs" / "theory" / "phase_correlation.yaml")
    assert main(["phase", "--config", config, *SMALL, *words]) == 2
    assert message in capsys.readouterr().err


def test_mistakes_of_figures(store, capsys):
    assert main(["figures"]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    assert main(["figures", "--toys", '["configs/toy/nope.yaml"]']) == 2
    assert "no such file" in capsys.readouterr().err
