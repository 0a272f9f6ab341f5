"""The balance finder on the paper's unequal hierarchy, at a small size."""

import numpy as np
import pytest

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError
from hedgelab.protocols.balance import BalanceStudy, BetaGrid, WeightSearch
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench
from hedgelab.saes import SAE

STEPS = 500
CHILDREN = [{"f0": given, "otherwise": 0} for given in (0.5, 0.15, 0.02)]
FIRING = {"class_path": "ConditionalFiring", "init_args": {"features": [0.25, *CHILDREN]}}
DATA = {"class_path": "ToyDataModule", "init_args": {"firing": FIRING, "d_in": 4, "sampling": "population", "seed": 0}}
COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": STEPS}}
INNER = {
    "d_sae": 4,
    "l1_coefficient": 3e-2,
    "init": {"at_features": True},
    "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 2e-2}},
    "lr_scheduler": COSINE,
}
LEVELS = {"levels": [1, 4], "inner": {"class_path": "VanillaSAE", "init_args": INNER}}


@pytest.mark.slow
def test_credit_beats_every_fixed_weight_and_adaptive_weights_find_the_best_of_them():
    data = Recipe(ActivationDataModule, DATA, "data")
    model = Recipe(SAE, {"class_path": "MatryoshkaSAE", "init_args": LEVELS}, "model")
    search = WeightSearch([1, 2, 3, 4], members=8, rounds=2)
    study = BalanceStudy(data, model, BetaGrid(0.03, 1.0, 7), search, [0.5, 0.05], steps=STEPS)
    tables = study.run(Bench()).tables
    methods = {row["method"]: row for row in tables["methods.csv"]}
    error = {name: row["encoder_error"] for name, row in methods.items()}
    fixed = [row["encoder_error"] for row in tables["curves.csv"] if row["curve"] == "β"]
    assert len(fixed) == 7
    assert error["best β"] <= min(fixed) + 1e-6
    assert 0.06 < error["best β"] < 0.08
    for start in ("0.5", "0.05"):
        adapted = methods[f"adaptive weights from β = {start}"]
        assert adapted["encoder_error"] == pytest.approx(error["best β"], abs=0.02)
        assert 0.09 < adapted["level_weights"][0] < 0.18
    assert error["credit, β = 1"] < 0.012
    assert methods["credit, β = 1"]["decoder_error"] < 0.02
    assert error["β = 1, plain matryoshka"] > 0.3
    encoder = [methods["best β"][f"encoder_feature{j}"] for j in range(4)]
    assert encoder[3] < 0 < encoder[1]
    assert np.linalg.norm(encoder[1:]) == pytest.approx(error["best β"], abs=1e-4)
    assert len(methods["one weight a level"]["level_weights"]) == 4


def test_mistakes():
    with pytest.raises(UserError, match="0 < low < high"):
        BetaGrid(0.0, 1.0)
    with pytest.raises(UserError, match="points"):
        BetaGrid(points=2)
    with pytest.raises(UserError, match="members"):
        WeightSearch([1, 2], members=3)
    with pytest.raises(UserError, match="rounds"):
        WeightSearch([1, 2], rounds=0)
