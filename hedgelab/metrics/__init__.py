"""What SAEs are measured by: torchmetrics classes; the pure functions are in :mod:`hedgelab.metrics.functional`."""

from hedgelab.metrics.degree import HedgingDegree
from hedgelab.metrics.error_spread import ResidualHedgingMetric
from hedgelab.metrics.evaluation import SAEMetrics, recovery_summary
from hedgelab.metrics.reconstruction import ExplainedVariance, MeanSquaredError, Shrinkage
from hedgelab.metrics.sparsity import L0, DeadLatents, FiringDensity
from hedgelab.metrics.toys import Absorption, FeatureDetection, FeatureHierarchy

__all__ = [
    "L0",
    "Absorption",
    "DeadLatents",
    "ExplainedVariance",
    "FeatureDetection",
    "FeatureHierarchy",
    "FiringDensity",
    "HedgingDegree",
    "MeanSquaredError",
    "ResidualHedgingMetric",
    "SAEMetrics",
    "Shrinkage",
    "recovery_summary",
]
