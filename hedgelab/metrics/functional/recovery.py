"""Recovery of known features: cosines, best matches, MCC, uniqueness.

Cosines do not depend on positive scales: weights may be folded or not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.metrics.functional.accumulate import fold_decoder


class BestMatches(NamedTuple):
    """The strongest counterpart of each latent and of each feature, by absolute cosine.

    Attributes:
        feature: Best feature of each latent, ``[d_sae]`` int64.
        feature_cosine: Signed cosine with it, ``[d_sae]``.
        latent: Best latent of each feature, ``[n]`` int64.
        latent_cosine: Signed cosine with it, ``[n]``.
    """

    feature: Tensor
    feature_cosine: Tensor
    latent: Tensor
    latent_cosine: Tensor


class Matching(NamedTuple):
    """A one-to-one assignment of latents to features.

    Attributes:
        feature: Feature of each latent, ``[d_sae]`` int64, -1 for none.
        latent: Latent of each feature, ``[n]`` int64, -1 for none.
    """

    feature: Tensor
    latent: Tensor


def decoder_cosines(W_dec: Tensor, feature_directions: Tensor) -> Tensor:
    """Cosine of each decoder row with each feature, ``[d_sae, n]`` float64; 0 for a zero row.

    Args:
        W_dec: Decoder of any norms, ``[d_sae, d_in]``.
        feature_directions: True directions, ``[n, d_in]``.
    """
    # float64: neither TF32 nor autocast touches it
    return fold_decoder(W_dec)[0] @ fold_decoder(feature_directions)[0].T


def encoder_cosines(W_enc: Tensor, feature_directions: Tensor) -> Tensor:
    """Cosine of each encoder column with each feature, ``[d_sae, n]`` float64; 0 for a zero column.

    Args:
        W_enc: Encoder of any norms, ``[d_in, d_sae]``.
        feature_directions: True directions, ``[n, d_in]``.
    """
    return decoder_cosines(W_enc.T, feature_directions)


def best_matches(cosines: Tensor) -> BestMatches:
    """The best feature of each latent and the best latent of each feature, from ``cosines [d_sae, n]``."""
    size = cosines.abs()
    feature, latent = size.argmax(1), size.argmax(0)
    return BestMatches(
        feature,
        cosines.gather(1, feature[:, None]).squeeze(1),
        latent,
        cosines.gather(0, latent[None]).squeeze(0),
    )


def match_features(cosines: Tensor, live: Tensor | None = None, threshold: float = 0.0) -> Matching:
    """Assign latents to features so that the sum of absolute cosines is largest (Hungarian algorithm).

    Args:
        cosines: Decoder cosines, ``[d_sae, n]``.
        live: Latents that may be assigned, ``[d_sae]`` bool; None for all.
        threshold: Pairs of a smaller absolute cosine are dropped after the assignment.

    Returns:
        At most ``min(live latents, n)`` pairs.
    """
    from scipy.optimize import linear_sum_assignment  # late: scipy is slow to import

    d_sae, n = cosines.shape
    candidates = torch.arange(d_sae, device=cosines.device) if live is None else live.nonzero().squeeze(1)
    size = cosines[candidates].abs()
    rows, columns = linear_sum_assignment(size.cpu().numpy(), maximize=True)
    latents, features = (torch.as_tensor(index, device=cosines.device) for index in (rows, columns))
    latents = candidates[latents]
    kept = cosines[latents, features].abs() >= threshold
    latents, features = latents[kept], features[kept]
    feature = torch.full((d_sae,), -1, device=cosines.device)
    latent = torch.full((n,), -1, device=cosines.device)
    feature[latents], latent[features] = features, latents
    return Matching(feature, latent)


def matched_cosines(cosines: Tensor, matching: Matching) -> Tensor:
    """Signed cosine of each matched pair, ``[pairs]``, in the order of the latents."""
    latents = (matching.feature >= 0).nonzero().squeeze(1)
    return cosines[latents, matching.feature[latents]]


def mcc(cosines: Tensor) -> Tensor:
    """Mean absolute cosine over the ``min(d_sae, n)`` pairs of the best one-to-one assignment, dead latents included.

    The mean correlation coefficient of the identifiability literature, taken on directions; ``cosines``: ``[d_sae, n]``.

    Logged as:
        mcc: MCC (higher): mean absolute cosine of features with latents assigned one to one; 1 recovers all features
    """
    return matched_cosines(cosines, match_features(cosines)).abs().mean()


def mean_max_cosine(cosines: Tensor) -> Tensor:
    """Largest absolute cosine of each *feature* with any latent, averaged over features (Sharkey et al. 2022).

    An SAE narrower than the features cannot reach 1. ``mean_max_cosine(cosines.T)`` averages over latents instead.

    Logged as:
        mean_max_cosine: max cosine (higher): each feature's largest absolute cosine with any latent, mean over
            features
        mean_max_cosine_latents: max cosine of latents (higher): each latent's largest absolute cosine with any
            feature, mean over latents
    """
    return cosines.abs().amax(0).mean()


def uniqueness(cosines: Tensor) -> Tensor:
    """Number of distinct best features, over the number of latents; 1 when no two latents share theirs.

    At most ``n / d_sae`` for an SAE wider than the features; ``cosines``: ``[d_sae, n]``.

    Logged as:
        uniqueness: uniqueness (higher): share of latents whose nearest feature no other latent has
    """
    best = cosines.abs().argmax(1)
    distinct = torch.bincount(best, minlength=cosines.shape[1]) > 0
    return distinct.sum().double() / cosines.shape[0]
