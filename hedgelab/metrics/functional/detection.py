"""Latents as detectors of features: how often each pair fires together, and what follows from it."""

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes, row_pointers

DENSE_PER_PAIR = 256
"""Multiply-adds of a dense product that cost about as much as one indexed addition (measured on CPU)."""


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


def add_co_firing(both: Tensor, left: Codes, right: Codes, weight: Tensor | None = None) -> None:
    """Add to ``both [left.d_sae, right.d_sae]`` (float64) the weight of examples on which each pair fires, in place.

    Costs one addition for each pair that fires together, or a dense product where those are many.
    """
    left_rows, left_columns = _fired(left)
    right_rows, right_columns = _fired(right)
    pointers = row_pointers(right_rows, right.batch_size)
    partners = pointers.diff()[left_rows]
    pairs = int(partners.sum())
    if pairs * DENSE_PER_PAIR > left.batch_size * both.numel():
        dtype = torch.float32 if weight is None else torch.float64
        firing, other = (_indicator(codes).to(dtype) for codes in (left, right))
        both += (firing if weight is None else firing * weight.to(dtype)[:, None]).T @ other
        return
    skipped = pointers[left_rows] - (partners.cumsum(0) - partners)
    position = torch.arange(pairs, device=both.device) + skipped.repeat_interleave(partners, output_size=pairs)
    flat = (left_columns * both.shape[1]).repeat_interleave(partners, output_size=pairs) + right_columns[position]
    if weight is None:
        amounts = both.new_ones(()).expand(pairs)
    else:
        amounts = weight.to(both.dtype)[left_rows].repeat_interleave(partners, output_size=pairs)
    both.view(-1).index_add_(0, flat, amounts)


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


def _indicator(codes: Codes) -> Tensor:
    """Whether each latent fires on each example, ``[batch, d_sae]`` bool."""
    return codes.to_dense() > 0
