"""Suites that need no labels and no language model: density and decoder geometry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from hedgelab.errors import whole_number
from hedgelab.metrics.functional.basic import density_histogram, explained_variance
from hedgelab.metrics.functional.probing import firing_magnitudes
from hedgelab.metrics.functional.recovery import NEAR_DUPLICATE, decoder_geometry
from hedgelab.plots.evaluation import cosine_distribution
from hedgelab.plots.training import firing_density
from hedgelab.protocols.evaluation.reader import Readings
from hedgelab.protocols.evaluation.suite import Scores, Suite, Title, encode_rows, rows_of
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
            x_hat = sae.decode(sae.encode(x.to(sae.W_dec.device))).cpu()
            counts, edges, _ = density_histogram(rates)
            live = rates[rates > 0]
            metrics = {
                "density/l0": float(rates.sum()),
                "density/explained_variance": float(explained_variance(x, x_hat)),
                "density/dead_fraction": float((rates == 0).double().mean()),
                "density/dense_fraction": float((rates >= OFTEN).double().mean()),
                "density/rare_fraction": float(((rates > 0) & (rates < SELDOM)).double().mean()),
                "density/median_rate": float(live.median()) if len(live) else 0.0,
            }
            latents = {"latent": range(sae.d_sae), "firing_rate": rates, "mean_magnitude": firing_magnitudes(codes)}
            tables = {
                "density/histogram.csv": rows_of(
                    {"log10_rate_from": edges[:-1], "log10_rate_to": edges[1:], "latents": counts}
                ),
                "density/latents.csv": rows_of(latents),
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
            W_enc, W_dec = (normalize(weight.detach().float(), dim=1) for weight in (sae.W_enc.T, sae.W_dec))
            tied = (W_enc * W_dec).sum(1).cpu()[live]
            count = int(live.sum())
            metrics = {
                "geometry/mean_max_cosine": float(geometry.largest.double().mean()) if count else 0.0,
                "geometry/mean_absolute_cosine": float(geometry.mean_absolute),
                "geometry/near_duplicates": float(geometry.near_duplicates) / max(1, count),
                "geometry/encoder_decoder_cosine": float(tied.double().mean()) if count else 0.0,
            }
            latents = live.nonzero().squeeze(1)
            nearest = {"latent": latents, "nearest": latents[geometry.nearest], "cosine": geometry.largest}
            draw = partial(cosine_distribution, geometry.counts, geometry.largest, NEAR_DUPLICATE)
            yield name, Scores(metrics, {"geometry/nearest.csv": rows_of(nearest)}, {"geometry.png": draw})
