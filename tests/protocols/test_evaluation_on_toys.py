"""Suites that need no language model, on a toy whose features are known."""

import numpy as np
import pytest
import torch

from hedgelab.cli import main
from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.metrics.functional import decoder_cosines, mcc
from hedgelab.protocols.evaluation.built_in import GeometrySuite, ResidualSuite, TruthSuite, alike, over_live
from hedgelab.protocols.evaluation.oracle import Oracle
from hedgelab.protocols.evaluation.reader import Readings
from hedgelab.saes import JumpReLUSAE, TopKSAE
from hedgelab.saes.initialization import Initialization


@pytest.fixture
def toy():
    return ToyDataModule(d_in=12, batch_size=256, firing=IndependentFiring([0.2] * 8), seed=0)


def perfect(toy, mixed=0.0):
    """An SAE with a latent for each of the first four features, that hedge on the fifth."""
    directions = toy.feature_directions
    sae = JumpReLUSAE(12, 4, threshold=0.5, target_l0=1.0)
    with torch.no_grad():
        sae.W_enc.copy_(directions[:4].T)
        sae.W_dec.copy_(directions[:4] + mixed * directions[4])
        sae.b_dec.zero_()
        sae.b_enc.zero_()
    return sae


def scores_of(suite, saes, toy):
    return {name: scores.metrics for name, scores in suite.score(saes, Readings(toy))}


def test_truth_says_what_a_validation_pass_would(toy):
    found = scores_of(TruthSuite(8), {"clean": perfect(toy), "hedging": perfect(toy, 0.5)}, toy)
    assert found["clean"]["truth/nearest_f1"] == pytest.approx(1, abs=1e-6)
    assert found["clean"]["truth/hedging/decoder"] == pytest.approx(0, abs=1e-5)
    assert found["hedging"]["truth/hedging/decoder"] == pytest.approx(0.5 / 1.25**0.5, rel=0.15)
    assert found["clean"]["truth/l0"] == pytest.approx(0.8, abs=0.1)


def test_residual_hedging_comes_with_its_nulls(toy):
    (found,) = scores_of(ResidualSuite(4096), {"clean": perfect(toy)}, toy).values()
    assert set(found) == {f"residual/{name}" for name in ("hedging", "hedging_noise", "flipped", "surrogate")}
    assert abs(found["residual/hedging"]) < 4 * found["residual/hedging_noise"] + 0.02
    assert abs(found["residual/surrogate"]) < 0.05


def test_the_oracle_is_perfect_even_in_superposition():
    toy = ToyDataModule(d_in=6, batch_size=128, firing=IndependentFiring([0.2] * 10), target_cosine=0.2, seed=0)
    oracle, batch = Oracle(toy), toy.batch("val", 3)
    assert torch.equal(oracle.encode(batch.x).to_dense(), batch.features.to_dense())
    (found,) = scores_of(TruthSuite(4), {"oracle": oracle}, toy).values()
    assert found["truth/nearest_f1"] == pytest.approx(1)
    assert found["truth/hedging/decoder"] == pytest.approx(0, abs=1e-5)
    assert found["truth/explained_variance"] == pytest.approx(1)
    with pytest.raises(UserError, match="validation batches only"):
        oracle.encode(torch.zeros(1, 6) + 0.123)


def test_every_score_of_geometry_has_its_noise(toy):
    found = scores_of(GeometrySuite(512), {"clean": perfect(toy)}, toy)["clean"]
    scores = {name for name in found if not name.endswith("_noise")}
    assert {f"{name}_noise" for name in scores} <= set(found)
    # a latent that fires in one part of the rows alone is live or not, as the part goes
    values, elsewhere = torch.tensor([0.2, 0.4, 0.9]), torch.ones(4, 3, dtype=torch.bool)
    elsewhere[1, 2] = False
    found = over_live("s", values, elsewhere)
    assert found["s"] == pytest.approx(0.5)
    assert found["s_noise"] == pytest.approx((3 / 4 * (3 * 0.05**2 + 0.15**2)) ** 0.5)


def test_seeds_of_one_sae_are_compared_with_each_other(toy):
    saes = {
        name: TopKSAE(12, 6, k=k, init=Initialization(seed=seed)) for name, k, seed in (("a", 1, 0), ("b", 1, 1), ("c", 2, 0))
    }
    assert alike(saes["a"], saes["b"])
    assert not alike(saes["a"], saes["c"])
    found = scores_of(GeometrySuite(256), saes, toy)
    expected = float(mcc(decoder_cosines(saes["a"].W_dec.detach(), saes["b"].W_dec.detach())))
    for name in ("a", "b"):
        assert found[name]["geometry/pw_mcc"] == pytest.approx(expected)
    assert "geometry/pw_mcc" not in found["c"]
    assert found["a"]["geometry/nth_projection"] > 0


PLANTED = """
class_path: PlantedActivations
init_args:
  base: {class_path: TensorActivations, init_args: {x: x.npy, batch_size: 64, held_out: 0.3}}
  events: {class_path: PlantedParents, init_args: {rates: [0.2, 0.2]}}
"""


def test_truth_of_planted_features_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = "model: {class_path: TopKSAE, init_args: {d_sae: 6, k: 2}}\ntrainer: {max_steps: 5, enable_progress_bar: false}\n"
    (tmp_path / "c.yaml").write_text("seed_everything: 0\n" + model + "data:" + PLANTED.replace("\n", "\n  "))
    np.save(tmp_path / "x.npy", torch.randn(2000, 8).numpy())
    assert main(["fit", "--config=c.yaml", "--name=planted"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "planted", "--suite=truth", "--truth", "--truth_batches=4"]) == 0
    assert "truth/planted/child_share" in capsys.readouterr().out
    assert main(["evaluate", "planted", "--suite=truth"]) == 2  # scores of an evaluation are those of natural activations
    assert "planted ones with --truth" in capsys.readouterr().err
