"""The trial from end to end: what the dose causes, what the lot deals, and what a stopped trial does not train again."""

import csv

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from hedgelab.cli import main
from hedgelab.cli.studies import parse, study_class
from hedgelab.protocols.planting.findings import GRADED, grade
from hedgelab.protocols.planting.trial import PlantOptions, draw_lot
from hedgelab.protocols.study import Bench

D_IN = 64
SAE = {
    "class_path": "BatchTopKSAE",
    "init_args": {"d_sae": 64, "k": 2, "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 3e-3}}},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A trial in activations of a few sparse features and noise, whose parents are planted too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    rng = torch.Generator().manual_seed(0)
    natural = (torch.rand(20_000, 4, generator=rng) < 0.05) * 2.0
    directions = torch.nn.functional.normalize(torch.randn(4, D_IN, generator=rng), dim=1)
    x = natural @ directions + 0.1 * torch.randn(20_000, D_IN, generator=rng)
    save_file({"x": x}, tmp_path / "x.safetensors")
    tree = {
        "data": {
            "class_path": "TensorActivations",
            "init_args": {"x": str(tmp_path / "x.safetensors"), "batch_size": 500, "held_out": 0.4},
        },
        "kinds": {"BatchTopK": SAE},
        "plant": {"widths": [12, 16], "steps": 400, "parents": 8, "silent": 2, "seeds": 2, "batches": 10}
        | {"rates": [0.05, 0.1], "doses": [0.0, 0.2, 0.4, 0.8], "magnitude": 2.0, "parent_magnitude": 3.0},
    }
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "trial.yaml"


@pytest.mark.slow
def test_the_dose_puts_the_child_into_its_parents_row(config):
    study, _, _ = parse(study_class("plant"), "plant", ["--config", str(config)])
    outcome = study.run(Bench())
    arms = {(row["width"], row["dose"]): row for row in outcome.tables["arms.csv"]}
    for width in (12, 16):
        assert arms[width, 0.8]["share"] > arms[width, 0.0]["share"] + 0.15
        assert abs(arms[width, 0.0]["share"]) < 0.08
        assert abs(arms[width, 0.0]["predicted"]) < 1e-6
        assert arms[width, "silent"]["share"] < 0.08
    assert outcome.metrics["BatchTopK/slope"] == pytest.approx(1.0, abs=0.3)
    assert outcome.metrics["BatchTopK/r"] > 0.7
    first = outcome.tables["contrasts.csv"][0]
    assert (first["what"], first["parents"]) == ("dose 0.8 against 0", 4)
    assert first["p"] in (0.125, 0.25, 0.375)  # of the 16 choices of signs
    assert set(outcome.figures) == {"doses.png", "theory.png"}


@pytest.mark.slow
def test_a_trial_with_natural_parents_is_a_tree_of_runs_and_is_not_trained_twice(config, tmp_path, capsys):
    tree = yaml.safe_load(config.read_text())
    matryoshka = {"class_path": "MatryoshkaSAE", "init_args": {"levels": [8], "inner": SAE}}
    tree |= {"parents": SAE, "kinds": {"BatchTopK": SAE, "matryoshka": matryoshka}}
    tree["plant"] |= {"steps": 20, "parent_steps": 200, "rates": [0.005, 0.5], "seeds": 1, "batches": 4}
    tree["plant"] |= {"n_new": 3, "continued_steps": 10}
    config.write_text(yaml.safe_dump(tree))
    assert main(["plant", "--config", str(config)]) == 0
    printed = capsys.readouterr()
    assert "training parents" in printed.err + printed.out
    (pairs,) = tmp_path.rglob("pairs.csv")
    rows = list(csv.DictReader(pairs.open()))
    assert len(rows) == 2 * 2 * 2 * 10  # data sets, kinds, widths, parents
    assert {row["level"] for row in rows if row["kind"] == "matryoshka"} <= {"0", "1"}
    assert np.isfinite([float(row["wide"]) for row in rows if row["width"] == "12"]).any()
    assert all(row["wide"] == "nan" for row in rows if row["width"] == "16")
    (grades,) = tmp_path.rglob("grades.csv")
    graded = {row["measure"]: row for row in csv.DictReader(grades.open()) if row["width"] == "12"}
    assert set(graded) == set(GRADED)
    for name, row in graded.items():
        assert 0 <= float(row["auc"]) <= 1, name
        assert 0 <= float(row["false_positives"]) <= 1, name
        assert 0 <= float(row["paired"]) <= 1 or name == "wide", name
        of_decoders = name in ("share", "predicted", "cosine", "degree", "covariance_degree", "movement")
        assert (row["noise"] == row["discriminability"] == "nan") == of_decoders, name
    (contrasts,) = tmp_path.rglob("contrasts.csv")
    against = [row for row in csv.DictReader(contrasts.open()) if "matryoshka against BatchTopK" in row["what"]]
    assert [(row["width"], row["parents"]) for row in against] == [("12", "4")] * 3 + [("16", "4")] * 3  # of each dose
    (costs,) = tmp_path.rglob("costs.csv")
    cost = {(row["data"], row["kind"], row["width"], row["number"]): row for row in csv.DictReader(costs.open())}
    assert cost["planted", "matryoshka", "16", "explained_variance"]["saes"] == "2"
    assert float(cost["planted", "BatchTopK", "16", "l0"]["difference"]) == 0
    assert cost["untouched", "matryoshka", "12", "untouched/l0"]["saes"] == "1"
    (levels,) = tmp_path.rglob("levels.csv")
    assert {row["kind"] for row in csv.DictReader(levels.open()) if row["level"] == "1"} <= {"matryoshka"}
    (saes,) = tmp_path.rglob("saes.csv")
    trained = list(csv.DictReader(saes.open()))
    assert [row["data"] for row in trained] == ["A"] * 4 + ["B"] * 4 + ["untouched"] * 4
    assert all(np.isfinite(float(row["untouched/explained_variance"])) for row in trained)
    assert all((row["degree/live_new_latents"] == "") == (row["data"] == "untouched") for row in trained)
    assert main(["plant", "--config", str(config)]) == 0
    printed = capsys.readouterr()
    assert "training" not in (printed.err + printed.out).replace("already trained", "")
    assert main(["plant", "--config", str(config), "--plant.batches", "2"]) == 0  # other rates, so other parents
    printed = capsys.readouterr()
    assert "training A/" in printed.err + printed.out


def test_the_lot_deals_equal_arms_and_swaps_them():
    options = PlantOptions([8], 1, parents=40, silent=5)
    lot = draw_lot(torch.full((45,), 0.1), options, seed=3)
    doses = torch.tensor(options.doses, dtype=torch.float64)
    for name in ("A", "B"):
        assert [(lot.doses[name][:40] == dose).sum().item() for dose in doses] == [10] * 4
        assert not lot.doses[name][40:].any()
    assert torch.equal(lot.doses["A"][:40] == doses[0], lot.doses["B"][:40] == doses[3])
    assert torch.equal(lot.doses["A"][:40] == doses[1], lot.doses["B"][:40] == doses[2])
    assert lot.elsewhere.tolist() == pytest.approx([0.0] * 40 + [0.3 * 0.1 / 0.9] * 5)
    assert not torch.equal(lot.doses["A"], draw_lot(torch.full((45,), 0.1), options, seed=4).doses["A"])


def test_pairs_see_a_dose_that_natural_hedging_hides():
    """What parents hedge by nature spreads widely: the dose moves no rank between parents, and every rank within a pair."""
    rows = [
        {"parent": parent, "data": data, "seed": 0, "dose": dose, "silent": False, "share": dose, "score": natural + dose / 10}
        for parent, natural in enumerate(range(0, 40, 10))
        for data, dose in (("A", 0.6 * (parent % 2)), ("B", 0.6 * (1 - parent % 2)))
    ]
    found = grade("BatchTopK", 8, rows, "score", [0.0, 0.6])
    assert found["auc"] == 0.5  # 3 / 4 in one set, 1 / 4 in the other: which parents were treated decides
    assert (found["paired"], found["paired_low"], found["paired_high"]) == (1.0, 1.0, 1.0)
    assert grade("BatchTopK", 8, rows, "dose", [0.0, 0.6])["auc"] == 1.0
    level = [{**row, "score": 1.0} for row in rows]
    assert grade("BatchTopK", 8, level, "score", [0.0, 0.6])["paired"] == 0.5  # ties count half


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plant.doses", "[0.3, 0.1]"], "plant.doses: must be two or more rising shares from 0 to 1"),
        (["--plant.rates", "[0.1]"], "plant.rates: must be a lowest and a highest rate"),
        (["--plant.widths", "[]"], "plant.widths: must be widths of at least 1"),
        (["--plant.n_new", "64"], "plant.n_new: must be below d_in = 64"),
        (["--plant.loss_contexts", "-1"], "plant.loss_contexts: expected a whole number of at least 0"),
        (["--plant.magnitude", "0"], "plant.magnitude: must be"),
        (["--plant.widths", "[1]"], "k: must lie between 1 and d_sae = 1"),
        (["--parents.class_path", "BatchTopKSAE", "--parents.d_sae", "8", "--parents.k", "2"], "plant.parents: 10 are needed"),
    ],
)
def test_mistakes(config, capsys, words, message):
    assert main(["plant", "--config", str(config), *words]) == 2
    assert message in capsys.readouterr().err
