"""Planted features: their rates, arms, magnitudes and directions, and batches that are functions of their number."""

import pytest
import torch

from hedgelab.data.planting import (
    LatentEvents,
    MatchedDirections,
    PlantedActivations,
    PlantedParents,
    PrincipalDirections,
    RandomDirections,
    TokenEvents,
)
from hedgelab.data.tensors import TensorActivations
from hedgelab.data.toy import IndependentFiring, ToyDataModule
from hedgelab.errors import UserError
from hedgelab.saes import TopKSAE

D_IN = 24
SCALES = torch.linspace(3.0, 0.2, D_IN)


def base(**options):
    x = torch.randn(20_000, D_IN, generator=torch.Generator().manual_seed(0)) * SCALES
    return TensorActivations(x, batch_size=2000, seed=1, **options)


def drawn(data, count=8):
    """Activations of all features and what was added to the base's, over some batches."""
    batches = [data.batch("train", i) for i in range(count)]
    added = torch.cat([batch.x - data.base.batch("train", i).x for i, batch in enumerate(batches)])
    return torch.cat([batch.features for batch in batches]), added


def test_what_is_added_is_what_the_features_say():
    data = PlantedActivations(base(), firing=IndependentFiring([0.1, 0.3]), magnitude_mean=[0.5, 1.0], seed=0)
    features, added = drawn(data)
    assert data.unit == pytest.approx(float(torch.randn(50_000, D_IN).mul(SCALES).norm(dim=1).median()), rel=0.02)
    torch.testing.assert_close(added, features @ data.feature_directions, atol=1e-4, rtol=0)
    torch.testing.assert_close((features > 0).float().mean(0), torch.tensor([0.1, 0.3]), atol=0.012, rtol=0)
    assert features[:, 1].max() == pytest.approx(data.unit)
    assert data.parents.tolist() == [-1, -1]


def test_children_fire_by_their_dose_where_planted_parents_do_and_elsewhere_as_said():
    events = PlantedParents([0.2, 0.2, 0.2], magnitude=0.7)
    data = PlantedActivations(base(), events, dose=[0.0, 0.6, 0.0], elsewhere=[0.0, 0.0, 0.1], seed=0)
    features, added = drawn(data)
    assert data.parents.tolist() == [-1, -1, -1, 0, 1, 2]
    torch.testing.assert_close(added, features @ data.feature_directions, atol=1e-4, rtol=0)
    on, child = features[:, :3] > 0, features[:, 3:] > 0
    assert on.float().mean(0).tolist() == pytest.approx([0.2] * 3, abs=0.012)
    assert features[:, 0].max() == pytest.approx(0.7 * data.unit)
    assert not child[:, 0].any()
    assert child[on[:, 1], 1].float().mean() == pytest.approx(0.6, abs=0.03)
    assert not child[~on[:, 1], 1].any()
    assert not child[on[:, 2], 2].any()
    assert child[~on[:, 2], 2].float().mean() == pytest.approx(0.1, abs=0.01)


