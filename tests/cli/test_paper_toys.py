"""Every toy row of SPEC section 4 without noise: each shipped config at its population optimum, beside its closed form."""

from pathlib import Path

import pytest
import torch

from hedgelab.protocols.figures import solve

CONFIGS = Path(__file__).parents[2] / "configs" / "toy"
SINGLE = {  # feature 1's part of the one latent's decoder, by PCA where λ is small (SPEC section 4)
    "independent": 0.0,
    "hierarchical": 0.2434,
    "correlated_low_l1": 0.2219,
    "correlated_high_l1": None,
    "anti_correlated": None,
}


def solved(name):
    """Numbers by name, and what was found by latent and feature: decoder, encoder, bias."""
    numbers, rows, _ = solve(str(CONFIGS / f"{name}.yaml"))
    latents = 1 + max(row["latent"] for row in rows)
    tables = (torch.tensor([row[key] for row in rows]).reshape(latents, -1) for key in ("decoder", "encoder", "b_dec"))
    return numbers, *tables


@pytest.mark.parametrize("name", SINGLE)
def test_single_latents_are_at_their_closed_form(name):
    numbers, decoder, _, bias = solved(name)
    assert numbers["distance_to_closed_form"] < 1e-3
    assert abs(numbers["loss_above_closed_form"]) < 1e-6
    if SINGLE[name] is not None:
        assert decoder[0, 1] == pytest.approx(SINGLE[name], abs=1e-3)
    if name == "independent":
        assert bias[0, 1] == pytest.approx(0.2, abs=1e-3)
    if name == "anti_correlated":
        assert decoder[0, 1] < -0.1
    if name == "correlated_high_l1":
        assert 0.1 < decoder[0, 1] < 0.2


@pytest.mark.parametrize("name", ["correlated_full_width", "anti_correlated_full_width"])
def test_full_width_is_clean(name):
    _, decoder, _, _ = solved(name)
    assert decoder.diagonal().min() > 0.999
    assert decoder[0, 1].abs() < 0.02
    assert decoder[1, 0].abs() < 0.02


def test_absorption():
    _, decoder, encoder, _ = solved("absorption")
    assert encoder[0, 1] < -0.1
    assert decoder[1, 0] > 0.15
    assert decoder[0, 1].abs() < 1e-3


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("balance_detached", 0.1, 0.3), ("balance_standard", -1.0, -0.05), ("balance_balanced", -0.02, 0.02)],
)
def test_balance(name, low, high):
    _, _, encoder, _ = solved(name)
    assert ((encoder[0, 1:] > low) & (encoder[0, 1:] < high)).all()


def test_the_unbalanceable_stays_unbalanced():
    _, _, encoder, _ = solved("unbalanceable")
    assert encoder[0, 1:].min() < -0.02 < 0.05 < encoder[0, 1:].max()
