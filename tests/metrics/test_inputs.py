"""Every metric takes latents in either layout, decoders of any norms, tensors of any device; no score is made up."""

import importlib
import pkgutil

import numpy as np
import pytest
import torch

from hedgelab import metrics
from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import FeatureDetection, direct, functional
from hedgelab.metrics.functional import CoFiring, orthonormal_basis
from hedgelab.metrics.functional.true_hedging import regression_update


def latents(rows=400, d_sae=6, n=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    dense = (torch.rand(rows, d_sae, generator=rng) - 0.7).relu()
    return dense, (torch.rand(rows, n, generator=rng) < 0.3).float()


def sparse(dense):
    return Codes.from_csr(*Codes.from_dense(dense).csr(), dense.shape[1])


LABELS = torch.arange(400)[:, None] % 3 == torch.arange(3)
LATENT, PARENTS = torch.tensor([0, 1, 2, -1]), torch.tensor([-1, 0, -1, 2])
TAKES_LATENTS = {
    "l0": lambda c, z: functional.l0(c),
    "firing_rates": lambda c, z: functional.firing_rates(c),
    "dead_latents": lambda c, z: functional.dead_latents(c),
    "co_firing": lambda c, z: functional.co_firing(c, z),
    "absorption": lambda c, z: functional.absorption_from_co_firing(functional.co_firing(c, z), LATENT, PARENTS),
    "regression": lambda c, z: regression_update(c, z),
    "firing_magnitudes": lambda c, z: functional.firing_magnitudes(c),
    "rank_latents": lambda c, z: functional.rank_latents(c, LABELS, 2),
    "probing": lambda c, z: functional.k_sparse_probing(c, LABELS, c, LABELS, (1, 2)),
    "first_letter": lambda c, z: functional.first_letter_scores(
        c, LABELS, c, LABELS, z, functional.linear_probes(z, LABELS), torch.eye(6, 4) + 0.1
    ),
}


@pytest.mark.parametrize("name", TAKES_LATENTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_codes_and_dense_tensors_give_the_same(name, weighted):
    dense, features = latents()
    score = TAKES_LATENTS[name]
    if weighted:
        weights = {"l0": functional.l0, "firing_rates": functional.firing_rates, "dead_latents": functional.dead_latents}
        if name not in weights:
            pytest.skip("takes no weight here")
        weight = torch.rand(400, generator=torch.Generator().manual_seed(1))
        score = lambda c, z: weights[name](c, weight)  # noqa: E731
    expected = score(Codes.from_dense(dense), features)
    for other in (dense, sparse(dense)):
        torch.testing.assert_close(score(other, features), expected, equal_nan=True)


def test_leading_dimensions_are_examples_and_the_rest_is_refused():
    dense, _ = latents()
    assert functional.l0(dense.view(20, 20, 6)) == functional.l0(dense)
    with pytest.raises(UserError, match=r"expected Codes or a tensor \[examples, d_sae\], got a tensor of shape \[6\]"):
        functional.l0(dense[0])
    with pytest.raises(UserError, match="got list"):
        functional.l0([[1.0]])


def test_decoder_norms_do_not_matter():
    rng = torch.Generator().manual_seed(0)
    W_dec, directions = torch.randn(6, 9, generator=rng), torch.randn(4, 9, generator=rng)
    scaled = W_dec * torch.tensor([0.1, 1, 2, 4, 8, 16])[:, None]
    for score in (
        lambda W: functional.mcc(functional.decoder_cosines(W, directions)),
        lambda W: functional.decoder_coordinates(W, directions),
        lambda W: functional.encoder_coordinates(W.t(), directions),
        lambda W: direct.hedging(W, directions).norm,
        lambda W: functional.decoder_geometry(W).mean_absolute,
        lambda W: functional.hedging_degree(W[:4], W).degree,
        lambda W: direct.hedging_degree(W[:4], W).projections,
    ):
        torch.testing.assert_close(score(scaled), score(W_dec), rtol=1e-5, atol=1e-6)


def test_every_functional_module_is_exported_and_none_is_named_as_a_function():
    modules = [name for _, name, _ in pkgutil.iter_modules(functional.__path__)]
    exported = vars(functional)
    for name in modules:
        importlib.import_module(f"hedgelab.metrics.functional.{name}")
        assert any(getattr(value, "__module__", "").endswith(f"functional.{name}") for value in exported.values()), name
    assert callable(functional.residual_hedging)
    assert callable(functional.hedging)
    for package in (functional, metrics):
        for _, name, _ in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{name}")
            assert not callable(vars(module).get(name)), f"{package.__name__}.{name} is a module and a function"


# -- no score is made up -------------------------------------------------------------------------------


def test_a_class_without_members_scores_nan_with_a_warning():
    dense, _ = latents()
    labels = torch.stack([LABELS[:, 0], torch.zeros(400, dtype=torch.bool), torch.ones(400, dtype=torch.bool)], 1)
    with pytest.warns(UserWarning, match=r"k-sparse probing: classes \[1, 2\] lack members or others"):
        scores = functional.k_sparse_probing(dense, labels, dense, labels, (1,))
    assert scores.f1[1:].isnan().all()
    assert scores.auc[1:].isnan().all()
    assert not scores.f1[0].isnan()
    with pytest.warns(UserWarning, match=r"probes: classes \[1, 2\]"):
        probe = functional.linear_probes(dense, labels)
    assert probe.weight[1:].isnan().all()
    torch.testing.assert_close(probe.weight[0], functional.linear_probes(dense, labels[:, :1]).weight[0])
    with pytest.warns(UserWarning, match="first letters"):
        letters = functional.first_letter_scores(dense, labels, dense, labels, dense, probe, torch.eye(6))
    assert letters.probe_f1[1:].isnan().all()


def test_one_kind_of_example_is_refused_and_has_no_f1():
    with pytest.raises(UserError, match="need examples of both kinds, got 0 positive of 5"):
        functional.logistic_regression(torch.rand(5, 2), torch.zeros(5, dtype=torch.bool))
    nobody = torch.zeros(3, dtype=torch.bool)
    assert np.isnan(functional.f1_score(~nobody, nobody))
    assert np.isnan(functional.f1_score(nobody, nobody))
    assert functional.f1_score(nobody, ~nobody) == 0


def test_detectors_that_never_fire_have_no_precision_and_absent_features_no_recall():
    counts = CoFiring(*(torch.tensor(one, dtype=torch.float64) for one in (9.0, [0.0, 3], [4.0, 0], [[0.0, 0], [2, 0]])))
    scores = functional.detection_scores(counts, torch.tensor([0, 1]))
    assert scores.precision[0].isnan()
    assert scores.f1.tolist()[0] == 0
    assert scores.recall[1].isnan()
    assert scores.f1[1].isnan()
    assert functional.explained_variance(torch.ones(4, 2), torch.zeros(4, 2)).isnan()


def test_parents_are_scored_whether_tracked_or_not():
    """The parent's only detector is its child's latent: no latent tracks it, so absorption sees nothing of it."""
    features = torch.tensor([[1.0, 1]] * 2 + [[1, 0]] * 6 + [[0, 0]] * 2)
    metric = FeatureDetection(1, 2)
    metric.update(features[:, 1:], features)
    counts, parents = metric.compute(), torch.tensor([-1, 0])
    assert functional.absorption_from_co_firing(counts, torch.tensor([-1, 0]), parents).excess.isnan().all()
    best = functional.parents_best_f1(counts, parents)
    assert float(best[0]) == pytest.approx(2 * 2 / (2 + 8))
    assert best[1].isnan()


# -- independent rows ----------------------------------------------------------------------------------


def test_rows_after_a_dependent_one_count():
    rows = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    basis = orthonormal_basis(rows)
    torch.testing.assert_close(basis @ basis.t(), torch.diag(torch.tensor([1.0, 1, 0], dtype=torch.float64)))
    assert orthonormal_basis(torch.zeros(2, 3)).shape == (3, 0)
    assert orthonormal_basis(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))).shape == (3, 3)


