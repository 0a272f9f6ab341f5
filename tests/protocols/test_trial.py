"""Trials of measures of hedging: per-level hedging by construction, and a small trial whose verdict must stand."""

import math

import pytest
import torch
from scipy.stats import spearmanr

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.errors import UserError
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench
from hedgelab.protocols.trial import Trial, TrialOptions, level_hedging, of_measure
from hedgelab.saes import SAE, BatchTopKSAE, MatryoshkaSAE


def test_inner_levels_hedge_on_what_later_levels_track():
    sae = MatryoshkaSAE(4, lambda d_in: BatchTopKSAE(d_in, 2, k=1), levels=[1, 2])
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[0.8, 0.6, 0.0, 0.0], [0.0, 0.96, 0.28, 0.0]]))
        inner, outer = level_hedging(sae, torch.eye(4), torch.tensor([True, True]))
    assert inner == pytest.approx(0.6)  # along feature 1, which the second level's latent tracks
    assert outer == pytest.approx(0.28)


def test_options_are_checked():
    with pytest.raises(UserError, match=r"trial.seeds: expected a whole number of at least 1"):
        TrialOptions(widths=[4], seeds=0)
    with pytest.raises(UserError, match=r"trial.widths"):
        TrialOptions(widths=[])


def test_the_three_lenses():
    rows = [
        {"true_hedging": true, "degree": true, "dead": 0.0, "residual": value, "residual_apart": apart, "residual_noise": 0.2}
        for true, value, apart in ((0.1, 1.0, 0.1), (0.2, 3.0, -0.1), (0.3, 2.0, 0.1))
    ]
    found, noise = of_measure("k", "residual", rows), 0.1 / 2**0.5
    assert found["validity"] == pytest.approx(0.5)  # ranks 1, 3, 2
    assert found["noise"] == pytest.approx(noise / 2)
    assert found["discriminability"] == pytest.approx(1 / noise)
    assert found["claimed"] == pytest.approx(0.2 / noise)
    assert of_measure("k", "degree", rows)["validity"] == pytest.approx(1)
    assert math.isnan(of_measure("k", "degree", rows)["noise"])
    assert math.isnan(of_measure("k", "dead", rows)["validity"])


@pytest.mark.slow
def test_residual_hedging_ranks_and_is_calibrated():
    rates = {"class_path": "Zipf", "init_args": {"exponent": 0.5, "largest": 0.4, "total": 5}}
    correlation = {"class_path": "LowRankCorrelation", "init_args": {"rank": 4, "strength": 0.0}}
    firing = {"n": 64, "rates": rates, "correlation": correlation}
    data = {"d_in": 64, "batch_size": 128, "firing": {"class_path": "CopulaFiring", "init_args": firing}}
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 3e-3}}
    kind = {"class_path": "BatchTopKSAE", "init_args": {"k": 2, "auxiliary_coefficient": 0.0, "optimizer": adam}}
    study = Trial(
        Recipe(ActivationDataModule, {"class_path": "ToyDataModule", "init_args": data}, "data"),
        {f"{strength}": {"correlation.init_args.strength": strength} for strength in (0.0, 0.1, 0.2, 0.4)},
        {"batch_topk": Recipe(SAE, kind, "kinds.batch_topk")},
        TrialOptions(widths=[8, 24], seeds=1, steps=1000, continued_steps=600, n_new=8),
    )
    outcome = study.run(Bench())
    scores = outcome.tables["table.csv"]
    assert len(scores) == 2 * 4
    ranks = spearmanr(*([one[name] for one in scores] for name in ("residual/hedging", "true_hedging")))
    assert outcome.metrics["spearman/residual/hedging/batch_topk"] == pytest.approx(ranks.statistic)
    assert ranks.statistic > 0.9
    for one in scores:
        assert math.isclose(
            one["residual/hedging"], one["true_hedging"], rel_tol=0.3, abs_tol=0.05 + 3 * one["residual/hedging_noise"]
        )
