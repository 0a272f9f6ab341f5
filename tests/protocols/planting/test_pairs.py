"""Pairs of parents and children, in SAEs made by hand."""

import pytest
import torch

from hedgelab.data.planting import PlantedActivations, PlantedParents
from hedgelab.data.tensors import TensorActivations
from hedgelab.protocols.planting.measures import measure
from hedgelab.saes import MatryoshkaSAE, VanillaSAE

D_IN, DOSE, HELD = 12, 0.4, 0.3


def planted():
    """Two parents with a child each, in activations of a norm near 3."""
    x = torch.randn(40_000, D_IN, generator=torch.Generator().manual_seed(0))
    base = TensorActivations(x, batch_size=2000, seed=0, val_batches=10, held_out=0.5)
    return PlantedActivations(base, PlantedParents([0.1, 0.2], magnitude=20.0), dose=[DOSE, 0.0], magnitude_mean=10.0, seed=0)


def by_hand(data, sae):
    """Parents read by latents 0 and 1, whose rows hold some of the child; latent 2 is the second child's."""
    p0, p1, c0, c1 = data.feature_directions
    sae.W_dec.data = torch.stack([2 * (p0 + HELD * c0), p1 + 0.1 * p0, c1])
    sae.W_enc.data.copy_(torch.stack([p0 / 2, p1 / 2, c1], dim=1))
    sae.b_enc.data.fill_(-5 * data.unit)
    sae.b_dec.data.zero_()
    return sae


def test_shares_are_what_rows_hold_and_theory_is_the_coefficient_of_the_code():
    data = planted()
    found = measure(by_hand(data, VanillaSAE(d_in=D_IN, d_sae=3, l1_coefficient=1.0)), data, 10)
    assert found.pairs.latent.tolist() == [0, 1]
    assert found.pairs.share.tolist() == pytest.approx([HELD / (1 + HELD**2) ** 0.5, 0.0], abs=1e-5)
    # the code is nearly constant where it fires: (20 / 2 - 5) units, times a row of norm 2 √(1 + HELD²)
    code = 5 * data.unit * 2 * (1 + HELD**2) ** 0.5
    assert found.pairs.predicted.tolist() == pytest.approx([DOSE * 10 * data.unit / code, 0.0], rel=0.05, abs=1e-3)
    assert found.pairs.has_latent.tolist() == [False, False]  # the second child never fires: its latent is dead
    assert found.pairs.level.tolist() == [0, 0]
    assert found.numbers["l0"] == pytest.approx(0.3, abs=0.02)
    assert found.numbers["untouched/l0"] == 0.0
    assert found.numbers["explained_variance"] > 0.3


def test_levels_are_those_of_the_parents_latents():
    data = planted()
    sae = MatryoshkaSAE(d_in=D_IN, levels=[1, 3], inner=VanillaSAE(d_in=D_IN, d_sae=3, l1_coefficient=1.0))
    by_hand(data, sae.inner)
    assert measure(sae, data, 4).pairs.level.tolist() == [0, 1]
