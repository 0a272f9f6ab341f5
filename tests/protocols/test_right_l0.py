"""``hedgelab l0`` on a toy whose right L0 is known."""

import pytest
import torch

from hedgelab.cli import main
from hedgelab.data.toy import CopulaFiring, ToyDataModule
from hedgelab.data.toy.laws import Linear
from hedgelab.metrics.functional import nth_decoder_projection
from hedgelab.protocols.right_l0 import RightL0, lowest, measured, true_l0
from hedgelab.saes import BatchTopKSAE


@pytest.fixture
def toy():
    rates = Linear(0.3, 0.1)
    return ToyDataModule(d_in=16, batch_size=256, firing=CopulaFiring(8, rates), seed=0)


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "l0.yaml"
    config.write_text("""
seed_everything: 0
l0: {values: [1, 2, 4], steps: 30, seeds: 2, batches: 2}
data:
  class_path: ToyDataModule
  init_args:
    d_in: 16
    batch_size: 64
    firing: {class_path: CopulaFiring, init_args: {n: 8, rates: {class_path: Linear, init_args: {start: 0.3, end: 0.1}}}}
model: {class_path: BatchTopKSAE, init_args: {d_sae: 8, k: 2}}
""")
    return ["l0", "--config", str(config)]


def test_projection_is_that_entry_of_the_sorted_list():
    rng = torch.Generator().manual_seed(0)
    x, W_dec, b_dec = torch.randn(20, 5, generator=rng), torch.randn(7, 5, generator=rng), torch.randn(5, generator=rng)
    rows = W_dec.double() / W_dec.double().norm(dim=1, keepdim=True)
    entries = ((x - b_dec).double() @ rows.T).flatten().sort(descending=True).values
    for n in (1, 3, 7):
        assert float(nth_decoder_projection(x, W_dec, b_dec, n)) == pytest.approx(float(entries[20 * n - 1]), abs=1e-5)


def test_right_l0_counts_the_most_frequent_features(toy):
    rates = toy.firing.rates().sort(descending=True).values
    assert true_l0(toy, 8, 64) == pytest.approx(float(rates.sum()), abs=0.05)
    assert true_l0(toy, 3, 64) == pytest.approx(float(rates[:3].sum()), abs=0.05)


def test_latents_that_mix_features_score_worse_on_both_measures(toy):
    directions = toy.feature_directions
    sae = BatchTopKSAE(16, 8, k=2)
    scores = []
    for mixed in (0.0, 0.5):
        with torch.no_grad():
            sae.W_dec.copy_(directions + mixed * directions[0])
            sae.W_enc_rows.copy_(sae.W_dec)
            sae.b_dec.zero_()
        sae.threshold.fill_(0.1)
        scores.append(measured(sae, toy, 3, 4))
    clean, mixing = scores
    assert clean["cosine"] == pytest.approx(0, abs=1e-6)
    assert mixing["cosine"] > 0.1
    assert clean["projection"] < mixing["projection"]
    assert clean["nearest_feature"] == pytest.approx(1, abs=1e-5)
    assert mixing["nearest_feature"] < 0.95


def test_the_lowest_point_lies_between_values():
    at = [4.0, 6.0, 9.0, 13.5]
    assert lowest(at, [(torch.tensor(x / 7.0).log() ** 2).item() for x in at]) == pytest.approx(7.0, rel=1e-4)
    assert lowest([3.0, 1.0, 2.0], [0.0, 5.0, 1.0]) == 3.0  # in any order; at an end, the end


def test_a_search_is_tracked_and_not_trained_twice(words, capsys):
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "right L0 of these features and 8 latents: 1." in first
    assert first.count(": L0 ") == 2
    assert main([*words, "--l0.n", "4"]) == 0  # another measure of the same SAEs
    again = capsys.readouterr()
    assert "steps/s" not in again.out + again.err


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--l0.values", "[3, 2, 1]"], "l0.values: must be three or more rising numbers above 0, got [3.0, 2.0, 1.0]"),
        (["--l0.n", "9"], "l0.n: must be from 1 to d_sae = 8, got 9"),
        (["--l0.seeds", "0"], "l0.seeds: "),
        (["--l0.values", "[1, 2.5, 4]"], "l0.values: k must be whole, got 2.5"),
    ],
)
def test_mistakes(words, capsys, more, line):
    assert main([*words, *more]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("d_sae", "right"), [(25, 7.67), (50, 11.0), (100, 11.0)], ids=["narrow", "full", "wide"])
def test_the_shipped_toy_finds_its_right_l0(tmp_path, monkeypatch, d_sae, right, request):
    monkeypatch.chdir(tmp_path)
    found = {}
    monkeypatch.setattr(RightL0, "run", lambda self, bench, run=RightL0.run: found.setdefault("it", run(self, bench)))
    config = request.config.rootpath / "configs/toy/right_l0.yaml"
    assert main(["l0", "--config", str(config), "--model.d_sae", str(d_sae)]) == 0
    metrics = found["it"].metrics
    assert metrics["l0/right"] == pytest.approx(right, rel=0.02)
    assert metrics["l0/projection"] == pytest.approx(right, rel=0.1)
    if d_sae <= 50:  # of spare latents the pairs say little
        assert metrics["l0/cosine"] == pytest.approx(right, rel=0.1)
