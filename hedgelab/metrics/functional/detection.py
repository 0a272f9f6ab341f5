"""Latents as detectors of features: how often each pair fires together, and what follows from it."""

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional.accumulate import as_codes, float64, sparse_product


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
        precision: P(feature fires | latent fires); NaN for a latent that never fires.
        recall: P(latent fires | feature fires); NaN for a feature that never fires.
        f1: Their harmonic mean, ``2 · both / (latent's firings + feature's)``: 0 for a latent that never fires, NaN for a
            feature that never does.
    """

    precision: Tensor
    recall: Tensor
    f1: Tensor


def co_firing(codes: Tensor | Codes, features: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weight of the examples on which each latent fires together with each feature, ``[d_sae, n]``.

    Args:
        codes: Latents of a batch, codes or dense ``[batch, d_sae]``.
        features: Firing magnitudes of the features, ``[batch, n]``.
        weight: Weight of each example, ``[batch]``; None weighs all alike.

    Returns:
        float64 with ``weight``, else exact whole numbers in float32.
    """
    codes, present = as_codes(codes).detach(), features > 0
    firing = Codes(codes.d_sae, (codes.values > 0).float(), codes.latents, codes.crow, codes.layout)
    if weight is None:
        return sparse_product(firing, present.float())
    return sparse_product(firing, float64(present), float64(weight))


def detection_scores(counts: CoFiring, feature: Tensor) -> DetectionScores:
    """Precision, recall and F1 of each latent for its feature.

    Args:
        counts: Co-firing counts, as :class:`hedgelab.metrics.FeatureDetection` computes them.
        feature: The feature that each latent should detect, ``[d_sae]`` int64; -1 for none.

    Logged as:
        detector_precision: precision (higher): of firings of a latent, the share where its feature is present
        detector_recall: recall (higher): of examples with a feature, the share where its latent fires
        detector_f1: F1 (higher): harmonic mean of precision and recall, mean over latents
    """
    hits = counts.both.gather(1, feature.clamp(min=0)[:, None]).squeeze(1)
    fired, present = counts.latents, counts.features[feature.clamp(min=0)]
    unmatched = feature < 0

    def ratio(amount: Tensor, of: Tensor) -> Tensor:
        return (amount / of).masked_fill(unmatched, torch.nan)

    f1 = ratio(2 * hits, fired + present).masked_fill(present == 0, torch.nan)
    return DetectionScores(ratio(hits, fired), ratio(hits, present), f1)