def test_natural_parents_are_latents_of_an_sae_and_are_not_added():
    sae = TopKSAE(d_in=D_IN, d_sae=16, k=3)
    sae.W_dec.data *= 2
    data = PlantedActivations(base(), LatentEvents(sae, [5, 2]), dose=0.5, seed=0)
    features, added = drawn(data)
    x = torch.cat([data.base.batch("train", i).x for i in range(8)])
    codes, scale = sae.encode(x).to_dense()[:, [5, 2]], sae.W_dec[[5, 2]].norm(dim=1)
    torch.testing.assert_close(features[:, :2], codes * scale)
    torch.testing.assert_close(added, features[:, 2:] @ data.feature_directions[2:], atol=1e-4, rtol=0)
    assert (features[codes[:, 0] > 0, 2] > 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert data.parents.tolist() == [-1, -1, 0, 1]
    own = torch.nn.functional.cosine_similarity(data.feature_directions[:2], sae.W_dec[[5, 2]])
    torch.testing.assert_close(own, torch.ones(2))


def test_magnitudes_spread():
    data = PlantedActivations(base(), PlantedParents([0.5]), dose=1.0, magnitude_mean=1.0, magnitude_std=0.2, seed=0)
    child = drawn(data)[0][:, 1] / data.unit
    child = child[child > 0]
    assert float(child.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(child.std()) == pytest.approx(0.2, abs=0.01)


def test_batches_depend_on_their_number_and_seed_alone():
    one, again, other = (
        PlantedActivations(base(), PlantedParents([0.3]), firing=IndependentFiring([0.2]), seed=seed) for seed in (0, 0, 1)
    )
    list(one.plain(3))
    for stage, number in (("train", 7), ("val", 1)):
        first, second = one.batch(stage, number), again.batch(stage, number)
        assert torch.equal(first.x, second.x)
        assert torch.equal(first.features, second.features)
        assert not torch.equal(first.features, other.batch(stage, number).features)
    ahead = list(one.batches_at("train", [4, 2]))
    assert torch.equal(ahead[1].x, one.batch("train", 2).x)


def test_ranks_see_their_rows_of_the_same_batch(monkeypatch):
    data = PlantedActivations(base(), PlantedParents([0.3]), firing=IndependentFiring([0.2]), seed=0)
    whole = data.batch("train", 3)
    parts = []
    for rank in range(2):
        for module in ("hedgelab.data.datamodule", "hedgelab.data.planting.datamodule"):
            monkeypatch.setattr(f"{module}.data_rank", lambda trainer, rank=rank: (rank, 2))
        parts += list(data.batches("train", 3, 4))
    assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
    assert torch.equal(torch.cat([part.features for part in parts]), whole.features)


def test_directions():
    rows, rng = torch.randn(50_000, D_IN) * SCALES, torch.Generator().manual_seed(0)
    random = RandomDirections().choose(8, rows, rng)
    torch.testing.assert_close(random @ random.t(), torch.eye(8).double())
    loud = MatchedDirections().choose(4000, rows, rng)
    # E[f fᵀ] is near C / tr C: the loudest axis gets a share of directions like its share of variance
    share = SCALES.double().square() / SCALES.double().square().sum()
    torch.testing.assert_close(loud.square().mean(0), share, atol=0.02, rtol=0)
    assert loud.norm(dim=1).tolist() == pytest.approx([1.0] * 4000)
    principal = PrincipalDirections(0.8, rank=4).choose(100, rows, rng)
    assert principal[:, :4].norm(dim=1).tolist() == pytest.approx([0.8] * 100, abs=0.03)


def test_mistakes():
    with pytest.raises(UserError, match=r"data.firing: missing"):
        PlantedActivations(base())
    with pytest.raises(UserError, match=r"data.dose: expected one number or a list of 1, one a feature, got 2"):
        PlantedActivations(base(), PlantedParents([0.1]), dose=[0.1, 0.2])
    with pytest.raises(UserError, match=r"data.dose: must be a probability"):
        PlantedActivations(base(), PlantedParents([0.1]), dose=1.5)
    with pytest.raises(UserError, match=r"data.base: its features are known already"):
        PlantedActivations(ToyDataModule(IndependentFiring([0.1])), PlantedParents([0.1]))
    with pytest.raises(UserError, match=r"TokenEvents need activations of a language model"):
        PlantedActivations(base(), TokenEvents(["a"])).batch("train", 0)
    with pytest.raises(UserError, match=r"must be from 0 to d_sae - 1 = 7, got 9"):
        PlantedActivations(base(), LatentEvents(TopKSAE(d_in=D_IN, d_sae=8, k=2), [9])).batch("train", 0)
    with pytest.raises(UserError, match=r"is no regular expression"):
        TokenEvents(["("])
