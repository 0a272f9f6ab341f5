"""Hedging on toys: how much of the features that no latent tracks is mixed into the latents that exist.

Definitions, for an SAE with folded weights and known features ``f_1 … f_n``:

- *Tracked*: latents that fire are assigned to features one-to-one (Hungarian on absolute decoder cosines); a feature is
  tracked when its latent's absolute decoder cosine is at least ``threshold`` (default .6).
- *Own feature* of a latent: the one it tracks, else the one of largest absolute decoder cosine.
- *Hedging component* of latent i along feature j: the coordinate of its unit decoder row (or unit encoder column) along
  ``f_j``, for every j that is untracked and not its own; 0 elsewhere. Positive: on the same side as its own feature.
- *True hedging* of a latent: the Euclidean norm of those components.

A decoder row is a sum of features, so its coordinates are the least-squares ones, ``W_dec pinv(F)``: plain products would be
spurious between overlapping features. An encoder column *reads* features, so its coordinates are its responses ``f_j · w``: an
encoder that separates overlapping features perfectly scores 0. On orthonormal features both are plain cosines.

*More features than dimensions* (n > d_in): decoder rows have no unique coordinates, and cosines are no substitute: perfect
latents of 384 features in 128 dimensions get 1.57, not 0. What a row should hold is read from codes c and true activations z::

    B = Cov(c)⁻¹ Cov(c, z)  [d_sae, n],        h_ij = ± B_ij / |Σ_j B_ij f_j · W_dec[i] / ‖W_dec[i]‖|

the coefficient of ``c_i`` in the regression of ``z_j`` on all codes (what the best decoder on these codes holds), over the size
of that row along the SAE's own. It ignores the scale of codes, is 0 for perfect latents however much features overlap, and
equals the coordinate for a decoder of least squared error on orthonormal features. Squared norms are products of B from the
even and from the odd examples, whose noise cancels: a latent's hedging is ``sign(q) √|q|`` of ``q = Σ_j h_ij h'_ij`` and may be
below zero by chance. ``Cov(c)`` is shrunk toward its diagonal by ``d_sae / (d_sae + examples)``. Latents of fewer than 16
firings are not measured (NaN), nor are encoders where n > d_in.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes
from hedgelab.metrics.functional import accumulate
from hedgelab.metrics.functional.accumulate import as_codes, float64, fold_decoder, weighted_sum
from hedgelab.metrics.functional.recovery import Matching, encoder_cosines, match_features

TRACKING_COSINE = 0.6  # absolute decoder cosine from which a latent is said to track its feature
MOST_PAIRS = 2**27  # of latent and feature that are regressed, such as 8192 x 16384: the sums take 8 bytes a pair
FIRINGS = 16  # firings that a latent needs for its regression to be believed
_FEATURES_AT_ONCE = 1024


class HedgingScores(NamedTuple):
    """Hedging of each latent; all zero for latents that are not live."""

    components: Tensor  # signed hedging components, [d_sae, n]; float32 by regression
    norm: Tensor  # true hedging of each latent, [d_sae]
    largest: Tensor  # signed component of largest size of each latent, [d_sae]


class RegressionSums(NamedTuple):
    """Sums behind the regression of true activations on codes; those of batches and ranks add up.

    A first dimension of 2 is that of the even and the odd examples of a batch; weighted ones (populations) count for both.
    """

    examples: Tensor  # how many without weights, scalar
    weight: Tensor  # their weight, [2]
    codes: Tensor  # sums of codes, [2, d_sae]
    features: Tensor  # sums of true activations, [2, n]
    code_products: Tensor  # Σ c cᵀ over both, [d_sae, d_sae]
    products: Tensor  # Σ c zᵀ, [2, d_sae, n] float32: 8 · d_sae · n bytes

    def first(self, count: int) -> Self:
        """The sums of the first ``count`` latents alone."""
        products = self.code_products[:count, :count]
        return self._replace(codes=self.codes[:, :count], code_products=products, products=self.products[:, :count])


def decoder_coordinates(W_dec: Tensor, feature_directions: Tensor) -> Tensor:
    """Least-squares coordinates ``[d_sae, n]`` of ``W_dec``'s unit rows ``[d_sae, d_in]`` along unit directions ``[n, d_in]``.

    >>> decoder_coordinates(torch.tensor([[3.0, 4.0]]), torch.eye(2)).tolist()
    [[0.6, 0.8]]
    """
    n, d_in = feature_directions.shape
    if n > d_in:
        raise UserError(f"features: {n} directions in {d_in} dimensions overlap: codes and true activations are needed")
    coordinates: Tensor = fold_decoder(W_dec)[0] @ torch.linalg.pinv(fold_decoder(feature_directions)[0])
    return coordinates


encoder_coordinates = encoder_cosines  # responses of unit columns to unit features: coordinates in the dual basis


def tracked_features(cosines: Tensor, live: Tensor | None = None, threshold: float = TRACKING_COSINE) -> Matching:
    """Which live latent tracks which feature: pairs of the matching of largest ``Σ |cosine|`` that reach ``threshold``.

    ``cosines [d_sae, n]`` are the decoder's, ``live [d_sae]`` (bool; None for all) says which latents fire. From 0 to
    ``min(d_sae, n)`` features are tracked, judged by direction alone: their latents may still fire at the wrong time.

    >>> tracked_features(torch.tensor([[0.9, 0.1], [0.1, 0.5]])).latent.tolist()
    [0, -1]

    Logged as:
        tracked_features: tracked [features] (higher): features that some live latent has as its nearest
    """
    return match_features(cosines, live, threshold)


def hedging(coordinates: Tensor, cosines: Tensor, tracked: Matching, live: Tensor | None = None) -> HedgingScores:
    """Hedging of each latent along the features that no latent tracks, from 0 to about 1; see the module.

    ``coordinates [d_sae, n]`` are the decoder's or the encoder's; decoder ``cosines [d_sae, n]`` settle each latent's own
    feature and its sign; ``live [d_sae]`` (bool; None for all) are latents that fire. Directions beside these are not seen.

    >>> cosines = torch.tensor([[0.8, 0.6]])  # one latent for the first feature, with .6 of the second
    >>> hedging(cosines, cosines, tracked_features(cosines)).norm
    tensor([0.6000])

    Logged as:
        hedging/decoder: hedging dec (lower): norm of the part of a decoder row along features that no latent tracks
        hedging/decoder_signed: hedging dec ±: largest such component with its sign: > 0 for positive correlation
        hedging/encoder: hedging enc (lower): the same of the encoder
        hedging/encoder_signed: hedging enc ±: the same of the encoder, with its sign
    """
    side, counted = _counted(cosines, tracked, live)
    components = torch.where(counted, coordinates * side, 0.0)
    largest = components.gather(1, components.abs().argmax(1, keepdim=True)).squeeze(1)
    return HedgingScores(components, components.norm(dim=1), largest)


def regression_update(codes: Tensor | Codes, features: Tensor | Codes, weight: Tensor | None = None) -> RegressionSums:
    """Sums of one batch of latents ``[batch, d_sae]`` and true activations ``[batch, n]``, each dense or codes.

    Where true activations are codes without weights, sums of products are sparse: an entry for each pair and example.
    """
    codes, features = as_codes(codes).detach(), features.detach()
    if isinstance(features, Codes) and weight is not None:
        features = features.to_dense()
    place = features.values if isinstance(features, Codes) else features
    odd, count = torch.arange(codes.batch_size, device=place.device) % 2, codes.batch_size if weight is None else 0
    amounts = [(odd == half).double() if weight is None else float64(weight) for half in (0, 1)]
    values = float64(codes.values)
    wide = codes.to(values.device).with_values(values)
    code_products = accumulate.pair_product(wide, wide, None if weight is None else 2 * float64(weight))
    of_codes = torch.stack([wide.sum_per_latent(half.to(values.device)) for half in amounts])
    if isinstance(features, Codes):
        true = features.with_values(float64(features.values))
        of_features = torch.stack([true.sum_per_latent(half) for half in amounts])
        products = _products_by_half(codes, features)
    else:
        of_features = torch.stack([weighted_sum(features, half) for half in amounts])
        products = torch.stack([accumulate.sparse_product(codes, features.float(), half.float()) for half in amounts])
    mass = torch.stack([half.sum() for half in amounts])
    return RegressionSums(mass.new_tensor(count), mass, of_codes, of_features, code_products, products)


def _products_by_half(codes: Codes, features: Codes) -> Tensor:
    """``Σ c zᵀ`` over even and over odd examples, ``[2, d_sae, n]``."""
    crow, latents, values = codes.csr()
    # latents of odd examples are counted from d_sae on, so that both halves are one product
    by_half = Codes.from_csr(crow, latents + codes.d_sae * (codes.rows() % 2), values.float(), 2 * codes.d_sae)
    products, shape = accumulate.pair_product(by_half, features), (2, codes.d_sae, features.d_sae)
    if not products.is_sparse:
        return products.reshape(shape)
    latent, feature = products._indices()
    index = torch.stack([latent // codes.d_sae, latent % codes.d_sae, feature])
    return torch.sparse_coo_tensor(index, products._values(), shape, check_invariants=False)


def regressed_hedging(
    sums: RegressionSums,
    W_dec: Tensor,
    feature_directions: Tensor,
    cosines: Tensor,
    tracked: Matching,
    live: Tensor | None = None,
) -> HedgingScores:
    """The same by regression, for more features than dimensions; NaN for latents that do not fire often enough to be ``live``.

    Takes about ``4 · d_sae² · n`` multiplications, and 4 bytes a pair of latent and feature beside the sums.
    """
    side, counted = _counted(cosines, tracked, live)
    (d_sae, n), device = cosines.shape, cosines.device
    chosen = torch.arange(d_sae, device=device) if live is None else live.nonzero().squeeze(1)
    factor = _covariance_factor(sums, chosen)
    rows, directions = fold_decoder(W_dec)[0][chosen], fold_decoder(feature_directions)[0]
    found, scale = torch.zeros(2, len(chosen), n, device=device), factor.new_zeros(len(chosen))
    for start in range(0, n, _FEATURES_AT_ONCE):
        part = slice(start, start + _FEATURES_AT_ONCE)
        for half, weight in enumerate(sums.weight):
            means = (sums.codes[half, chosen] / weight).outer(sums.features[half, part] / weight)
            coefficients = torch.cholesky_solve(float64(sums.products[half, chosen, part]) / weight - means, factor)
            scale += (coefficients * (rows @ directions[part].t())).sum(1) / 2
            found[half, :, part] = torch.where(counted[chosen, part], coefficients * side[chosen], 0.0)
    even, odd = found.div_(scale.abs().clamp_min(1e-30)[:, None])
    square = (even * odd).sum(1, dtype=torch.float64)
    # the component that looks largest in one half, as the other half sees it: no choice among noise
    seen = [there.gather(1, here.abs().argmax(1, keepdim=True)) for here, there in ((even, odd), (odd, even))]

    def of_all(values: Tensor) -> Tensor:  # NaN for latents that are not chosen
        return values.new_full((d_sae, *values.shape[1:]), torch.nan).index_copy_(0, chosen, values)

    norm, largest = square.sign() * square.abs().sqrt(), ((seen[0] + seen[1]) / 2).squeeze(1).double()
    return HedgingScores(of_all(even.add_(odd).div_(2)), of_all(norm), of_all(largest))


def regression_coefficients(sums: RegressionSums, chosen: Tensor) -> Tensor:
    """``Cov(c)⁻¹ Cov(c, z)`` of the ``chosen`` latents (int64), ``[chosen, n]`` float64: what the best decoder on them holds.

    Omitted-variable theory: so much of each feature does a row hold, in the feature's unit for one of the code's.

    >>> codes, z = torch.tensor([[1.0], [0], [1], [0]]), torch.tensor([[2.0], [0], [0], [0]])  # twice, with halves that agree
    >>> sums = regression_update(codes.repeat(2, 1), z.repeat(2, 1), torch.full((8,), 0.125))
    >>> regression_coefficients(sums, torch.tensor([0])).round(decimals=6).item()
    1.0
    """
    weight = sums.weight.sum()
    means = (sums.codes[:, chosen].sum(0) / weight).outer(sums.features.sum(0) / weight)
    return torch.cholesky_solve(sums.products.sum(0)[chosen].double() / weight - means, _covariance_factor(sums, chosen))


def _covariance_factor(sums: RegressionSums, chosen: Tensor) -> Tensor:
    """Cholesky factor of the chosen latents' covariance, shrunk toward its diagonal."""
    total, mean = sums.weight.sum(), sums.codes.sum(0) / sums.weight.sum()
    covariance = (sums.code_products / total - mean.outer(mean))[chosen][:, chosen]
    variance = covariance.diagonal().clamp_min(1e-30)
    d_sae = len(mean)
    shrinkage = d_sae / (d_sae + sums.examples) if bool(sums.examples > 0) else sums.examples + 1e-9
    covariance.mul_(1 - shrinkage).diagonal().add_(shrinkage * variance)
    factor: Tensor = torch.linalg.cholesky(covariance)
    return factor


def _counted(cosines: Tensor, tracked: Matching, live: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sign of each latent along its own feature, ``[d_sae, 1]``, and which components are hedging, bool ``[d_sae, n]``."""
    own = torch.where(tracked.feature >= 0, tracked.feature, cosines.abs().argmax(1))[:, None]
    side = torch.where(cosines.gather(1, own) < 0, -1.0, 1.0).to(cosines.dtype)
    counted = (tracked.latent < 0).expand_as(cosines).scatter(1, own, False)
    return side, counted if live is None else counted & live[:, None]
