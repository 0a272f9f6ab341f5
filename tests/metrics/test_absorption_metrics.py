"""Absorption of constructed SAEs, and the inference of hierarchies."""

import pytest
import torch

from hedgelab.kernels.codes import Codes
from hedgelab.metrics import FeatureDetection, FeatureHierarchy
from hedgelab.metrics.functional import absorption_from_co_firing, co_firing, encoder_coordinates, parent_encoder_components

PARENTS = torch.tensor([-1, 0])
LATENT = torch.tensor([0, 1])


def population():
    """The hierarchical toy: P(f1) = .25, P(f2 | f1) = .2."""
    features = torch.tensor([[0.0, 0], [1, 0], [1, 1]])
    return features, torch.tensor([0.75, 0.2, 0.05], dtype=torch.float64)


def encode(features, W_enc):
    return Codes.from_dense((features @ W_enc).relu())


ABSORBING = torch.tensor([[1.0, 0], [-1, 1]])  # columns: f1 - f2, f2
CLEAN = torch.eye(2)


@pytest.mark.parametrize(("W_enc", "score", "component"), [(ABSORBING, 1.0, -(0.5**0.5)), (CLEAN, 0.0, 0.0)])
def test_absorbing_and_clean_sae(W_enc, score, component):
    features, weight = population()
    codes = encode(features, W_enc)
    scores = absorption_from_co_firing(co_firing(codes, features, weight), LATENT, PARENTS)
    assert scores.missed[1].item() == score
    assert scores.missed_without_child[1].item() == 0
    assert scores.excess[1].item() == score
    assert scores.excess[0].isnan()
    components = parent_encoder_components(encoder_coordinates(W_enc, torch.eye(2)), LATENT, PARENTS)
    assert components[1].item() == pytest.approx(component)
    assert components[0].isnan()


def sampled(batch=4000):
    """Two children, each only with the parent, and a stranger; latents that miss at random."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(batch, 4, generator=generator)
    parent = draws[:, 0] < 0.4
    children = parent[:, None] & (draws[:, 1:3] < torch.tensor([0.3, 0.1]))
    features = torch.column_stack([draws[:, 3] < 0.5, children, parent]).float()
    heard = torch.rand(batch, 4, generator=generator) < 0.7
    return features, Codes.from_dense(features * heard), torch.tensor([-1, 3, 3, -1])


def test_hierarchy_is_inferred_from_samples():
    features, _, parents = sampled()
    metric = FeatureHierarchy(4)
    for rows in features.split(1500):
        metric.update(rows)
    assert metric.compute().tolist() == parents.tolist()


def test_few_samples_prove_no_hierarchy():
    metric = FeatureHierarchy(2)
    metric.update(torch.tensor([[1.0, 1], [1, 0], [0, 0], [0, 0]]))
    assert metric.compute().tolist() == [-1, -1]


def test_hierarchy_of_a_population_is_exact_and_takes_the_nearest_ancestor():
    features = torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]])
    metric = FeatureHierarchy(4)
    metric.update(features, torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert metric.compute().tolist() == [-1, 0, 1, -1]  # the feature that always fires is nobody's parent


def test_counts_alone_give_the_same_scores_in_a_strict_hierarchy():
    features, codes, parents = sampled()
    latent = torch.tensor([0, 1, -1, 3])
    detection = FeatureDetection(4, 4)
    detection.update(codes, features)
    ours = absorption_from_co_firing(detection.compute(), latent, parents)
    known, child = (parents >= 0) & (latent[parents] >= 0), features > 0
    parent, silent = child[:, parents] & known, codes.to_dense()[:, latent[parents]] == 0
    missed, without = ((kind & silent).sum(0) / kind.sum(0) for kind in (parent & child, parent & ~child))
    torch.testing.assert_close(tuple(ours), (missed, without, missed - without), equal_nan=True, check_dtype=False)
    assert ours.missed[1].item() == pytest.approx(0.3, abs=0.05)
    assert ours.missed[2].item() == pytest.approx(0.3, abs=0.1)


def test_a_parent_without_latent_has_no_score():
    features, weight = population()
    counts = co_firing(encode(features, CLEAN), features, weight)
    scores = absorption_from_co_firing(counts, torch.tensor([-1, 1]), PARENTS)
    assert scores.missed.isnan().all()
