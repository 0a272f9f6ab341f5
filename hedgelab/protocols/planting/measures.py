"""What claims to see hedging without knowing the truth: measures of each latent, which a trial grades.

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

from hedgelab.kernels.codes import Codes
from hedgelab.metrics import FeatureRegression, ResidualHedgingMetric
from hedgelab.metrics.functional.degree import DegreeScores
from hedgelab.metrics.functional.error_spread import ResidualHedging
from hedgelab.metrics.functional.projection import latent_projections
from hedgelab.metrics.functional.recovery import decoder_cosines, decoder_geometry
from hedgelab.metrics.functional.true_hedging import RegressionSums, regressed_hedging, tracked_features
from hedgelab.saes import SAE
from hedgelab.seeding import generator

NULLS = ("flipped", "surrogate")  # of residual hedging
MEASURES = ("residual", *NULLS, "wide", "projection", "cosine", "degree", "covariance_degree", "movement")


class Others(NamedTuple):
    """SAEs of the same activations beside the one that is measured; without them some measures are not known."""

    wide: SAE | None = None  # a wider one
    control: SAE | None = None  # the one that is measured, trained on
    extended: SAE | None = None  # the same with new latents


class ResidualAndNulls:
    """Residual hedging of an SAE, and what it says of errors in which no feature can be missing: its nulls."""

    def __init__(self, W_dec: Tensor) -> None:
        self.metrics = {name: ResidualHedgingMetric(W_dec) for name in ("residual", *NULLS)}
        self.rng = generator(0, "surrogate errors")

    def update(self, x: Tensor, codes: Codes, x_hat: Tensor) -> None:
        """Add a batch."""
        error = x - x_hat
        signs = torch.randint(0, 2, (len(x), 1), generator=self.rng).to(x) * 2 - 1
        drawn = normalize(torch.randn(x.shape, generator=self.rng).to(x), dim=1) * error.norm(dim=1, keepdim=True)
        for name, one in (("residual", error), ("flipped", error * signs), ("surrogate", drawn)):
            self.metrics[name].update(x, x - one, codes)

    def compute(self) -> dict[str, ResidualHedging]:
        """By name: ``residual`` and the nulls."""
        return {name: metric.compute() for name, metric in self.metrics.items()}


class HalfReading:
    """What one half of the validation batches shows of an SAE's latents: two halves tell how noisy a measure is."""

    def __init__(self, sae: SAE, wide: SAE | None) -> None:
        self.sae, self.wide = sae, wide
        self.residuals = ResidualAndNulls(sae.W_dec)
        self.against = None if wide is None else FeatureRegression(sae.d_sae, wide.d_sae)

    def update(self, x: Tensor, codes: Codes, x_hat: Tensor) -> None:
        """Add a batch."""
        self.residuals.update(x, codes, x_hat)
        if self.against is not None and self.wide is not None:
            self.against.update(codes, self.wide.encode(x))

    def compute(self, live: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Each measure of latents, ``[d_sae]``, and the SAE's own number by those that have one."""
        sae, scores = self.sae, self.residuals.compute()
        x = torch.cat(self.residuals.metrics["residual"].x)
        found = {name: score.latents for name, score in scores.items()}
        found["projection"] = latent_projections(x, sae.encode(x), sae.W_dec, sae.b_dec).double()
        if self.against is not None and self.wide is not None:
            found["wide"] = wide_reference(sae, self.wide, self.against.compute(), live)
        return found, {name: float(score.hedging) for name, score in scores.items()}


def wide_reference(sae: SAE, wide: SAE, sums: RegressionSums, live: Tensor) -> Tensor:
    """Hedging of each latent with a wider SAE's latents in place of true features, ``[d_sae]``."""
    cosines = decoder_cosines(sae.W_dec, wide.W_dec)
    return regressed_hedging(sums, sae.W_dec, wide.W_dec, cosines, tracked_features(cosines, live), live).norm


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
