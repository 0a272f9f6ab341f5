"""Latents as detectors of features: how often each pair fires together, and what follows from it."""

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes

SPARSE_BELOW = 1 / 16
"""Share of latents firing below which a sparse product beats a dense one (measured on CPU)."""


class CoFiring(NamedTuple):
    """Weight of the examples on which latents and features fire, float64.

    Attributes:
        weight: Weight of all examples, scalar.
        latents: On which each latent fires, ``[d_sae]``.
        features: On which each feature fires, ``[n]``.
        both: On which latent i and feature j both fire, ``[d_sae, n]``.
    """

    weight: Tensor
    latents: Tensor
    features: Tensor
    both: Tensor


class DetectionScores(NamedTuple):
    """Each latent as a detector of its feature, ``[d_sae]`` each; NaN for latents without one.

    Attributes:
        precision: P(feature fires | latent fires), 0 for a latent that never fires.
        recall: P(latent fires | feature fires), 0 for a feature that never fires.
        f1: Their harmonic mean.
    """

    precision: Tensor
    recall: Tensor
    f1: Tensor


def co_firing(codes: Codes, features: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weight of the examples on which each latent fires together with each feature, ``[d_sae, n]``.

    Args:
        codes: Latents of a batch.
        features: Firing magnitudes of the features, ``[batch, n]``.
        weight: Weight of each example, ``[batch]``; None weighs all alike.

    Returns:
        float64 with ``weight``, else exact whole numbers in float32.
    """
    dtype = torch.float32 if weight is None else torch.float64
    present = (features > 0).to(dtype)
    rows, latents = _fired(codes)
    if latents.shape[0] > SPARSE_BELOW * codes.batch_size * codes.d_sae:
        firing = (codes.to_dense() > 0).to(dtype).T
        return _product(firing if weight is None else firing * weight.to(dtype), present)
    amounts = torch.ones_like(latents, dtype=dtype) if weight is None else weight.to(dtype)[rows]
    shape = (codes.d_sae, codes.batch_size)
    firing = torch.sparse_coo_tensor(torch.stack([latents, rows]), amounts, shape, check_invariants=False)
    return _product(firing, present)


def detection_scores(counts: CoFiring, feature: Tensor) -> DetectionScores:
    """Precision, recall and F1 of each latent for its feature.

    Args:
        counts: Co-firing counts, as :class:`hedgelab.metrics.FeatureDetection` computes them.
        feature: The feature that each latent should detect, ``[d_sae]`` int64; -1 for none.
    """
    hits = counts.both.gather(1, feature.clamp(min=0)[:, None]).squeeze(1)
    fired, present = counts.latents, counts.features[feature.clamp(min=0)]
    unmatched = feature < 0

    def ratio(amount: Tensor, of: Tensor) -> Tensor:
        return torch.where(of > 0, amount / of, 0.0).masked_fill(unmatched, torch.nan)

    return DetectionScores(ratio(hits, fired), ratio(hits, present), ratio(2 * hits, fired + present))


def _fired(codes: Codes) -> tuple[Tensor, Tensor]:
    """Example and latent of each activation above 0, sorted by example."""
    if codes.latents is None:
        rows, columns = (codes.values > 0).nonzero(as_tuple=True)
        return rows, columns
    fired = codes.values > 0
    return codes.rows()[fired], codes.latents[fired]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product in the precision of its factors: under autocast counts would come out rounded to 8 bits."""
    with torch.autocast(right.device.type, enabled=False):
        return left @ right
