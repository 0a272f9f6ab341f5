"""True activations as codes give every metric what dense ones give, without a dense tensor of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgelab.batch import Batch
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import FeatureDetection, FeatureHierarchy, FeatureRegression, SAEMetrics, direct
from hedgelab.metrics.functional import absorption_from_co_firing, co_firing
from hedgelab.metrics.functional import accumulate as accumulate_module


def sparse(dense):
    return Codes.from_csr(*Codes.from_dense(dense).csr(), dense.shape[1])


def draw(seed, rows, d_sae, n, density):
    """Signed latents, magnitudes of features (feature 1 only with 0), and weights of the examples."""
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, d_sae, generator=rng) * (torch.rand(rows, d_sae, generator=rng) < density)
    features = torch.rand(rows, n, generator=rng) * (torch.rand(rows, n, generator=rng) < density)
    features[:, 1] *= features[:, 0] > 0
    weight = torch.rand(rows, generator=rng, dtype=torch.float64)
    return latents, features, weight / weight.sum()


sizes = {
    "seed": st.integers(0, 10_000),
    "rows": st.integers(0, 40),
    "d_sae": st.integers(1, 7),
    "n": st.integers(2, 9),
    "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "weighted": st.booleans(),
    "listed": st.booleans(),
    "sparse_latents": st.booleans(),
}


@settings(max_examples=80, deadline=None)
@given(**sizes)
def test_sparse_truth_gives_what_dense_truth_gives(seed, rows, d_sae, n, density, weighted, listed, sparse_latents):
    latents, features, weight = draw(seed, rows, d_sae, n, density)
    weight = weight if weighted else None
    codes = sparse(latents) if sparse_latents else Codes.from_dense(latents)
    metrics = [[make() for make in (lambda: FeatureDetection(d_sae, n), lambda: FeatureRegression(d_sae, n))] for _ in "ab"]
    hierarchies = FeatureHierarchy(n), FeatureHierarchy(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulate_module, "MOST_PAIRS_LISTED", 10**6 if listed else 0)
        for truth, (detection, regression), hierarchy in zip((features, sparse(features)), metrics, hierarchies, strict=True):
            for _ in range(2):  # sums of two batches
                detection.update(codes, truth, weight)
                regression.update(codes, truth, weight)
                hierarchy.update(truth, weight)
        counted = co_firing(codes, sparse(features), weight)
    (dense, regressed), (ours, our_regressed) = metrics
    fired, present = (latents != 0).double(), (features > 0).double()
    by = torch.ones(rows, 1).double() if weight is None else weight[:, None]
    torch.testing.assert_close(
        ours.both, 2 * (fired * by).T @ present, rtol=0 if weight is None else 1e-12, atol=0 if weight is None else 1e-15
    )
    torch.testing.assert_close(counted.both.double(), (fired * by).T @ present, rtol=1e-12, atol=1e-15)
    for name, value in ours.totals().items():
        torch.testing.assert_close(value, dense.totals()[name], rtol=1e-12, atol=1e-15, msg=name)
    for name, value in our_regressed.totals().items():
        exact = name != "products"  # which are float32
        expected = regressed.totals()[name]
        torch.testing.assert_close(value, expected, rtol=1e-12 if exact else 1e-5, atol=1e-12 if exact else 1e-6, msg=name)
    torch.testing.assert_close(hierarchies[1].both, hierarchies[0].both, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("d_in", [6, 12], ids=["overlapping", "orthonormal"])
def test_a_pass_with_sparse_truth_gives_the_same_numbers(d_in):
    latents, features, _ = draw(0, 600, 5, 9, 0.3)
    directions = torch.linalg.qr(torch.randn(12, d_in, generator=torch.Generator().manual_seed(1)))[0][:9]
    directions = torch.nn.functional.normalize(directions, dim=1)
    x, W_dec = features @ directions, directions[:5] + 0.3 * directions[4:]
    results = []
    for truth in (features, sparse(features)):
        metrics = SAEMetrics(d_in, 5, directions)
        for part in (slice(0, 400), slice(400, 600)):
            known = features[part] if isinstance(truth, torch.Tensor) else sparse(features[part])
            metrics.update(Batch(x[part], known), 0.9 * x[part], sparse(latents[part]))
        results.append(metrics.compute(W_dec.t(), W_dec))
    assert results[0]["absorption_parents_f1"] > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7, equal_nan=True)


def test_functions_take_sparse_truth():
    latents, features, _ = draw(0, 300, 5, 9, 0.3)
    arguments = torch.tensor([0, 1, 2, -1, -1, -1, -1, -1, -1]), torch.tensor([-1, 0, *[-1] * 7])
    truths = (features, sparse(features))
    ours, dense = (absorption_from_co_firing(co_firing(latents, truth), *arguments) for truth in truths)
    torch.testing.assert_close(tuple(ours), tuple(dense), equal_nan=True)
    directions = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(2)), dim=1)
    ours, dense = (direct.hedging(directions[:5], directions, latents, one) for one in (sparse(features), features))
    torch.testing.assert_close(ours.norm, dense.norm, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("d_sae", "k", "listed"), [(64, 32, False), (4096, 8, True)])
@pytest.mark.parametrize("weighted", [False, True])
def test_pairs_are_listed_only_where_few_fire_together(d_sae, k, listed, weighted):
    rng = torch.Generator().manual_seed(0)
    pre = torch.rand(32, d_sae, generator=rng, dtype=torch.float64)
    kept = torch.where(pre >= pre.topk(k, dim=1).values[:, -1:], pre, 0.0)
    weight = torch.rand(32, generator=rng, dtype=torch.float64) if weighted else None
    codes = sparse(kept)
    found = accumulate_module.pair_product(codes, codes, weight)
    assert found.is_sparse == listed
    torch.testing.assert_close(found.to_dense(), kept.t() @ (kept if weight is None else kept * weight[:, None]))
