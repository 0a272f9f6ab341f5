"""Pure functions behind the metric classes: ``*_update`` gives additive sums of a batch, ``*_compute`` the result."""

from hedgelab.metrics.functional.degree import DegreeScores, hedging_degree
from hedgelab.metrics.functional.detection import CoFiring, DetectionScores, co_firing, detection_scores
from hedgelab.metrics.functional.error_spread import ResidualHedging, residual_hedging
from hedgelab.metrics.functional.hierarchy import (
    AbsorptionScores,
    absorption,
    absorption_from_co_firing,
    infer_parents,
    parent_encoder_components,
)
from hedgelab.metrics.functional.reconstruction import explained_variance, mean_squared_error, shrinkage
from hedgelab.metrics.functional.recovery import (
    BestMatches,
    Matching,
    best_matches,
    decoder_cosines,
    encoder_cosines,
    match_features,
    matched_cosines,
    mcc,
    mean_max_cosine,
    uniqueness,
)
from hedgelab.metrics.functional.sparsity import (
    LOG_DENSITY_EDGES,
    DensityHistogram,
    dead_latents,
    density_histogram,
    firing_rates,
    l0,
)
from hedgelab.metrics.functional.true_hedging import (
    TRACKING_COSINE,
    HedgingScores,
    decoder_coordinates,
    encoder_coordinates,
    hedging,
    tracked_features,
)

__all__ = [
    "LOG_DENSITY_EDGES",
    "TRACKING_COSINE",
    "AbsorptionScores",
    "BestMatches",
    "CoFiring",
    "DegreeScores",
    "DensityHistogram",
    "DetectionScores",
    "HedgingScores",
    "Matching",
    "ResidualHedging",
    "absorption",
    "absorption_from_co_firing",
    "best_matches",
    "co_firing",
    "dead_latents",
    "decoder_coordinates",
    "decoder_cosines",
    "density_histogram",
    "detection_scores",
    "encoder_coordinates",
    "encoder_cosines",
    "explained_variance",
    "firing_rates",
    "hedging",
    "hedging_degree",
    "infer_parents",
    "l0",
    "match_features",
    "matched_cosines",
    "mcc",
    "mean_max_cosine",
    "mean_squared_error",
    "parent_encoder_components",
    "residual_hedging",
    "shrinkage",
    "tracked_features",
    "uniqueness",
]
