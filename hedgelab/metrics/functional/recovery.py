"""Directions of latents beside those of known features (recovery, detection), and beside one another (geometry).

``cosines [d_sae, n]`` are those of decoder rows with features. They do not depend on positive scales: weights may be folded or
not. What is made of them trusts that ``features`` are all that there is, and counts dead latents like others.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional import accumulate
from hedgelab.metrics.functional.accumulate import as_codes, float64, fold_decoder, weighted_sum
from hedgelab.metrics.functional.basic import firing_update

NEAR_DUPLICATE = 0.9  # cosine from which two decoder rows count as the same direction
_BINS, _ROWS_AT_ONCE = 200, 1024


class Matching(NamedTuple):
    """A one-to-one assignment of latents to features, int64, -1 for none."""

    feature: Tensor  # of each latent, [d_sae]
    latent: Tensor  # of each feature, [n]


def decoder_cosines(W_dec: Tensor, feature_directions: Tensor) -> Tensor:
    """Cosines ``[d_sae, n]`` of the rows of ``W_dec [d_sae, d_in]`` with ``feature_directions [n, d_in]``; 0 for a zero row.

    >>> decoder_cosines(torch.tensor([[3.0, 4.0]]), torch.eye(2)).tolist()
    [[0.6, 0.8]]
    """
    return fold_decoder(W_dec)[0] @ fold_decoder(feature_directions)[0].T


def encoder_cosines(W_enc: Tensor, feature_directions: Tensor) -> Tensor:
    """The same of each column of ``W_enc [d_in, d_sae]``."""
    return decoder_cosines(W_enc.T, feature_directions)


def match_features(cosines: Tensor, live: Tensor | None = None, threshold: float = 0.0) -> Matching:
    """Assign latents to features so that the sum of absolute cosines is largest (Hungarian algorithm).

    ``live [d_sae]`` (bool; None for all) may be assigned; pairs of an absolute cosine below ``threshold`` are dropped then.

    >>> match_features(torch.tensor([[0.9, 0.1], [0.95, 0.2]])).feature.tolist()
    [0, 1]
    """
    from scipy.optimize import linear_sum_assignment  # late: scipy is slow to import

    d_sae = len(cosines)
    candidates = torch.arange(d_sae, device=cosines.device) if live is None else live.nonzero().squeeze(1)
    cost = cosines[candidates].abs_().neg_()  # one copy, of what may be half a gigabyte; maximising would make another
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    latents, features = candidates[torch.as_tensor(rows)], torch.as_tensor(columns, device=cosines.device)
    feature = torch.full((d_sae,), -1, device=cosines.device).index_copy(0, latents, features)
    return strong_pairs(feature, cosines, threshold)


def strong_pairs(feature: Tensor, cosines: Tensor, threshold: float) -> Matching:
    """The pairs of an assignment, the ``feature [d_sae]`` of each latent, whose absolute cosines reach ``threshold``."""
    size = cosines.gather(1, feature.clamp(min=0)[:, None]).squeeze(1).abs()
    feature = feature.masked_fill(~(size >= threshold), -1)
    latents = (feature >= 0).nonzero().squeeze(1)
    latent = torch.full((cosines.shape[1],), -1, device=cosines.device)
    return Matching(feature, latent.index_copy(0, feature[latents], latents))


def mcc(cosines: Tensor, matching: Matching | None = None) -> Tensor:
    """Mean absolute cosine over the ``min(d_sae, n)`` pairs of the best one-to-one assignment, from 0 to 1.

    The mean correlation coefficient of the identifiability literature, taken on directions; random ones do not score 0. That of
    SynthSAEBench (arXiv 2602.14687) is the same number. An assignment that is known already may be given as ``matching``.

    >>> round(mcc(torch.tensor([[0.9, 0.1], [0.95, 0.2]])).item(), 3)
    0.55

    Logged as:
        mcc: MCC (higher): mean absolute cosine of features with latents assigned one to one; 1 recovers all features
    """
    feature = (match_features(cosines) if matching is None else matching).feature
    latents = (feature >= 0).nonzero().squeeze(1)
    return cosines[latents, feature[latents]].abs().mean()


def mean_max_cosine(cosines: Tensor) -> Tensor:
    """Largest absolute cosine of each *feature* with any latent, averaged over features (Sharkey et al. 2022), from 0 to 1.

    Below 1 for SAEs narrower than the features; one latent may serve several. With ``cosines.T`` the mean is over latents.

    >>> mean_max_cosine(torch.tensor([[1.0, 0.5], [0, 0.25]])).item()
    0.75

    Logged as:
        mean_max_cosine: max cosine (higher): each feature's largest absolute cosine with any latent, mean over features
        mean_max_cosine_latents: max cosine of latents (higher): each latent's largest absolute cosine with any feature, mean
    """
    return cosines.abs().amax(0).mean()


def uniqueness(cosines: Tensor) -> Tensor:
    """Number of distinct best features, over the number of latents: 1 when no two share theirs, at most ``n / d_sae``.

    That of SynthSAEBench (arXiv 2602.14687) is the same number.

    >>> uniqueness(torch.tensor([[0.9, 0.1], [-0.8, 0.2]])).item()
    0.5

    Logged as:
        uniqueness: uniqueness (higher): share of latents whose nearest feature no other latent has
    """
    return (torch.bincount(cosines.abs().argmax(1), minlength=cosines.shape[1]) > 0).sum().double() / cosines.shape[0]


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


def co_firing_update(codes: Tensor | Codes, features: Tensor | Codes, weight: Tensor | None = None) -> CoFiring:
    """Sums of one batch; where ``features`` are codes, ``both`` is a sparse tensor with an entry for each pair and example."""
    codes, exact = as_codes(codes).detach(), torch.Tensor.float if weight is None else float64
    fired, count = firing_update(codes, weight)
    firing, weight = codes.with_values(exact(codes.values != 0)), None if weight is None else float64(weight)
    if isinstance(features, Codes):
        present = features.with_values(exact(features.values > 0))
        both = accumulate.pair_product(firing, present, weight)
        return CoFiring(count, fired, firing_update(present, weight).numerator, both)
    dense = features > 0
    return CoFiring(count, fired, weighted_sum(dense, weight), accumulate.sparse_product(firing, exact(dense), weight))


def co_firing(codes: Tensor | Codes, features: Tensor | Codes, weight: Tensor | None = None) -> CoFiring:
    """How often latents and features fire and fire together, over one batch.

    Latents fire where they are not 0, ``features [batch, n]`` above 0. Without ``weight`` pairs are whole numbers in float32.

    >>> co_firing(torch.tensor([[1.0], [-2.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]])).both.tolist()
    [[2.0, 1.0]]
    """
    counts = co_firing_update(codes, features, weight)
    return counts._replace(both=counts.both.to_dense()) if counts.both.is_sparse else counts


def detection_scores(counts: CoFiring, feature: Tensor) -> DetectionScores:
    """Precision, recall and ``F1 = 2 · both / (latent's firings + feature's)`` of each latent for its feature, from 0 to 1.

    ``counts`` come from :class:`hedgelab.metrics.FeatureDetection`, ``feature [d_sae]`` (int64, -1 for none) says what each
    latent should detect. Magnitudes do not enter: a latent that fires weakly beside its feature's absence loses precision.

    >>> fires = torch.tensor([[1.0], [1.0], [0.0]])
    >>> detection_scores(co_firing(fires, torch.tensor([[1.0], [0.0], [0.0]])), torch.tensor([0])).precision.item()
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


