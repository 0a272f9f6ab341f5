"""What a trained SAE holds of planted children in the rows of their parents, and what omitted-variable theory says of it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.planting import PlantedActivations
from hedgelab.metrics import L0, ExplainedVariance, FeatureRegression, HedgingDegree
from hedgelab.metrics.functional.accumulate import fold_decoder
from hedgelab.metrics.functional.planted import share_beside
from hedgelab.metrics.functional.recovery import decoder_cosines
from hedgelab.metrics.functional.true_hedging import FIRINGS, TRACKING_COSINE, RegressionSums, regression_coefficients
from hedgelab.protocols.planting.measures import MEASURES, HalfReading, Others, of_decoders
from hedgelab.saes import SAE, MatryoshkaSAE


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
    measures: dict[str, Tensor]  # of each parent's latent, by measures that know no truth, on either half, [2, pairs]
    numbers: dict[str, float]  # of the SAE as a whole; ``untouched/``: where nothing is planted


@torch.no_grad()
def measure(sae: SAE, data: PlantedActivations, batches: int, others: Others | None = None) -> Measured:
    """Measure an SAE on so many validation batches of the data that it was trained on, and on the same without planting."""
    others = others or Others()
    children = (data.parents >= 0).nonzero().squeeze(1)
    parents, directions = data.parents[children], data.feature_directions
    regression, fired = FeatureRegression(sae.d_sae, len(directions)), torch.zeros(sae.d_sae)
    halves = [HalfReading(sae, others.wide) for _ in range(2)]
    explained, control, extended, degree = ExplainedVariance(sae.d_in), others.control, others.extended, None
    if control is not None and extended is not None:
        degree = HedgingDegree(control.W_dec, extended.W_dec)
    for index in range(batches):
        x, features, _ = data.batch("val", index).to(sae.W_dec.device)  # a language model's may be on a GPU
        codes = sae.encode(x)
        x_hat = sae.decode(codes)
        regression.update(codes, features)
        fired += codes.firing_counts()
        halves[index % 2].update(x, codes, x_hat)
        explained.update(x, x_hat)
        if degree is not None and control is not None and extended is not None:
            degree.update(x, control.encode(x), extended.encode(x))
    live = fired >= FIRINGS
    pairs = find_pairs(sae, regression.compute(), live, directions[parents], directions[children], children)
    found = [half.compute(live) for half in halves]
    scores = None if degree is None else degree.compute()
    fixed = of_decoders(sae, scores, live)
    unknown = torch.full_like(pairs.share, torch.nan)

    def of_parents(name: str) -> Tensor:
        return torch.stack([(own | fixed)[name][pairs.latent] if name in own | fixed else unknown for own, _ in found])

    numbers = {
        "explained_variance": float(explained.compute()),
        "l0": float(fired.sum()) / (batches * data.batch_size),
        "dead_fraction": float((fired == 0).double().mean()),
        **{f"hedging/{name}": (one + found[1][1][name]) / 2 for name, one in found[0][1].items()},
        **({} if scores is None else {f"degree/{name}": value for name, value in scores.scalars().items()}),
        **{f"untouched/{name}": value for name, value in reconstruction(sae, data.base, batches).items()},
    }
    return Measured(pairs, {name: of_parents(name) for name in MEASURES}, numbers)


@torch.no_grad()
def reconstruction(sae: SAE, data: ActivationDataModule, batches: int) -> dict[str, float]:
    """Explained variance and L0 on so many validation batches."""
    explained, sparsity = ExplainedVariance(sae.d_in), L0()
    for index in range(batches):
        x = data.batch("val", index).x.to(sae.W_dec.device)
        codes = sae.encode(x)
        explained.update(x, sae.decode(codes))
        sparsity.update(codes)
    return {"explained_variance": float(explained.compute()), "l0": float(sparsity.compute())}


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
    return Pairs(latent, cosine, others.amax(0), share, side * coefficients, level)
