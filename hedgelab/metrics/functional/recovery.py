"""Recovery of known features: cosines, best matches, MCC, uniqueness.

``cosines [d_sae, n]`` are those of decoder rows with features. They do not depend on positive scales: weights may be folded or
not. What is made of them trusts that ``features`` are all that there is, and counts dead latents like others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.metrics.functional.accumulate import fold_decoder


class BestMatches(NamedTuple):
    """The strongest counterpart of each latent and of each feature, by absolute cosine."""

    feature: Tensor  # best feature of each latent, [d_sae] int64
    feature_cosine: Tensor  # signed cosine with it, [d_sae]
    latent: Tensor  # best latent of each feature, [n] int64
    latent_cosine: Tensor  # signed cosine with it, [n]


class Matching(NamedTuple):
    """A one-to-one assignment of latents to features."""

    feature: Tensor  # feature of each latent, [d_sae] int64, -1 for none
    latent: Tensor  # latent of each feature, [n] int64, -1 for none


def decoder_cosines(W_dec: Tensor, feature_directions: Tensor) -> Tensor:
    """Cosine of each row of ``W_dec [d_sae, d_in]`` with each of ``feature_directions [n, d_in]``; 0 for a zero row.

    ``[d_sae, n]`` float64, which neither TF32 nor autocast touches; norms do not matter.

    >>> decoder_cosines(torch.tensor([[3.0, 4.0]]), torch.eye(2)).tolist()
    [[0.6, 0.8]]
    """
    return fold_decoder(W_dec)[0] @ fold_decoder(feature_directions)[0].T


def encoder_cosines(W_enc: Tensor, feature_directions: Tensor) -> Tensor:
    """The same of each column of ``W_enc [d_in, d_sae]``."""
    return decoder_cosines(W_enc.T, feature_directions)


def best_matches(cosines: Tensor) -> BestMatches:
    """The best feature of each latent and the best latent of each feature."""
    size = cosines.abs()
    feature, latent = size.argmax(1), size.argmax(0)
    strongest = cosines.gather(1, feature[:, None]).squeeze(1), cosines.gather(0, latent[None]).squeeze(0)
    return BestMatches(feature, strongest[0], latent, strongest[1])


def match_features(cosines: Tensor, live: Tensor | None = None, threshold: float = 0.0) -> Matching:
    """Assign latents to features so that the sum of absolute cosines is largest (Hungarian algorithm).

    At most ``min(live latents, n)`` pairs: ``live [d_sae]`` (bool; None for all) may be assigned, and pairs whose absolute
    cosine is below ``threshold`` are dropped after the assignment.

    >>> match_features(torch.tensor([[0.9, 0.1], [0.95, 0.2]])).feature.tolist()
    [0, 1]
    """
    from scipy.optimize import linear_sum_assignment  # late: scipy is slow to import

    d_sae, n = cosines.shape
    candidates = torch.arange(d_sae, device=cosines.device) if live is None else live.nonzero().squeeze(1)
    rows, columns = linear_sum_assignment(cosines[candidates].abs().cpu().numpy(), maximize=True)
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
    """Mean absolute cosine over the ``min(d_sae, n)`` pairs of the best one-to-one assignment, from 0 to 1.

    The mean correlation coefficient of the identifiability literature, taken on directions. Random directions do not score 0
    but about ``√(2 log n / d_in)``.

    >>> round(mcc(torch.tensor([[0.9, 0.1], [0.95, 0.2]])).item(), 3)
    0.55

    Logged as:
        mcc: MCC (higher): mean absolute cosine of features with latents assigned one to one; 1 recovers all features
    """
    return matched_cosines(cosines, match_features(cosines)).abs().mean()


def mean_max_cosine(cosines: Tensor) -> Tensor:
    """Largest absolute cosine of each *feature* with any latent, averaged over features (Sharkey et al. 2022), from 0 to 1.

    An SAE narrower than the features cannot reach 1, and one latent may serve several features.
    ``mean_max_cosine(cosines.T)`` averages over latents instead.

    >>> mean_max_cosine(torch.tensor([[1.0, 0.5], [0, 0.25]])).item()
    0.75

    Logged as:
        mean_max_cosine: max cosine (higher): each feature's largest absolute cosine with any latent, mean over
            features
        mean_max_cosine_latents: max cosine of latents (higher): each latent's largest absolute cosine with any
            feature, mean over latents
    """
    return cosines.abs().amax(0).mean()


def uniqueness(cosines: Tensor) -> Tensor:
    """Number of distinct best features, over the number of latents; 1 when no two latents share theirs.

    At most ``n / d_sae`` for an SAE wider than the features.

    >>> uniqueness(torch.tensor([[0.9, 0.1], [-0.8, 0.2]])).item()
    0.5

    Logged as:
        uniqueness: uniqueness (higher): share of latents whose nearest feature no other latent has
    """
    best = cosines.abs().argmax(1)
    distinct = torch.bincount(best, minlength=cosines.shape[1]) > 0
    return distinct.sum().double() / cosines.shape[0]
