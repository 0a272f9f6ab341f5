"""The balance finder on the paper's unequal hierarchy, at a small size."""

import functools

import numpy as np
import pytest
import torch

from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.protocols.balance import BetaGrid, WeightSearch, find_balance, fits, scores
from hedgelab.protocols.study import Bench
from hedgelab.saes import Initialization, MatryoshkaSAE, VanillaSAE

STEPS = 500


@pytest.fixture(scope="module")
def data():
    children = [{"f0": given, "otherwise": 0} for given in (0.5, 0.15, 0.02)]
    return ToyDataModule(ConditionalFiring([0.25, *children]), d_in=4, sampling="population", seed=0)


@pytest.fixture(scope="module")
def make(data):
    def made(levels=(1, 4), **arguments):
        inner = functools.partial(
            VanillaSAE,
            d_sae=4,
            l1_coefficient=3e-2,
            init=Initialization(at_features=True),
            optimizer=functools.partial(torch.optim.Adam, lr=2e-2),
            lr_scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS),
        )
        sae = MatryoshkaSAE(4, lambda d_in: inner(d_in), list(levels), **arguments)
        sae.initialize(data.batch("train", 0), data.feature_directions)
        return sae

    return made


@pytest.mark.slow
def test_credit_beats_every_fixed_weight_and_adaptive_weights_find_the_best_of_them(make, data):
    trained, batch = [], data.batch("train", 0)

    def train(members):
        trained.append(members)
        return scores(Bench().train(members, batch, STEPS), batch, data.feature_directions, 0)

    search = WeightSearch([1, 2, 3, 4], members=8, rounds=2)
    curves, methods = find_balance(make, train, BetaGrid(0.03, 1.0, 7), search, (0.5, 0.05))
    assert len(trained) == fits(search)
    error = {name: one.encoder_error for name, one in methods.items()}
    assert error["best β"] <= min(one.encoder_error for one in curves["β"]) + 1e-6
    assert 0.06 < error["best β"] < 0.08
    for start in ("0.5", "0.05"):
        adapted = methods[f"adaptive weights from β = {start}"]
        assert adapted.encoder_error == pytest.approx(error["best β"], abs=0.02)
        assert 0.09 < adapted.weights[0] < 0.18
    assert error["credit, β = 1"] < 0.012
    assert methods["credit, β = 1"].decoder_error < 0.02
    assert error["β = 1, plain matryoshka"] > 0.3
    encoder = methods["best β"].encoder
    assert encoder[3] < 0 < encoder[1]
    assert np.linalg.norm(encoder[1:]) == pytest.approx(error["best β"], abs=1e-4)
    assert len(methods["one weight a level"].weights) == 4


def test_mistakes():
    with pytest.raises(UserError, match="0 < low < high"):
        BetaGrid(0.0, 1.0)
    with pytest.raises(UserError, match="points"):
        BetaGrid(points=2)
    with pytest.raises(UserError, match="members"):
        WeightSearch([1, 2], members=3)
    with pytest.raises(UserError, match="rounds"):
        WeightSearch([1, 2], rounds=0)
