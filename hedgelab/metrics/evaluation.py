"""Everything a validation pass of an SAE measures, behind one ``update`` and one ``compute``."""

from typing import Any

from torch import Tensor, nn

from hedgelab.batch import Batch
from hedgelab.kernels.codes import Codes
from hedgelab.kernels.ranks import Ranks
from hedgelab.metrics.functional.detection import CoFiring, detection_scores
from hedgelab.metrics.functional.hierarchy import absorption_from_co_firing, parent_encoder_components
from hedgelab.metrics.functional.recovery import (
    decoder_cosines,
    match_features,
    matched_cosines,
    mean_max_cosine,
    uniqueness,
)
from hedgelab.metrics.functional.true_hedging import (
    decoder_coordinates,
    encoder_coordinates,
    hedging,
    tracked_features,
)
from hedgelab.metrics.reconstruction import ExplainedVariance, MeanSquaredError, Shrinkage
from hedgelab.metrics.sparsity import FiringDensity
from hedgelab.metrics.toys import FeatureDetection, FeatureHierarchy

MOST_INFERRED = 4096
"""Most features among which a hierarchy is inferred: its counts take 8 n² bytes."""


class SAEMetrics(nn.Module):
    """The metrics of one SAE over a validation pass, on any device and any number of ranks.

    Always: ``explained_variance``, ``mse``, ``shrinkage``, ``l0``, ``dead_latents``, ``dead_fraction``. With known
    features also ``mcc``, ``mean_max_cosine`` (over features), ``mean_max_cosine_latents`` (over latents),
    ``uniqueness``, ``tracked_features`` (how many), ``detector_precision``, ``detector_recall``, ``detector_f1`` (mean
    over the latents assigned to a feature for the MCC), ``hedging/decoder``, ``hedging/encoder`` (true hedging, mean over
    live latents), ``hedging/decoder_signed``, ``hedging/encoder_signed`` (the largest component of each, mean over live
    latents), and where the features have a hierarchy ``absorption`` (excess misses, mean over children),
    ``absorption_missed`` (plain misses) and ``absorption_encoder`` (the parent's encoder component along its child).

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
        self.explained_variance = ExplainedVariance(d_in, **shared)
        self.mse = MeanSquaredError(**shared)
        self.shrinkage = Shrinkage(**shared)
        self.firing = FiringDensity(d_sae, **shared)
        self.register_buffer("feature_directions", feature_directions, persistent=False)
        self.register_buffer("parents", parents, persistent=False)
        self.detection: FeatureDetection | None = None
        self.hierarchy: FeatureHierarchy | None = None
        if feature_directions is not None:
            n = feature_directions.shape[0]
            self.detection = FeatureDetection(d_sae, n, **shared)
            if parents is None and n <= MOST_INFERRED:
                self.hierarchy = FeatureHierarchy(n, **shared)

    def update(self, batch: Batch, x_hat: Tensor, codes: Codes) -> None:
        """Add a batch, its reconstruction ``[batch, d_in]`` and its codes."""
        x, features, weight = batch
        self.explained_variance.update(x, x_hat, weight)
        self.mse.update(x, x_hat, weight)
        self.shrinkage.update(x, x_hat, weight)
        self.firing.update(codes, weight)
        if self.detection is None:
            return
        if features is None:
            raise ValueError("feature_directions are known, so every batch needs its features")
        self.detection.update(codes, features, weight)
        if self.hierarchy is not None:
            self.hierarchy.update(features, weight)

    def compute(self, W_enc: Tensor, W_dec: Tensor) -> dict[str, Tensor]:
        """Scalars over everything seen.

        Args:
            W_enc: Folded encoder, ``[d_in, d_sae]``.
            W_dec: Folded decoder, ``[d_sae, d_in]``.
        """
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
        if self.detection is not None and self.feature_directions is not None:
            counts = self.detection.compute()
            parents = self.parents if self.hierarchy is None else self.hierarchy.compute()
            results |= recovery_summary(W_enc, W_dec, self.feature_directions, counts, parents)
        return results

    def reset(self) -> None:
        """Forget everything seen."""
        for metric in (self.explained_variance, self.mse, self.shrinkage, self.firing, self.detection, self.hierarchy):
            if metric is not None:
                metric.reset()


def recovery_summary(
    W_enc: Tensor, W_dec: Tensor, feature_directions: Tensor, counts: CoFiring, parents: Tensor | None = None
) -> dict[str, Tensor]:
    """The scalars of :class:`SAEMetrics` that need known features, from folded weights and co-firing counts.

    Args:
        W_enc: Folded encoder, ``[d_in, d_sae]``.
        W_dec: Folded decoder, ``[d_sae, d_in]``.
        feature_directions: True directions, ``[n, d_in]``.
        counts: Co-firing of latents and features.
        parents: Parent of each feature, ``[n]`` int64, -1 for none; None leaves absorption out.
    """
    cosines = decoder_cosines(W_dec, feature_directions)
    live = counts.latents > 0
    assigned, tracked = match_features(cosines), tracked_features(cosines, live)
    detection = detection_scores(counts, assigned.feature)
    reads = encoder_coordinates(W_enc, feature_directions)
    writes = decoder_coordinates(W_dec, feature_directions)
    in_decoder, in_encoder = (hedging(coordinates, cosines, tracked, live) for coordinates in (writes, reads))
    results = {
        "mcc": matched_cosines(cosines, assigned).abs().mean(),
        "mean_max_cosine": mean_max_cosine(cosines),
        "mean_max_cosine_latents": mean_max_cosine(cosines.T),
        "uniqueness": uniqueness(cosines),
        "tracked_features": (tracked.latent >= 0).sum().double(),
        "detector_precision": detection.precision.nanmean(),
        "detector_recall": detection.recall.nanmean(),
        "detector_f1": detection.f1.nanmean(),
        "hedging/decoder": in_decoder.norm[live].mean(),
        "hedging/decoder_signed": in_decoder.largest[live].mean(),
        "hedging/encoder": in_encoder.norm[live].mean(),
        "hedging/encoder_signed": in_encoder.largest[live].mean(),
    }
    if parents is not None and bool((parents >= 0).any()):
        scores = absorption_from_co_firing(counts, tracked.latent, parents)
        results["absorption"] = scores.excess.nanmean()
        results["absorption_missed"] = scores.missed.nanmean()
        results["absorption_encoder"] = parent_encoder_components(reads, tracked.latent, parents).nanmean()
    return results
