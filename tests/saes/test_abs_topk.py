"""AbsTopK: latents of either sign, from training to metrics; its gradients are tested with those of the other SAEs."""

import pytest
import torch

from hedgelab.batch import Batch
from hedgelab.errors import UserError
from hedgelab.interop.saelens import export_saelens
from hedgelab.kernels import ops
from hedgelab.metrics.evaluation import SAEMetrics
from hedgelab.saes import AbsTopKSAE, Initialization, MatryoshkaSAE, TopKSAE, load_sae
from tests.saes.comparison import same_weights

X = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))


def bidirectional(generator, count=128):
    """Six orthogonal directions, each on with probability .25, as often the one way round as the other."""
    on = (torch.rand(count, 6, generator=generator) < 0.25).float()
    return torch.nn.functional.pad(on * torch.randn(count, 6, generator=generator).sign(), (0, 6))


def trained(sae, steps=200):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-2)
    for step in range(steps):
        sae.steps_done = step
        terms = sae.loss(bidirectional(generator))
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        sae.after_step(terms)
    return sae


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_the_k_largest_in_size_keep_their_sign(path):
    sae = AbsTopKSAE(12, 20, k=4)
    pre = X @ sae.W_enc
    with ops.backend(path), torch.no_grad():
        a = sae.encode(X).to_dense()
    kept = pre.abs() >= pre.abs().sort(dim=1, descending=True).values[:, 3:4]
    torch.testing.assert_close(a, torch.where(kept, pre, 0.0))
    assert (a < 0).any()
    assert sae.encode(X).active_per_example().tolist() == [4] * 50


def test_one_latent_serves_both_ends_of_a_direction():
    """Six latents explain six directions of either sign; those of TopK can be on for one end alone."""
    x = bidirectional(torch.Generator().manual_seed(2))

    def unexplained(sae):
        with torch.no_grad():
            return float((sae(x) - x).square().sum() / x.square().sum())

    init = Initialization(seed=0)
    one_way = unexplained(trained(TopKSAE(12, 6, k=3, init=init)))
    assert unexplained(trained(AbsTopKSAE(12, 6, k=3, init=init))) < 0.1 < 0.2 < one_way


def test_a_latent_that_is_only_ever_negative_lives():
    sae = AbsTopKSAE(12, 20, k=4, dead_after_steps=1)
    with torch.no_grad():
        sae.b_enc[7] = -10.0  # large in size, always below 0
        sae.b_enc[8] = 0.0
        sae.W_enc[:, 8] = 0.0  # never selected
    sae.after_step(sae.loss(X))
    assert not sae.dead_latents[7]
    assert sae.dead_latents[8]
    assert "auxiliary" in sae.loss(X).terms


def test_matryoshka_saved_loaded_and_measured(tmp_path):
    sae = MatryoshkaSAE(12, AbsTopKSAE(12, 20, k=4), [5, 20], credit=0.5, adaptive=True)
    assert sum(name.startswith("mse/") for name in sae.loss(X).terms) == 2
    sae.save(tmp_path)
    assert same_weights(load_sae(tmp_path), sae)
    codes = sae.encode(X)
    metrics = SAEMetrics(12, 20, torch.eye(12))
    with torch.no_grad():
        metrics.update(Batch(X, X.relu()), sae.decode(codes), codes)
        values = metrics.compute(sae.W_enc, sae.W_dec)
    assert values["l0"] == pytest.approx(4.0)
    assert values["dead_latents"] == float((codes.to_dense() == 0).all(0).sum())


def test_no_other_format_knows_it(tmp_path):
    with pytest.raises(UserError, match=r"^export: SAELens knows nothing that computes what AbsTopKSAE does; --format"):
        export_saelens(AbsTopKSAE(12, 20, k=4), tmp_path)
