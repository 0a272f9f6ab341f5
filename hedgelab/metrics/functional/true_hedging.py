"""Hedging on toys: how much of the features that no latent tracks is mixed into the latents that exist.

Definitions, for an SAE with folded weights and known features ``f_1 … f_n``:

- *Tracked*: latents that fire at all are assigned to features one-to-one (Hungarian on absolute decoder cosines); a
  feature is tracked when its latent's absolute decoder cosine is at least ``threshold`` (default .6).
- *Own feature* of a latent: the one it tracks, else the one of largest absolute decoder cosine.
- *Hedging component* of latent i along feature j: the coordinate of its unit decoder row (or unit encoder column) along
  ``f_j``, for every j that is untracked and not its own; 0 elsewhere. Positive: on the same side as its own feature.
- *True hedging* of a latent: the Euclidean norm of those components.

Coordinates: a decoder row is a sum of features, so its coordinates are the least-squares ones, ``W_dec pinv(F)``: with a
non-orthogonal dictionary a pure latent would have spurious plain products with its feature's neighbours. An encoder
column *reads* features, so its coordinates are its responses ``f_j · w``, which are the coordinates in the dual basis: an
encoder that separates overlapping features perfectly scores 0. On orthonormal features both are plain cosines. With more
features than dimensions decoder coordinates are not unique and plain cosines are used.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.metrics.functional.recovery import Matching, decoder_cosines, encoder_cosines, match_features

TRACKING_COSINE = 0.6
"""Absolute decoder cosine from which a latent is said to track its feature."""


class HedgingScores(NamedTuple):
    """Hedging of each latent; all zero for latents that are not live.

    Attributes:
        components: Signed hedging components, ``[d_sae, n]``.
        norm: True hedging of each latent, ``[d_sae]``.
        largest: Signed component of largest size of each latent, ``[d_sae]``.
    """

    components: Tensor
    norm: Tensor
    largest: Tensor


def decoder_coordinates(W_dec: Tensor, feature_directions: Tensor) -> Tensor:
    """Coordinates of the unit decoder rows along the unit features, ``[d_sae, n]`` float64.

    Least squares (``pinv``) when n ≤ d_in, plain cosines otherwise; see the module.

    Args:
        W_dec: Folded decoder, ``[d_sae, d_in]``.
        feature_directions: True directions, ``[n, d_in]``.
    """
    n, d_in = feature_directions.shape
    if n > d_in:
        return decoder_cosines(W_dec, feature_directions)
    inverse = torch.linalg.pinv(normalize(feature_directions.detach().double(), dim=1))
    coordinates: Tensor = normalize(W_dec.detach().double(), dim=1) @ inverse
    return coordinates


def encoder_coordinates(W_enc: Tensor, feature_directions: Tensor) -> Tensor:
    """Response of the unit encoder columns to the unit features, ``[d_sae, n]``: their coordinates in the dual basis.

    Args:
        W_enc: Folded encoder, ``[d_in, d_sae]``.
        feature_directions: True directions, ``[n, d_in]``.
    """
    return encoder_cosines(W_enc, feature_directions)


def tracked_features(cosines: Tensor, live: Tensor | None = None, threshold: float = TRACKING_COSINE) -> Matching:
    """Which live latent tracks which feature, from decoder ``cosines [d_sae, n]``; see the module."""
    return match_features(cosines, live, threshold)


def hedging(coordinates: Tensor, cosines: Tensor, tracked: Matching, live: Tensor | None = None) -> HedgingScores:
    """Hedging of each latent along the features that no latent tracks.

    Args:
        coordinates: Of the decoder or of the encoder, ``[d_sae, n]``.
        cosines: Decoder cosines, ``[d_sae, n]``; they settle each latent's own feature and its sign.
        tracked: From :func:`tracked_features`.
        live: Latents that fire, ``[d_sae]`` bool; None for all.
    """
    own = torch.where(tracked.feature >= 0, tracked.feature, cosines.abs().argmax(1))[:, None]
    side = torch.where(cosines.gather(1, own) < 0, -1.0, 1.0).to(coordinates.dtype)
    counted = (tracked.latent < 0).expand_as(coordinates).scatter(1, own, False)
    if live is not None:
        counted = counted & live[:, None]
    components = torch.where(counted, coordinates * side, 0.0)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True)).squeeze(1)
    return HedgingScores(components, components.norm(dim=1), largest)