def nearest_detection_scores(counts: CoFiring, cosines: Tensor) -> DetectionScores:
    """Each latent as a detector of the feature *nearest to its decoder row* by absolute cosine, ``[d_sae]``; 0 where undefined.

    The scores of SynthSAEBench (Chanin and Garriga-Alonso 2026, arXiv 2602.14687), whose F1 is the mean over all latents, dead
    ones included. Several latents may share a feature, unlike in :func:`detection_scores` of a one-to-one assignment.

    >>> counts = co_firing(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
    >>> nearest_detection_scores(counts, torch.tensor([[-0.9], [0.1]])).precision.tolist()
    [0.5, 0.0]

    Logged as:
        nearest_precision: precision, nearest (higher): of firings of a latent, the share with the feature nearest to it, mean
        nearest_recall: recall, nearest (higher): of examples with the nearest feature, the share where the latent fires, mean
        nearest_f1: F1, nearest (higher): harmonic mean of both, mean over all latents, as SynthSAEBench defines it
    """
    return DetectionScores(*(score.nan_to_num(0.0) for score in detection_scores(counts, cosines.abs().argmax(1))))


class DecoderGeometry(NamedTuple):
    """Cosines between the decoder rows of different latents."""

    counts: Tensor  # pairs of latents by cosine, in equal bins from -1 to 1, [200] int64
    largest: Tensor  # largest cosine of each latent with another, [d_sae] float32
    nearest: Tensor  # which latent that is, [d_sae] int64
    absolute: Tensor  # mean |cosine| of each latent with the others, [d_sae] float64
    mean_absolute: Tensor  # the same over all pairs, float64 scalar
    near_duplicates: Tensor  # latents with another within cosine .9, int64 scalar


def decoder_geometry(W_dec: Tensor, live: Tensor | None = None, threshold: float = NEAR_DUPLICATE) -> DecoderGeometry:
    """Cosines between rows of ``W_dec [d_sae, d_in]``, block by block: the ``[d_sae, d_sae]`` matrix is never held.

    Results are of the ``live [d_sae]`` latents (bool; None for all): dead rows are as drawn. ``threshold`` is near-duplicates'.

    >>> decoder_geometry(torch.tensor([[1.0, 0], [2, 0], [0, 1]])).near_duplicates.item()
    2

    Logged as:
        geometry/near_duplicates: near duplicates (lower): latents with another at almost the same direction
    """
    weights = accumulate.detached(W_dec)
    rows = normalize((weights if live is None else weights[live.to(weights.device)]).float(), dim=1)
    n = len(rows)
    counts = torch.zeros(_BINS, dtype=torch.float64, device=rows.device)
    absolute = counts.new_zeros(n)
    largest, nearest = rows.new_zeros(n), torch.zeros(n, dtype=torch.int64, device=rows.device)
    for start in range(0, n, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        cosines = (rows[part] @ rows.T).clamp(-1, 1)
        cosines.diagonal(start).fill_(-2.0)  # a latent with itself: left of every bin, and never the largest
        counts += torch.histc(cosines, _BINS, -1, 1).double()
        absolute[part] = (cosines.abs().sum(1, dtype=torch.float64) - 2) / max(1, n - 1)
        largest[part], nearest[part] = cosines.max(dim=1)
    mean_absolute = absolute.mean() if n else counts.new_zeros(())
    return DecoderGeometry((counts / 2).long(), largest, nearest, absolute, mean_absolute, (largest >= threshold).sum())
