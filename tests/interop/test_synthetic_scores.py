"""The scores of SynthSAEBench are those of SAELens itself, on the same SAE and samples."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from hedgelab.batch import Batch
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import SAEMetrics

D_IN, D_SAE, N, ROWS, BATCH = 16, 24, 40, 3000, 700


def an_sae():
    """Noisy latents of overlapping features: dead ones, signed ones, two of one feature; a feature that never fires."""
    rng = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(N, D_IN, generator=rng), dim=1)
    rates = torch.linspace(0.3, 0.02, N)
    features = torch.rand(ROWS, N, generator=rng) * (torch.rand(ROWS, N, generator=rng) < rates)
    features[:, 5] = 0
    features[17] = 0
    x = features @ directions  # row 17 is zero: its norm ratio is left out
    owners = torch.arange(D_SAE)
    owners[9] = 8
    W_dec = directions[owners] + 0.15 * torch.randn(D_SAE, D_IN, generator=rng)
    W_dec[4] *= -3
    pre = x @ normalize(W_dec, dim=1).T
    latents = torch.where(pre.abs() > 0.25, pre, 0.0)
    latents[:, :4] = latents[:, :4].relu()
    latents[:, 11:14] = 0
    return {
        "x": x,
        "x_hat": 0.4 * latents @ W_dec,
        "latents": latents,
        "features": features,
        "W_dec": W_dec,
        "directions": directions,
    }


def test_scores_are_those_of_saelens(run_peer, tmp_path):
    sae = an_sae()
    save_file({name: value.contiguous() for name, value in sae.items()}, tmp_path / "x.safetensors")
    files = {"x": str(tmp_path / "x.safetensors"), "answer": str(tmp_path / "answer.safetensors")}
    answers, missing = run_peer([{"name": "scores", "do": "score_synthetic", "batch_size": BATCH, **files}], tmp_path)
    if missing:
        pytest.skip(str(missing))
    metrics = SAEMetrics(D_IN, D_SAE, sae["directions"], parents=torch.full((N,), -1))
    parts = zip(*(sae[name].split(BATCH) for name in ("x", "x_hat", "latents", "features")), strict=True)
    for index, (x, x_hat, latents, features) in enumerate(parts):
        truth = Codes.from_csr(*Codes.from_dense(features).csr(), N) if index % 2 else features
        metrics.update(Batch(x, truth), x_hat, latents)
    ours = metrics.compute(sae["W_dec"].T, sae["W_dec"])
    for name, theirs in answers["scores"].items():
        assert float(ours[name]) == pytest.approx(float(theirs), abs=1e-6, rel=1e-6), name
    assert answers["scores"]["dead_latents"] == 3
    assert 0.2 < answers["scores"]["nearest_f1"] < 0.95
    assert abs(ours["nearest_f1"] - ours["detector_f1"]) > 1e-3  # two latents share a feature
    assert abs(ours["norm_ratio"] - ours["shrinkage"]) > 0.01
