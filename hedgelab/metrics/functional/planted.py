"""Hedging along features that were planted in real activations, where whatever else a decoder row holds is not known.

A unit row r for a feature p holds as *share* of another known feature f its least-squares coordinate beside p, on p's side::

    share = sign(r · p) (r · f - (r · p)(p · f)) / (1 - (p · f)²)

Rows of real SAEs hold a little of any direction, so shares are read beside those of null directions, drawn alike, not planted.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.metrics.functional.accumulate import fold_decoder
from hedgelab.metrics.functional.recovery import Matching

_NORMAL = 1.96  # standard errors to either end of a 95 % interval


class PlantedHedging(NamedTuple):
    """Means with their 95 % intervals; NaN where nothing is tracked, or no feature has a parent."""

    hedging: Tensor
    hedging_low: Tensor
    hedging_high: Tensor
    child_share: Tensor
    child_share_low: Tensor
    child_share_high: Tensor


def share_beside(along: Tensor, beside: Tensor, between: Tensor) -> Tensor:
    """The share from cosines: of the row with the feature, of the row with its own feature, and between the two features.

    >>> share_beside(torch.tensor(0.6), torch.tensor(0.8), torch.tensor(0.0)).item()  # orthogonal: a plain cosine
    0.6000000238418579
    """
    side = torch.where(beside < 0, -1.0, 1.0).to(along.dtype)
    return side * (along - beside * between) / (1 - between.square()).clamp_min(1e-12)


def planted_hedging(
    W_dec: Tensor, directions: Tensor, null: Tensor, parents: Tensor, tracked: Matching, live: Tensor
) -> PlantedHedging:
    """True hedging of planted features above chance, and what parents' rows hold of their children.

    Hedging is ``sign(q) √|q|`` of the mean over tracked latents of ``q = Σ_f share² - n · mean of null shares²``, over the n
    features f that no latent tracks: 0 on average where rows hold nothing but chance. A child's share is signed, in the row of
    the live latent nearest to its parent. ``directions [n, d_in]`` are planted, ``null [m, d_in]`` were not; ``parents [n]``
    are numbers of features, -1 for none; ``live [d_sae]``.

    >>> eye = torch.eye(4)
    >>> row, all_live = torch.tensor([[0.8, 0.6, 0.0, 0.0]]), torch.tensor([True])
    >>> tracks_first = Matching(torch.tensor([0]), torch.tensor([0, -1]))
    >>> found = planted_hedging(row, eye[:2], eye[2:], torch.tensor([-1, 0]), tracks_first, all_live)
    >>> round(found.hedging.item(), 6), round(found.child_share.item(), 6)
    (0.6, 0.6)

    Logged as:
        planted/hedging: hedging, planted (lower): norm of a tracking row's shares of untracked planted features, above chance
        planted/hedging_low: hedging, planted, low: lower end of its 95 % interval over latents
        planted/hedging_high: hedging, planted, high: upper end of the same
        planted/child_share: child's share (lower): what the row nearest to a planted child's parent holds of the child, mean
        planted/child_share_low: child's share, low: lower end of its 95 % interval over children
        planted/child_share_high: child's share, high: upper end of the same
    """
    rows, features, chance = (fold_decoder(part)[0] for part in (W_dec, directions, null))
    with_features, with_chance = rows @ features.t(), rows @ chance.t()

    chosen = ((tracked.feature >= 0) & live).nonzero().squeeze(1)
    own, untracked = tracked.feature[chosen], tracked.latent < 0
    beside = with_features[chosen, own][:, None]
    shares = share_beside(with_features[chosen], beside, features[own] @ features.t())[:, untracked]
    by_chance = share_beside(with_chance[chosen], beside, features[own] @ chance.t())
    squares = shares.square().sum(1) - shares.shape[1] * by_chance.square().mean(1)
    mean, low, high = (value.sign() * value.abs().sqrt() for value in _interval(squares))

    children = (parents >= 0).nonzero().squeeze(1)
    its = parents[children]
    latent = torch.where(live[:, None], with_features[:, its].abs(), -1.0).argmax(0)  # the live one nearest to each parent
    between = (features[its] * features[children]).sum(1)
    held = share_beside(with_features[latent, children], with_features[latent, its], between)
    return PlantedHedging(mean, low, high, *_interval(held))


def _interval(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, and the ends of its interval; the mean alone of one value."""
    mean = values.mean()  # NaN of none
    half = _NORMAL * values.std() / len(values) ** 0.5 if len(values) > 1 else torch.zeros_like(mean)
    return mean, mean - half, mean + half