def test_a_new_latent_beside_a_copy_is_hedged_upon():
    old = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0, 0, 0.0]]), dim=1)
    moved = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0.15, 0, 0]]), dim=1)
    new = torch.eye(5)[[1, 1, 2]]
    scores = functional.hedging_degree(old, torch.cat([moved, new]))
    assert float(scores.rank) == 2
    assert float(scores.projection) == pytest.approx(float(moved[0, 2]), abs=1e-6)


# -- devices -------------------------------------------------------------------------------------------


ON_A_DEVICE = {
    "explained_variance": lambda x, c, z, W: functional.explained_variance(x, x / 2),
    "mse": lambda x, c, z, W: functional.mean_squared_error(x, x / 2),
    "l0": lambda x, c, z, W: functional.l0(c, z[:, 0]),
    "firing_rates": lambda x, c, z, W: functional.firing_rates(c),
    "cosines": lambda x, c, z, W: functional.mean_max_cosine(functional.decoder_cosines(W, x[:4])),
    "coordinates": lambda x, c, z, W: functional.decoder_coordinates(W, x[:4]),
    "absorption": lambda x, c, z, W: functional.absorption_from_co_firing(
        functional.CoFiring(c[0, 0], c[0], z[0], c.T @ z), LATENT.to(z.device), PARENTS.to(z.device)
    ),
    "rank_latents": lambda x, c, z, W: functional.rank_latents(c, z > 0, 2),
}


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_scores_stay_on_the_device_of_what_they_are_of(name):
    """On tensors without memory, mixing devices or reading values from the CPU raises."""
    x, c, z, W = (torch.empty(shape, device="meta") for shape in ((40, 9), (40, 6), (40, 4), (6, 9)))
    score = ON_A_DEVICE[name](x, c, z, W)
    found = [score] if isinstance(score, torch.Tensor) else list(score)
    assert all(one.device.type == "meta" for one in found)


