"""Suites that need no labels and no language model: density and decoder geometry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch

from hedgelab.errors import whole_number
from hedgelab.metrics.functional.geometry import NEAR_DUPLICATE, decoder_geometry
from hedgelab.metrics.functional.probing import firing_magnitudes
from hedgelab.metrics.functional.reconstruction import explained_variance
from hedgelab.metrics.functional.sparsity import density_histogram
from hedgelab.plots.density import firing_density
from hedgelab.plots.evaluation import cosine_distribution
from hedgelab.protocols.evaluation.reader import Readings
from hedgelab.protocols.evaluation.suite import Scores, Suite, Title, encode_rows, table
from hedgelab.saes import SAE

OFTEN, SELDOM = 0.1, 1e-4
"""Firing rates from which a latent is dense, and below which it is rare."""


class DensitySuite(Suite):
    """How often latents fire, how many never do, and how well they reconstruct.

    Args:
        rows: Activations of the validation stage on which it is measured, at least.
    """

    name = "density"
    reads_language_model = False
    titles: ClassVar[Mapping[str, Title]] = {
        "density/explained_variance": Title("explained variance", "higher"),
        "density/l0": Title("L0", drawn=False),
        "density/dead_fraction": Title("dead latents", "lower"),
    }

    def __init__(self, rows: int = 8192) -> None:
        self.rows = whole_number("rows", rows)

    @torch.no_grad()
    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        x = readings.rows(self.rows)
        for name, sae in saes.items():
            codes = encode_rows(sae, x)
            rates = codes.firing_counts().double() / len(x)
            magnitudes = firing_magnitudes(codes)
            x_hat = sae.decode(sae.encode(x.to(sae.W_dec.device))).cpu()
            histogram = density_histogram(rates)
            live = rates[rates > 0]
            metrics = {
                "density/l0": float(rates.sum()),
                "density/explained_variance": float(explained_variance(x, x_hat)),
                "density/dead_fraction": float((rates == 0).double().mean()),
                "density/dense_fraction": float((rates >= OFTEN).double().mean()),
                "density/rare_fraction": float(((rates > 0) & (rates < SELDOM)).double().mean()),
                "density/median_rate": float(live.median()) if len(live) else 0.0,
            }
            bins = zip(
                histogram.edges[:-1].tolist(), histogram.edges[1:].tolist(), histogram.counts.tolist(), strict=True
            )
            latents = zip(range(sae.d_sae), rates.tolist(), magnitudes.tolist(), strict=True)
            tables = {
                "density/histogram.csv": table(["log10_rate_from", "log10_rate_to", "latents"], list(bins)),
                "density/latents.csv": table(["latent", "firing_rate", "mean_magnitude"], list(latents)),
            }
            yield name, Scores(metrics, tables, {"density.png": partial(firing_density, rates)})


class GeometrySuite(Suite):
    """How decoder rows of live latents lie to one another.

    Args:
        rows: Activations of the validation stage that tell live latents from dead ones, at least.
    """

    name = "geometry"
    reads_language_model = False
    titles: ClassVar[Mapping[str, Title]] = {
        "geometry/mean_max_cosine": Title("mean largest cosine", "lower"),
        "geometry/near_duplicates": Title("near-duplicate latents", "lower", drawn=False),
    }

    def __init__(self, rows: int = 8192) -> None:
        self.rows = whole_number("rows", rows)

    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE."""
        for name, sae in saes.items():
            live = encode_rows(sae, readings.rows(self.rows)).fired()
            geometry = decoder_geometry(sae.W_dec.detach().cpu(), live)
            count = max(1, int(live.sum()))
            W_enc = torch.nn.functional.normalize(sae.W_enc.detach().T.float(), dim=1)
            tied = (W_enc * torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1)).sum(1).cpu()[live]
            metrics = {
                "geometry/mean_max_cosine": float(geometry.largest.double().mean()) if int(live.sum()) else 0.0,
                "geometry/mean_absolute_cosine": float(geometry.mean_absolute),
                "geometry/near_duplicates": float(geometry.near_duplicates) / count,
                "geometry/encoder_decoder_cosine": float(tied.double().mean()) if len(tied) else 0.0,
            }
            numbers = live.nonzero().squeeze(1)
            rows = zip(numbers.tolist(), numbers[geometry.nearest].tolist(), geometry.largest.tolist(), strict=True)
            tables = {"geometry/nearest.csv": table(["latent", "nearest", "cosine"], list(rows))}
            draw = partial(cosine_distribution, geometry.counts, geometry.largest, NEAR_DUPLICATE)
            yield name, Scores(metrics, tables, {"geometry.png": draw})
