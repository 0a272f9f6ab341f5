"""Trials of measures of hedging: per-level hedging by construction, and a small trial whose verdict must stand."""

import math

import pytest
import torch

from hedgelab.errors import UserError
from hedgelab.protocols.trial import TrialOptions, TrialScore, agreement, level_hedging
from hedgelab.saes import BatchTopKSAE, MatryoshkaSAE


def score(true, residual, degree):
    return TrialScore("topk", 8, "toy", 0, true, residual, 0.0, degree, 8)


def test_agreement_is_spearmans():
    scores = [score(0.1, 0.2, 3.0), score(0.2, 0.3, 1.0), score(0.3, 0.9, 2.0)]
    assert agreement(scores, "residual_hedging") == pytest.approx(1)
    assert agreement(scores, "degree") == pytest.approx(-0.5)


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


@pytest.mark.slow
def test_residual_hedging_ranks_and_is_calibrated():
    from functools import partial

    from torch.optim import Adam

    from hedgelab.data.toy import CopulaFiring, ToyDataModule
    from hedgelab.protocols.study import Bench
    from hedgelab.protocols.trial import run_trial
    from hedgelab.saes.initialization import Initialization

    def toy(strength):
        firing = CopulaFiring(n=64, exponent=0.5, max_rate=0.4, mean_l0=5, rank=4, strength=strength)
        return ToyDataModule(firing, d_in=64, batch_size=128, seed=0)

    def make(kind, width, seed):
        init = Initialization(seed=seed)
        optimizer = partial(Adam, lr=3e-3)
        return BatchTopKSAE(64, width, k=2, auxiliary_coefficient=0.0, init=init, optimizer=optimizer)

    toys = {f"{strength}": toy(strength) for strength in (0.0, 0.1, 0.2, 0.4)}
    options = TrialOptions(widths=[8, 24], seeds=1, steps=1000, continued_steps=600, n_new=8)
    scores = run_trial(Bench(), toys, ["batch_topk"], make, options)
    assert agreement(scores, "residual_hedging") > 0.9
    for result in scores:
        assert math.isclose(
            result.residual_hedging, result.true_hedging, rel_tol=0.3, abs_tol=0.04 + 3 * result.residual_std
        )
