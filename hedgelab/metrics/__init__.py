"""What SAEs are measured by: torchmetrics classes; the pure functions are in :mod:`hedgelab.metrics.functional`.

``hedging``, ``residual_hedging`` and ``hedging_degree`` measure an SAE at hand in one call.
"""

from hedgelab.metrics.classes import L0 as L0
from hedgelab.metrics.classes import DeadLatents as DeadLatents
from hedgelab.metrics.classes import ExplainedVariance as ExplainedVariance
from hedgelab.metrics.classes import FeatureDetection as FeatureDetection
from hedgelab.metrics.classes import FeatureHierarchy as FeatureHierarchy
from hedgelab.metrics.classes import FeatureRegression as FeatureRegression
from hedgelab.metrics.classes import FiringDensity as FiringDensity
from hedgelab.metrics.classes import HedgingDegree as HedgingDegree
from hedgelab.metrics.classes import LossRecovered as LossRecovered
from hedgelab.metrics.classes import MeanSquaredError as MeanSquaredError
from hedgelab.metrics.classes import NormRatio as NormRatio
from hedgelab.metrics.classes import ResidualHedgingMetric as ResidualHedgingMetric
from hedgelab.metrics.classes import Shrinkage as Shrinkage
from hedgelab.metrics.classes import ValidationMetric as ValidationMetric
from hedgelab.metrics.direct import hedging as hedging
from hedgelab.metrics.direct import hedging_degree as hedging_degree
from hedgelab.metrics.direct import residual_hedging as residual_hedging
from hedgelab.metrics.evaluation import SAEMetrics as SAEMetrics
