"""Latents as detectors of features: how often each pair fires together, and what follows from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import as_codes, float64, sparse_product, weighted_sum
from hedgelab.metrics.functional.sparsity import firing_update


class CoFiring(NamedTuple):
    """Weight of the examples on which latents and features fire, float64; those of batches and ranks add up."""

    weight: Tensor  # of all examples, scalar
    latents: Tensor  # on which each latent fires, [d_sae]
    features: Tensor  # on which each feature fires, [n]
    both: Tensor  # on which latent i and feature j both fire, [d_sae, n]


class DetectionScores(NamedTuple):
    """Each latent as a detector of its feature, ``[d_sae]`` each; NaN for latents without one."""

    precision: Tensor  # P(feature fires | latent fires); NaN for a latent that never fires
    recall: Tensor  # P(latent fires | feature fires); NaN for a feature that never fires
    f1: Tensor  # 0 for a latent that never fires, NaN for a feature that never does


def co_firing(codes: Tensor | Codes, features: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weight of the examples on which each latent fires together with each feature, ``[d_sae, n]``.

    Latents are codes or dense ``[batch, d_sae]``, ``features [batch, n]`` firing magnitudes. The result is float64 with
    ``weight [batch]``, else exact whole numbers in float32.
    """
    codes, present = as_codes(codes).detach(), features > 0
    firing = Codes(codes.d_sae, (codes.values > 0).float(), codes.latents, codes.crow, codes.layout)
    if weight is None:
        return sparse_product(firing, present.float())
    return sparse_product(firing, float64(present), float64(weight))


def co_firing_update(codes: Tensor | Codes, features: Tensor, weight: Tensor | None = None) -> CoFiring:
    """Sums of one batch; arguments as in :func:`co_firing`."""
    latents, count = firing_update(codes, weight)
    return CoFiring(count, latents, weighted_sum(features > 0, weight), co_firing(codes, features, weight))


def detection_scores(counts: CoFiring, feature: Tensor) -> DetectionScores:
    """Precision, recall and ``F1 = 2 · both / (latent's firings + feature's)`` of each latent for its feature, from 0 to 1.

    ``counts`` come from :class:`hedgelab.metrics.FeatureDetection`, ``feature [d_sae]`` (int64, -1 for none) says what each
    latent should detect. Magnitudes do not enter: a latent that fires weakly beside its feature's absence loses precision.

    >>> fires = torch.tensor([[1.0], [1.0], [0.0]])
    >>> detection_scores(co_firing_update(fires, torch.tensor([[1.0], [0.0], [0.0]])), torch.tensor([0])).precision.item()
    0.5

    Logged as:
        detector_precision: precision (higher): of firings of a latent, the share where its feature is present
        detector_recall: recall (higher): of examples with a feature, the share where its latent fires
        detector_f1: F1 (higher): harmonic mean of precision and recall, mean over latents
    """
    hits = counts.both.gather(1, feature.clamp(min=0)[:, None]).squeeze(1)
    fired, present = counts.latents, counts.features[feature.clamp(min=0)]
    f1 = (2 * hits / (fired + present)).masked_fill(present == 0, torch.nan)
    return DetectionScores(*(score.masked_fill(feature < 0, torch.nan) for score in (hits / fired, hits / present, f1)))
