"""Explained variance, squared error and shrinkage, accumulated over batches."""

from typing import Any

from torch import Tensor

from hedgelab.metrics.additive import AdditiveMetric
from hedgelab.metrics.functional.reconstruction import (
    VarianceSums,
    explained_variance_compute,
    explained_variance_update,
    mean_squared_error_update,
    shrinkage_update,
)


class ExplainedVariance(AdditiveMetric):
    """Share of the variance that the reconstruction explains; see :func:`.functional.explained_variance`.

    Args:
        d_in: Width of the activations.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = True
    weight: Tensor
    residual: Tensor
    within: Tensor
    between: Tensor
    total: Tensor

    def __init__(self, d_in: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("weight", "residual", "within", "between"):
            self.add_sum(name)
        self.add_sum("total", d_in)

    def update(self, x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch; ``x`` and ``x_hat``: ``[batch, d_in]``, ``weight``: ``[batch]``."""
        self.add_to(**explained_variance_update(x, x_hat, weight)._asdict())

    def compute(self) -> Tensor:
        """Explained variance over everything seen, a float64 scalar."""
        return explained_variance_compute(
            VarianceSums(self.weight, self.residual, self.within, self.between, self.total)
        )


class MeanSquaredError(AdditiveMetric):
    """Squared error, summed over d_in and averaged over examples."""

    higher_is_better = False
    residual: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("residual")
        self.add_sum("weight")

    def update(self, x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch; ``x`` and ``x_hat``: ``[batch, d_in]``, ``weight``: ``[batch]``."""
        residual, count = mean_squared_error_update(x, x_hat, weight)
        self.add_to(residual=residual, weight=count)

    def compute(self) -> Tensor:
        """Mean over everything seen, a float64 scalar."""
        return self.residual / self.weight


class Shrinkage(AdditiveMetric):
    """Relative reconstruction bias, below 1 when shrunk; see :func:`.functional.shrinkage`."""

    higher_is_better = None
    norm: Tensor
    dot: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("norm")
        self.add_sum("dot")

    def update(self, x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch; ``x`` and ``x_hat``: ``[batch, d_in]``, ``weight``: ``[batch]``."""
        norm, dot = shrinkage_update(x, x_hat, weight)
        self.add_to(norm=norm, dot=dot)

    def compute(self) -> Tensor:
        """Bias over everything seen, a float64 scalar."""
        return self.norm / self.dot
