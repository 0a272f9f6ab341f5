"""What a trained SAE holds of planted children in the rows of their parents, and what omitted-variable theory says of it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.data.planting import PlantedActivations
from hedgelab.metrics import ExplainedVariance, FeatureRegression, FiringDensity, ResidualHedgingMetric
from hedgelab.metrics.functional.accumulate import fold_decoder
from hedgelab.metrics.functional.planted import share_beside
from hedgelab.metrics.functional.recovery import decoder_cosines
from hedgelab.metrics.functional.true_hedging import (
    FIRINGS,
    TRACKING_COSINE,
    RegressionSums,
    regressed_hedging,
    regression_coefficients,
    tracked_features,
)
from hedgelab.saes import SAE, MatryoshkaSAE
from hedgelab.seeding import generator


class Pairs(NamedTuple):
    """Of each parent and its child, ``[pairs]``."""

    latent: Tensor  # the live latent whose decoder row is nearest to the parent, int64
    parent_cosine: Tensor  # absolute
    child_cosine: Tensor  # largest absolute cosine of another live latent with the child
    share: Tensor  # what the row, of unit norm and on the parent's side, holds of the child
    predicted: Tensor  # what omitted-variable theory says that it holds
    level: Tensor  # matryoshka level of the latent, int64; 0 in other SAEs

    @property
    def has_latent(self) -> Tensor:
        """Whether a latent of its own tracks the child."""
        return self.child_cosine >= TRACKING_COSINE


class Measured(NamedTuple):
    """An SAE on held-out activations."""

    pairs: Pairs
    measures: dict[str, Tensor]  # of each parent's latent, by measures that know no truth, [pairs]
    numbers: dict[str, float]  # of the SAE as a whole; ``untouched/``: where nothing is planted


@torch.no_grad()
def measure(sae: SAE, data: PlantedActivations, batches: int, wide: SAE | None = None) -> Measured:
    """Measure an SAE on so many validation batches of the data that it was trained on, and on the same without planting.

    ``wide`` is a wider SAE of the same activations, which stands in for the truth in one of the measures. The nulls of residual
    hedging are those of its errors with their signs drawn at random, and with their directions drawn, too.
    """
    children = (data.parents >= 0).nonzero().squeeze(1)
    parents, directions = data.parents[children], data.feature_directions
    regression, firing = FeatureRegression(sae.d_sae, len(directions)), FiringDensity(sae.d_sae)
    residuals = {name: ResidualHedgingMetric(sae.W_dec) for name in ("residual", "flipped", "surrogate")}
    against = None if wide is None else FeatureRegression(sae.d_sae, wide.d_sae)
    rng = generator(0, "surrogate errors")
    explained = {name: ExplainedVariance(sae.d_in) for name in ("", "untouched/")}
    untouched = FiringDensity(sae.d_sae)
    for index in range(batches):
        x, features, _ = data.batch("val", index)
        codes = sae.encode(x)
        x_hat = sae.decode(codes)
        regression.update(codes, features)
        firing.update(codes)
        error = x - x_hat
        signs = torch.randint(0, 2, (len(x), 1), generator=rng) * 2.0 - 1
        drawn = normalize(torch.randn(x.shape, generator=rng), dim=1) * error.norm(dim=1, keepdim=True)
        for name, one in (("residual", error), ("flipped", error * signs), ("surrogate", drawn)):
            residuals[name].update(x, x - one, codes)
        if against is not None and wide is not None:
            against.update(codes, wide.encode(x))
        explained[""].update(x, x_hat)
        plain = data.base.batch("val", index).x
        codes = sae.encode(plain)
        untouched.update(codes)
        explained["untouched/"].update(plain, sae.decode(codes))
    sums, rates = regression.compute(), firing.compute()
    live = rates * sums.examples >= FIRINGS
    pairs = find_pairs(sae, sums, live, directions[parents], directions[children], children)
    found = {name: metric.compute() for name, metric in residuals.items()}
    measures = {name: one.latents[pairs.latent] for name, one in found.items()}
    measures["wide"] = torch.full_like(measures["residual"], torch.nan)
    if against is not None and wide is not None:
        measures["wide"] = wide_reference(sae, wide, against.compute(), live)[pairs.latent]
    numbers = {
        **{f"{name}explained_variance": float(metric.compute()) for name, metric in explained.items()},
        "l0": float(rates.sum()),
        "untouched/l0": float(untouched.compute().sum()),
        "dead_fraction": float((rates == 0).double().mean()),
        **{f"hedging/{name}": float(one.hedging) for name, one in found.items()},
    }
    return Measured(pairs, measures, numbers)


def wide_reference(sae: SAE, wide: SAE, sums: RegressionSums, live: Tensor) -> Tensor:
    """Hedging of each latent with a wider SAE's latents in place of true features, ``[d_sae]``.

    Omitted-variable hedging: the regression of the wider SAE's codes on these, along wide latents that no latent tracks.
    """
    cosines = decoder_cosines(sae.W_dec, wide.W_dec)
    return regressed_hedging(sums, sae.W_dec, wide.W_dec, cosines, tracked_features(cosines, live), live).norm


def find_pairs(
    sae: SAE, sums: RegressionSums, live: Tensor, parents: Tensor, children: Tensor, features: Tensor
) -> Pairs:
    """Each parent's latent, and what it holds of the child; ``parents``, ``children``: directions ``[pairs, d_in]``.

    ``features`` are the children's numbers in the regression ``sums``; ``live [d_sae]`` says which latents may be a parent's.
    The share is that of :mod:`~hedgelab.metrics.functional.planted`; theory says that it is the coefficient of the parent's
    code in the regression of the child's activation z (in units of x), ``± ‖W_dec[i]‖⁻¹ (Cov(codes)⁻¹ Cov(codes, z))_i``.
    """
    rows, norms = fold_decoder(sae.W_dec)
    chosen = live.nonzero().squeeze(1)
    of_parents, of_children = (decoder_cosines(sae.W_dec[chosen], part).abs() for part in (parents, children))
    cosine, place = of_parents.max(0)
    latent = chosen[place]
    others = of_children.scatter(0, place[None], 0.0)
    own = rows[latent].double()
    p, c = (normalize(part.double(), dim=1) for part in (parents, children))
    along, beside, between = ((one * other).sum(1) for one, other in ((own, c), (own, p), (p, c)))
    side = torch.where(beside < 0, -1.0, 1.0)
    share = share_beside(along, beside, between)
    coefficients = regression_coefficients(sums, chosen)[place, features] / norms[latent].double()
    level = torch.zeros_like(latent)
    if isinstance(sae, MatryoshkaSAE):
        order = sae.latent_order()
        position = latent if order is None else order.argsort()[latent]
        level = torch.bucketize(position, torch.tensor(sae.levels), right=True)
    return Pairs(
        latent,
        cosine,
        others.amax(0),
        share,
        side * coefficients,
        level,
    )