def test_states_stay_in_float64_on_the_cpu_where_a_device_has_no_such_numbers(monkeypatch):
    metric = FeatureDetection(6, 4)
    dense, features = latents()
    metric.update(dense, features)
    for module in ("classes", "functional.accumulate"):
        monkeypatch.setattr(f"hedgelab.metrics.{module}.NO_FLOAT64", frozenset({"meta"}))
    metric.to("meta")
    assert metric.both.device.type == "cpu"
    assert metric.compute().both.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TAKES_LATENTS)
def test_tensors_on_a_gpu_give_the_same(name):
    dense, features = latents()
    expected = TAKES_LATENTS[name](dense, features)
    if name != "absorption":
        found = TAKES_LATENTS[name](dense.cuda(), features.cuda())
        on_cpu = torch.utils._pytree.tree_map(lambda one: one.cpu(), found)
        torch.testing.assert_close(on_cpu, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


# -- an SAE of one's own -------------------------------------------------------------------------------


class OwnSAE:
    """Another library's: ``encode`` gives a dense tensor."""

    def __init__(self, W_dec):
        self.W_dec = torch.nn.Parameter(W_dec)

    def encode(self, x):
        return (x @ self.W_dec.T / self.W_dec.norm(dim=1) ** 2).relu()

    def decode(self, codes):
        return codes @ self.W_dec


def test_an_own_sae_is_measured_in_one_call():
    rng = torch.Generator().manual_seed(0)
    directions = torch.eye(8)[:3]
    features = (torch.rand(4000, 3, generator=rng) < 0.3).float()
    features[:, 2] *= features[:, 0]
    sae = OwnSAE(5 * torch.tensor([[1.0, 0, 0.3, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]))
    found = hedging_of(sae, directions)
    assert found.tolist() == pytest.approx([0.3 / 1.09**0.5, 0])
    residual = direct.residual_hedging((features @ directions).view(40, 100, 8), sae)
    assert float(residual.hedging) > 3 * float(residual.std) > 0
    moved = OwnSAE(torch.eye(8)[:3].roll(0))
    degree = direct.hedging_degree(sae, moved, features @ directions)
    assert float(degree.live_new_latents) == 1
    assert float(degree.degree) == pytest.approx(float(direct.hedging_degree(sae.W_dec, moved.W_dec).degree))


def hedging_of(sae, directions):
    torch.testing.assert_close(direct.hedging(sae, directions).norm, direct.hedging(sae.W_dec, directions).norm)
    return direct.hedging(sae, directions).norm


def test_mistakes_name_both_sizes():
    sae = OwnSAE(torch.eye(3, 8))
    with pytest.raises(UserError, match=r"x: expected activations of width 8 \(W_dec's\), got \[1, 5\]"):
        direct.residual_hedging(torch.zeros(50, 5), sae)
    with pytest.raises(UserError, match="has no encode"):
        direct.residual_hedging(torch.zeros(50, 8), object())
    with pytest.raises(UserError, match=r"features: expected directions \[n, 8\]"):
        direct.hedging(sae, torch.eye(3))
    with pytest.raises(UserError, match="x: activations need SAEs"):
        direct.hedging_degree(sae.W_dec, torch.eye(4, 8), torch.zeros(5, 8))
