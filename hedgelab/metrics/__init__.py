"""What SAEs are measured by: torchmetrics classes; the pure functions are in :mod:`hedgelab.metrics.functional`.

:mod:`hedgelab.metrics.direct` measures an SAE at hand in one call.
"""

from hedgelab.metrics.additive import ValidationMetric
from hedgelab.metrics.classes import (
    L0,
    Absorption,
    DeadLatents,
    ExplainedVariance,
    FeatureDetection,
    FeatureHierarchy,
    FeatureRegression,
    FiringDensity,
    MeanSquaredError,
    Shrinkage,
)
from hedgelab.metrics.degree import HedgingDegree
from hedgelab.metrics.direct import hedging, hedging_degree, residual_hedging
from hedgelab.metrics.error_spread import ResidualHedgingMetric
from hedgelab.metrics.evaluation import SAEMetrics, recovery_summary

__all__ = [
    "L0",
    "Absorption",
    "DeadLatents",
    "ExplainedVariance",
    "FeatureDetection",
    "FeatureHierarchy",
    "FeatureRegression",
    "FiringDensity",
    "HedgingDegree",
    "MeanSquaredError",
    "ResidualHedgingMetric",
    "SAEMetrics",
    "Shrinkage",
    "ValidationMetric",
    "hedging",
    "hedging_degree",
    "recovery_summary",
    "residual_hedging",
]
