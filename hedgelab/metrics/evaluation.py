"""Everything a validation pass of an SAE measures, behind one ``update`` and one ``compute``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from hedgelab.batch import Batch
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.ranks import Ranks
from hedgelab.metrics import classes
from hedgelab.metrics.additive import ValidationMetric
from hedgelab.metrics.functional import hierarchy, recovery, true_hedging
from hedgelab.metrics.functional.accumulate import as_codes
from hedgelab.metrics.functional.true_hedging import MOST_PAIRS

MOST_INFERRED = 4096
"""Most features among which a hierarchy is inferred: its counts take 8 n² bytes."""


class SAEMetrics(nn.Module):
    """The metrics of one SAE over a validation pass, on any device and any number of ranks; ``README.md`` explains each.

    Always reconstruction, sparsity and the results of every :class:`.ValidationMetric`; with known features also their
    recovery, detection and hedging, and absorption where they have a hierarchy. Detection is the mean over the latents assigned
    to a feature for the MCC, hedging over live latents, absorption over children.

    Args:
        d_in: Width of the activations.
        d_sae: Number of latents.
        feature_directions: True directions, ``[n, d_in]``; None where they are unknown.
        parents: Parent of each feature, ``[n]`` int64, -1 for none; None infers it from up to 4096 features' firing.
        ranks: Those over which the batches are split, and so the sums; None: all processes, where there are several.
    """

    feature_directions: Tensor | None
    parents: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        feature_directions: Tensor | None = None,
        parents: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {}
        if ranks is not None:
            shared = {"sync_on_compute": ranks.size > 1, "process_group": ranks.group}
        self.explained_variance = classes.ExplainedVariance(d_in, **shared)
        self.mse = classes.MeanSquaredError(**shared)
        self.shrinkage = classes.Shrinkage(**shared)
        self.firing = classes.FiringDensity(d_sae, **shared)
        self.own = nn.ModuleList(metric(d_in, d_sae, **shared) for metric in ValidationMetric.known())
        self.detection: classes.FeatureDetection | None = None
        self.hierarchy: classes.FeatureHierarchy | None = None
        self.regression: classes.FeatureRegression | None = None
        self.register_buffer("feature_directions", feature_directions, persistent=False)
        self.register_buffer("parents", parents, persistent=False)
        if feature_directions is None:
            return
        n = feature_directions.shape[0]
        self.detection = classes.FeatureDetection(d_sae, n, **shared)
        if parents is None and n <= MOST_INFERRED:
            self.hierarchy = classes.FeatureHierarchy(n, **shared)
        if n > d_in and d_sae * n <= MOST_PAIRS:
            self.regression = classes.FeatureRegression(d_sae, n, **shared)
        elif n > d_in:
            warnings.warn(
                f"hedging/decoder: {n} overlapping features and {d_sae} latents are more than {MOST_PAIRS} pairs; NaN",
                stacklevel=2,
            )

    def update(self, batch: Batch, x_hat: Tensor, codes: Tensor | Codes) -> None:
        """Add a batch, its reconstruction ``[batch, d_in]`` and its latents."""
        x, features, weight = batch
        codes = as_codes(codes)
        for metric in (self.explained_variance, self.mse, self.shrinkage):
            metric.update(x, x_hat, weight)
        self.firing.update(codes, weight)
        for own in self.own:
            own.update(batch, x_hat, codes)  # type: ignore[operator]
        if self.detection is None:
            return
        if features is None:
            raise ValueError("feature_directions are known, so every batch needs its features")
        self.detection.update(codes, features, weight)
        if self.hierarchy is not None:
            self.hierarchy.update(features, weight)
        if self.regression is not None:
            self.regression.update(codes, features, weight)

    def compute(self, W_enc: Tensor, W_dec: Tensor) -> dict[str, Tensor]:
        """Scalars over everything seen, by name; weights ``[d_in, d_sae]`` and ``[d_sae, d_in]`` may have any norms."""
        rates = self.firing.compute().rates
        dead = rates == 0
        results = {
            "explained_variance": self.explained_variance.compute(),
            "mse": self.mse.compute(),
            "shrinkage": self.shrinkage.compute(),
            "l0": rates.sum(),
            "dead_latents": dead.sum().double(),
            "dead_fraction": dead.double().mean(),
        }
        for metric in self.own:
            results |= metric.results()  # type: ignore[operator]
        if self.detection is not None and self.feature_directions is not None:
            counts = self.detection.compute()
            parents = self.parents if self.hierarchy is None else self.hierarchy.compute()
            sums = None if self.regression is None else self.regression.compute()
            results |= recovery_summary(W_enc, W_dec, self.feature_directions, counts, parents, sums)
        return results

    def reset(self) -> None:
        """Forget everything seen."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()


def recovery_summary(
    W_enc: Tensor,
    W_dec: Tensor,
    feature_directions: Tensor,
    counts: recovery.CoFiring,
    parents: Tensor | None = None,
    sums: true_hedging.RegressionSums | None = None,
) -> dict[str, Tensor]:
    """The scalars of :class:`SAEMetrics` that need known features, from weights and co-firing counts.

    Weights ``[d_in, d_sae]`` and ``[d_sae, d_in]`` may have any norms. Without ``parents [n]`` (-1 for none) absorption is left
    out; ``sums`` are what more features than dimensions need for their hedging.
    """
    cosines = recovery.decoder_cosines(W_dec, feature_directions)
    live = counts.latents > 0
    assigned, tracked = recovery.match_features(cosines), true_hedging.tracked_features(cosines, live)
    detection = recovery.detection_scores(counts, assigned.feature)
    reads = true_hedging.encoder_coordinates(W_enc, feature_directions)
    results = {
        "mcc": recovery.matched_cosines(cosines, assigned).abs().mean(),
        "mean_max_cosine": recovery.mean_max_cosine(cosines),
        "mean_max_cosine_latents": recovery.mean_max_cosine(cosines.T),
        "uniqueness": recovery.uniqueness(cosines),
        "tracked_features": (tracked.latent >= 0).sum().double(),
        "detector_precision": detection.precision.nanmean(),
        "detector_recall": detection.recall.nanmean(),
        "detector_f1": detection.f1.nanmean(),
    }
    decoder = encoder = None
    if feature_directions.shape[0] <= feature_directions.shape[1]:
        writes = true_hedging.decoder_coordinates(W_dec, feature_directions)
        decoder, encoder = (true_hedging.hedging(part, cosines, tracked, live) for part in (writes, reads))
    elif sums is not None:
        often = counts.latents >= true_hedging.FIRINGS if bool(sums.examples > 0) else live
        decoder = true_hedging.regressed_hedging(sums, W_dec, feature_directions, cosines, tracked, often)
    for part, scores in (("decoder", decoder), ("encoder", encoder)):
        unknown = cosines.new_tensor(torch.nan)
        results[f"hedging/{part}"] = unknown if scores is None else scores.norm[live].nanmean()
        results[f"hedging/{part}_signed"] = unknown if scores is None else scores.largest[live].nanmean()
    if parents is not None and bool((parents >= 0).any()):
        absorbed = hierarchy.absorption_from_co_firing(counts, tracked.latent, parents)
        results["absorption"] = absorbed.excess.nanmean()
        results["absorption_missed"] = absorbed.missed.nanmean()
        results["absorption_encoder"] = hierarchy.parent_encoder_components(reads, tracked.latent, parents).nanmean()
        results["absorption_parents_f1"] = hierarchy.parents_best_f1(counts, parents).nanmean()
    return results
