"""Every toy config shows what SPEC section 4 says it shows: the same config on the exact population, learning faster.

One is trained by default; ``tests/cli/test_paper_toys.py`` solves all of them for their optimum in the time of a blink.
"""

from pathlib import Path

import pytest
import torch

from hedgelab.cli.lightning import HedgelabCLI

CONFIGS = Path(__file__).parents[2] / "configs" / "toy"
INNER = {"balance_detached", "balance_standard", "balance_balanced", "unbalanceable"}


def fit(name, tmp_path, monkeypatch):
    """Cosines of decoder and encoder with the true features, and the decoder bias along them."""
    monkeypatch.chdir(tmp_path)
    inner = "inner.init_args." if name in INNER else ""
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--trainer.logger", "false", "--trainer.max_steps", "4000"]
    words += ["--data.init_args.sampling", "population", "--trainer.accelerator", "cpu"]
    words += [f"--model.init_args.{inner}optimizer.init_args.lr", "2e-3", "--trainer.enable_checkpointing", "false"]
    cli = HedgelabCLI("fit", [*words, "--trainer.enable_progress_bar", "false"])
    folded, features = cli.model.folded(), cli.datamodule.feature_directions
    encoder = torch.nn.functional.normalize(folded.W_enc.t(), dim=1)
    assert cli.trainer.global_step == 4000
    return folded.W_dec @ features.t(), encoder @ features.t(), folded.b_dec @ features.t()


@pytest.fixture
def show(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    return lambda name: fit(name, tmp_path, monkeypatch)


@pytest.mark.slow
def test_independent_features_do_not_hedge(show):
    decoder, encoder, bias = show("independent")
    assert decoder[0, 0] > 0.999
    assert decoder[0, 1].abs() <= 0.02
    assert encoder[0, 1].abs() <= 0.02
    assert bias[1] == pytest.approx(0.2, abs=0.01)


def test_hierarchy_hedges_in_encoder_and_decoder(show):
    decoder, encoder, _ = show("hierarchical")
    assert decoder[0, 1] == pytest.approx(0.2434, abs=0.005)
    assert encoder[0, 1] > 0.02


@pytest.mark.slow
def test_absorption_has_a_negative_encoder_and_a_mixed_decoder(show):
    decoder, encoder, _ = show("absorption")
    assert encoder[0, 1] < -0.1
    assert decoder[1, 0] > 0.15
    assert decoder[0, 1].abs() < 0.02


@pytest.mark.slow
def test_correlation_hedges_and_more_l1_lessens_it(show):
    low, _, _ = show("correlated_low_l1")
    high, encoder, _ = show("correlated_high_l1")
    assert low[0, 1] == pytest.approx(0.2219, abs=0.005)
    assert 0.1 < high[0, 1] < low[0, 1] - 0.02
    assert encoder[0, 1] > 0.02


@pytest.mark.slow
def test_anti_correlation_hedges_negatively(show):
    decoder, encoder, _ = show("anti_correlated")
    assert decoder[0, 1] == pytest.approx(-0.22, abs=0.02)
    assert encoder[0, 1] < -0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["correlated_full_width", "anti_correlated_full_width"])
def test_full_width_is_clean(show, name):
    decoder, encoder, _ = show(name)
    own = torch.eye(2)
    torch.testing.assert_close(decoder, own, atol=0.02, rtol=0)
    assert (encoder * (1 - own)).abs().max() < 0.03


@pytest.mark.slow
def test_the_balance_trio(show):
    parents = {name: show(f"balance_{name}")[1][0, 1:] for name in ("detached", "standard", "balanced")}
    assert (parents["detached"] > 0.1).all()
    assert (parents["standard"] < -0.05).all()
    assert (parents["balanced"].abs() < 0.02).all()


@pytest.mark.slow
def test_the_unbalanceable_stays_unbalanced(show):
    _, encoder, _ = show("unbalanceable")
    parent = encoder[0, 1:]
    assert parent.max() - parent.min() > 0.08
