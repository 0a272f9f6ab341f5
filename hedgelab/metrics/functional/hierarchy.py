"""Absorption on toys: a parent's latent that falls silent when a child feature fires.

A hierarchy is a parent for each feature (``parents [n]``, int64, -1 for none): the child fires only if its parent does. For a
parent that a latent tracks (``latent [n]``, each feature's latent, -1 for none), *missed* is the share of the examples with
parent and child on which the parent's latent is silent (Chanin et al. 2024, *A is for Absorption*). Beside it stands the same
share of the examples with the parent but without this child, for a latent may be deaf for other reasons; siblings that are
absorbed too raise it, so that the difference (``excess``) is a lower bound.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.metrics.functional.recovery import CoFiring

IMPLIES = 0.999  # P(parent | child) from which a feature counts as a parent
CHANCE = 1e-9  # a parent is believed only when independent features would show it with a smaller probability than this


class AbsorptionScores(NamedTuple):
    """Absorption of each child feature, ``[n]`` each; NaN without a parent, a latent for it, or examples."""

    missed: Tensor  # P(parent's latent silent | parent and child fire)
    missed_without_child: Tensor  # P(parent's latent silent | parent fires, child does not)
    excess: Tensor  # the first less the second: 1 for a parent fully absorbed by its only child, 0 for none


def infer_parents(both: Tensor, weight: Tensor, exact: bool = False) -> Tensor:
    """Parent of each feature, ``[n]`` int64 (-1 for none), from how often features fire together.

    ``p`` is an ancestor of ``c`` when P(p | c) ≥ .999 while P(c | p) and P(p) stay below that, and ``c`` fired often
    enough for this not to be chance (``exact`` sums are probabilities, which leave nothing to it); the parent is the rarest
    ancestor. ``both [n, n]`` and ``weight`` are those that :func:`.co_firing` gives of features with themselves.

    >>> infer_parents(torch.tensor([[0.3, 0.1], [0.1, 0.1]]), torch.tensor(1.0), exact=True).tolist()
    [-1, 0]
    """
    fired = both.diagonal()
    rate = fired / weight
    given_child = both / fired[:, None]
    ancestor = (given_child >= IMPLIES) & (given_child.T < IMPLIES) & (rate < IMPLIES)
    if not exact:
        ancestor &= fired[:, None] * rate.log() < math.log(CHANCE)
    return torch.where(ancestor.any(1), torch.where(ancestor, fired, torch.inf).argmin(1), -1)


def absorption_from_co_firing(counts: CoFiring, latent: Tensor, parents: Tensor) -> AbsorptionScores:
    """Absorption of each child feature, each score from 0 to 1 and ``excess`` from -1 to 1; formulas in the module.

    From pairwise counts (:func:`.co_firing`), gathered before latents are matched or parents known: exact when children never
    fire without their parent, off by at most the rate at which they do. Needs true features: of a language model see
    :mod:`.first_letter`. Only parents that a latent tracks are seen: read it beside :func:`parents_best_f1`.

    >>> both = torch.tensor([[1.0, 0], [1, 1]])  # the parent's latent fires once, without the child; the child's with it
    >>> counts = CoFiring(torch.tensor(2.0), torch.tensor([1.0, 1]), torch.tensor([2.0, 1]), both)
    >>> absorption_from_co_firing(counts, torch.tensor([0, 1]), torch.tensor([-1, 0])).excess.tolist()
    [nan, 1.0]

    Logged as:
        absorption: absorption (lower): how much more often the parent's latent is silent when the child fires
        absorption_missed: absorption, plain (lower): how often the parent's latent is silent when the child fires
    """
    known, reader = _tracked(latent, parents), latent[parents].clamp(min=0)
    child = torch.arange(len(parents), device=parents.device)
    heard, heard_always = counts.both[reader, child], counts.both[reader, parents]
    with_child = torch.where(known, counts.features, 0.0)
    without_child = torch.where(known, counts.features[parents] - counts.features, 0.0)
    missed = (with_child - heard) * known / with_child
    seen = torch.where(without_child > 0, without_child, torch.nan)
    without = (without_child - (heard_always - heard)) * known / seen
    return AbsorptionScores(missed, without, missed - without)


def parent_encoder_components(encoder_coordinates: Tensor, latent: Tensor, parents: Tensor) -> Tensor:
    """Encoder coordinate ``[d_sae, n]`` of the parent's latent along each child, ``[n]`` from -1 to 1; NaN where there is none.

    The geometric sign of the disease: negative for absorption, positive for hedging, 0 for a clean parent.

    >>> reads = torch.tensor([[0.8, -0.6], [0, 1]])  # the parent's latent is inhibited by the child
    >>> parent_encoder_components(reads, torch.tensor([0, 1]), torch.tensor([-1, 0]))[1].item() < 0
    True

    Logged as:
        absorption_encoder: absorption enc: parent's encoder along its child: < 0 absorbs, > 0 hedges
    """
    child = torch.arange(len(parents), device=parents.device)
    return encoder_coordinates[latent[parents], child].masked_fill(~_tracked(latent, parents), torch.nan)


def parents_best_f1(counts: CoFiring, parents: Tensor) -> Tensor:
    """F1 of the best detector that each parent feature has among *all* latents, ``[n]`` from 0 to 1; NaN without children.

    ``max_i 2 · both_ij / (latent i's firings + feature j's)``. Absorption sees only parents that a latent tracks: those that
    were absorbed whole, or lost, lower this one instead. A parent's best detector need not be a latent *for* it.

    >>> counts = CoFiring(torch.tensor(8.0), torch.tensor([2.0]), torch.tensor([6.0, 2]), torch.tensor([[2.0, 2]]))
    >>> parents_best_f1(counts, torch.tensor([-1, 0])).tolist()
    [0.5, nan]

    Logged as:
        absorption_parents_f1: parents' F1 (higher): F1 of the best detector of each parent feature, tracked or not
    """
    best = torch.full_like(counts.features, torch.nan)
    known = torch.bincount(parents[parents >= 0], minlength=len(parents)).nonzero().squeeze(1)
    best[known] = (2 * counts.both[:, known] / (counts.latents[:, None] + counts.features[known])).nan_to_num(0).amax(0)
    return best.masked_fill(counts.features == 0, torch.nan)


def _tracked(latent: Tensor, parents: Tensor) -> Tensor:
    """Which features have a parent that a latent tracks, ``[n]`` bool."""
    return (parents >= 0) & (latent[parents] >= 0)
