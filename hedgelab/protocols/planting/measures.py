"""What a trained SAE holds of planted children in their parents' rows, and measures that claim to see it without the truth.

Of each latent, graded by a trial:

- ``residual``: residual hedging; its nulls ``flipped``, of errors with signs drawn at random, and ``surrogate``, of errors of
  the same norms in random directions;
- ``wide``: omitted-variable hedging, the regression of a wider SAE's codes on these, along wide latents that no latent tracks;
- ``projection``: decoder projection of the activations next to those on which the latent fires; ``cosine``: mean absolute
  cosine of its row with the others;
- ``degree``: what the latent gives up to new ones, above random subspaces; ``covariance_degree``: above those of the
  activations' covariance; ``movement``: how far its row moves.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.planting import PlantedActivations
from hedgelab.kernels.codes import Codes
from hedgelab.metrics import L0, ExplainedVariance, FeatureRegression, HedgingDegree, ResidualHedgingMetric
from hedgelab.metrics.functional import true_hedging
from hedgelab.metrics.functional.accumulate import fold_decoder
from hedgelab.metrics.functional.degree import DegreeScores
from hedgelab.metrics.functional.error_spread import ResidualHedging
from hedgelab.metrics.functional.planted import share_beside
from hedgelab.metrics.functional.projection import latent_projections
from hedgelab.metrics.functional.recovery import decoder_cosines, decoder_geometry
from hedgelab.metrics.functional.true_hedging import TRACKING_COSINE
from hedgelab.saes import SAE, MatryoshkaSAE
from hedgelab.seeding import generator

NULLS = ("flipped", "surrogate")  # of residual hedging
MEASURES = ("residual", *NULLS, "wide", "projection", "cosine", "degree", "covariance_degree", "movement")


class Others(NamedTuple):
    """SAEs of the same activations beside the one that is measured; without them some measures are not known."""

    wide: SAE | None = None  # a wider one
    continued: tuple[SAE, SAE] | None = None  # the one that is measured, trained on, and the same with new latents


class ResidualAndNulls:
    """Residual hedging of an SAE, and what it says of errors in which no feature can be missing: its nulls."""

    def __init__(self, W_dec: Tensor, nulls: tuple[str, ...] = NULLS) -> None:
        self.metrics = {name: ResidualHedgingMetric(W_dec) for name in ("residual", *nulls)}
        self.rng = generator(0, "surrogate errors")

    def update(self, x: Tensor, codes: Codes, x_hat: Tensor) -> None:
        """Add a batch."""
        for name, metric in self.metrics.items():
            metric.update(x, x - self._error(name, x - x_hat), codes)

    def _error(self, name: str, error: Tensor) -> Tensor:
        """The SAE's own, or that of a null in its place."""
        if name == "flipped":
            coins = torch.randint(0, 2, (len(error), 1), generator=self.rng)
            return torch.where(coins.bool().to(error.device), error, -error)
        if name == "surrogate":
            drawn, length = torch.randn(error.shape, generator=self.rng).to(error), error.norm(dim=1, keepdim=True)
            return normalize(drawn, dim=1).mul_(length)
        return error

    def compute(self) -> dict[str, ResidualHedging]:
        """By name: ``residual`` and the nulls."""
        return {name: metric.compute() for name, metric in self.metrics.items()}


class HalfReading:
    """What one half of the validation batches shows of an SAE's latents: two halves tell how noisy a measure is."""

    def __init__(self, sae: SAE, wide: SAE | None) -> None:
        self.sae, self.residuals = sae, ResidualAndNulls(sae.W_dec)
        self.against = None if wide is None else (wide, FeatureRegression(sae.d_sae, wide.d_sae))

    def update(self, x: Tensor, codes: Codes, x_hat: Tensor) -> None:
        """Add a batch."""
        self.residuals.update(x, codes, x_hat)
        if self.against is not None:
            wide, regression = self.against
            regression.update(codes, wide.encode(x))

    def compute(self, live: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Each measure of latents, ``[d_sae]``, and the SAE's own number by those that have one."""
        sae, scores = self.sae, self.residuals.compute()
        x = torch.cat(self.residuals.metrics["residual"].x)
        found = {name: score.latents for name, score in scores.items()}
        found["projection"] = latent_projections(x, sae.encode(x), sae.W_dec, sae.b_dec).double()
        if self.against is not None:  # a wider SAE's latents in place of true features
            wide, regression = self.against
            cosines = decoder_cosines(sae.W_dec, wide.W_dec)
            given = regression.compute(), sae.W_dec, wide.W_dec, cosines, true_hedging.tracked_features(cosines, live)
            found["wide"] = true_hedging.regressed_hedging(*given, live).norm
        return found, {name: float(score.hedging) for name, score in scores.items()}


def of_decoders(sae: SAE, scores: DegreeScores | None, live: Tensor) -> dict[str, Tensor]:
    """Measures that decoders alone give, of each latent, ``[d_sae]``; those of dead latents are not known."""
    unknown = torch.full((sae.d_sae,), torch.nan, dtype=torch.float64)
    found = {"cosine": unknown.masked_scatter(live, decoder_geometry(sae.W_dec, live).absolute)}
    if scores is not None:
        moved = scores.projections
        found["degree"] = (moved - scores.baselines) / (1 - scores.baselines)
        found["covariance_degree"] = (moved - scores.covariance_baselines) / (1 - scores.covariance_baselines)
        found["movement"] = scores.delta_norms
    return found


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
    explained, continued, degree = ExplainedVariance(sae.d_in), others.continued or (), None
    if continued:
        degree = HedgingDegree(continued[0].W_dec, continued[1].W_dec)
    for index in range(batches):
        x, features, _ = data.batch("val", index).to(sae.W_dec.device)  # a language model's may be on a GPU
        codes = sae.encode(x)
        x_hat = sae.decode(codes)
        regression.update(codes, features)
        fired += codes.firing_counts()
        halves[index % 2].update(x, codes, x_hat)
        explained.update(x, x_hat)
        if degree is not None:
            degree.update(x, *(one.encode(x) for one in continued))
    live = fired >= true_hedging.FIRINGS
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
    sae: SAE, sums: true_hedging.RegressionSums, live: Tensor, parents: Tensor, children: Tensor, features: Tensor
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
    coefficients = true_hedging.regression_coefficients(sums, chosen)[place, features] / norms[latent].double()
    level = torch.zeros_like(latent)
    if isinstance(sae, MatryoshkaSAE):
        order = sae.latent_order()
        position = latent if order is None else order.argsort()[latent]
        level = torch.bucketize(position, torch.tensor(sae.levels), right=True)
    return Pairs(latent, cosine, others.amax(0), share, side * coefficients, level)
