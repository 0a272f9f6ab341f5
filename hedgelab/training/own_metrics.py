"""Metrics of one's own, named in a config."""

from lightning.pytorch import Callback

from hedgelab.identity import EVERYTHING
from hedgelab.metrics import ValidationMetric


class OwnMetrics(Callback):
    """Makes metrics of one's own part of every validation pass; naming a class here is all that it takes.

    Args:
        metrics: Class paths of subclasses of :class:`hedgelab.metrics.ValidationMetric`.
    """

    where_and_how = EVERYTHING

    def __init__(self, metrics: list[type[ValidationMetric]]) -> None:
        self.metrics = metrics
