"""The metrics as torchmetrics classes: what each function of :mod:`.functional` gives, over all batches and ranks.

``update`` takes what the function takes, ``weight [batch]`` last.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.additive import FunctionMetric
from hedgelab.metrics.functional.accumulate import Ratio
from hedgelab.metrics.functional.detection import co_firing_update
from hedgelab.metrics.functional.hierarchy import (
    HierarchySums,
    absorption_compute,
    absorption_update,
    hierarchy_update,
)
from hedgelab.metrics.functional.reconstruction import (
    explained_variance_compute,
    explained_variance_update,
    mean_squared_error_update,
    shrinkage_update,
)
from hedgelab.metrics.functional.sparsity import (
    LOG_DENSITY_EDGES,
    DensityHistogram,
    FiringSums,
    density_histogram,
    firing_update,
    l0_update,
)
from hedgelab.metrics.functional.true_hedging import regression_update


class ExplainedVariance(FunctionMetric):
    """Share of the variance that the reconstruction explains; see :func:`.functional.explained_variance`."""

    higher_is_better = True

    def __init__(self, d_in: int, **kwargs: Any) -> None:
        empty = torch.zeros(0, d_in)
        super().__init__(explained_variance_update, explained_variance_compute, empty, empty, **kwargs)


class MeanSquaredError(FunctionMetric):
    """Squared error, summed over d_in and averaged over examples; see :func:`.functional.mean_squared_error`."""

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(mean_squared_error_update, Ratio.value, torch.zeros(0, 1), torch.zeros(0, 1), **kwargs)


class Shrinkage(FunctionMetric):
    """Relative reconstruction bias, below 1 when shrunk; see :func:`.functional.shrinkage`."""

    higher_is_better = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(shrinkage_update, Ratio.value, torch.zeros(0, 1), torch.zeros(0, 1), **kwargs)


class L0(FunctionMetric):
    """Mean number of active latents an example; see :func:`.functional.l0`."""

    higher_is_better = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(l0_update, Ratio.value, torch.zeros(0, 1), **kwargs)


class DeadCount(NamedTuple):
    """Latents that fired on no example seen."""

    number: Tensor  # int64 scalar
    fraction: Tensor  # of all latents, float64 scalar

    @classmethod
    def of(cls, sums: FiringSums) -> DeadCount:
        """Those among latents that fired so often."""
        dead = sums.fired == 0
        return cls(dead.sum(), dead.double().mean())


class DeadLatents(FunctionMetric):
    """Count and fraction of the ``d_sae`` latents that fired on no example seen; see :func:`.functional.dead_latents`."""

    higher_is_better = False

    def __init__(self, d_sae: int, **kwargs: Any) -> None:
        super().__init__(firing_update, DeadCount.of, torch.zeros(0, d_sae), **kwargs)


class FiringDensities(NamedTuple):
    """How often latents fire."""

    rates: Tensor  # fraction of examples each latent fires on, [d_sae]
    histogram: DensityHistogram  # latents by log10 of that rate

    @classmethod
    def of(cls, sums: FiringSums, edges: tuple[float, ...]) -> FiringDensities:
        """Those of latents that fired so often."""
        rates = sums.fired / sums.weight
        return cls(rates, density_histogram(rates, edges))


class FiringDensity(FunctionMetric):
    """Firing rate of each of ``d_sae`` latents, and their histogram over ascending ``edges`` in log10 of the rate."""

    higher_is_better = None

    def __init__(self, d_sae: int, edges: tuple[float, ...] = LOG_DENSITY_EDGES, **kwargs: Any) -> None:
        super().__init__(firing_update, partial(FiringDensities.of, edges=edges), torch.zeros(0, d_sae), **kwargs)


class FeatureDetection(FunctionMetric):
    """How often each of ``d_sae`` latents fires together with each of ``n`` features.

    Feed the result to :func:`.functional.detection_scores` (precision, recall, F1 of each latent for its feature) or to
    :func:`.functional.absorption_from_co_firing`. Holds ``8 · d_sae · n`` bytes.
    """

    higher_is_better = None

    def __init__(self, d_sae: int, n: int, **kwargs: Any) -> None:
        super().__init__(co_firing_update, None, torch.zeros(0, d_sae), torch.zeros(0, n), **kwargs)


class FeatureRegression(FunctionMetric):
    """Sums behind true hedging where features overlap: the regression of ``n`` true activations on ``d_sae`` codes.

    Feed the result to :func:`.functional.regressed_hedging`. Holds ``8 · d_sae · (n + d_sae)`` bytes: .7 GB for 4096 latents
    and 16384 features; a batch costs what :class:`FeatureDetection`'s does, and ``batch · d_sae²`` multiplications more.
    """

    higher_is_better = None

    def __init__(self, d_sae: int, n: int, **kwargs: Any) -> None:
        super().__init__(regression_update, None, torch.zeros(0, d_sae), torch.zeros(0, n), **kwargs)


class FeatureHierarchy(FunctionMetric):
    """Which of ``n`` features is whose parent, inferred from firing; see :func:`.functional.infer_parents`.

    Holds ``8 · n²`` bytes. Batches with weights are taken for exact populations, which leave nothing to chance.
    """

    higher_is_better = None

    def __init__(self, n: int, **kwargs: Any) -> None:
        super().__init__(hierarchy_update, HierarchySums.parents, torch.zeros(0, n), **kwargs)


class Absorption(FunctionMetric):
    """Absorption of each child feature by a finished SAE whose latents have been matched; see :func:`.functional.absorption`.

    Unlike :func:`.functional.absorption_from_co_firing` exact even where children fire without their parent. ``latent [n]``
    (``tracked_features(...).latent``) and ``parents [n]`` are given once.
    """

    higher_is_better = False
    latent: Tensor
    parents: Tensor

    def __init__(self, latent: Tensor, parents: Tensor, **kwargs: Any) -> None:
        nothing = torch.zeros(0, max(1, int(latent.max()) + 1)), torch.zeros(0, len(parents))
        super().__init__(absorption_update, absorption_compute, *nothing, latent.cpu(), parents.cpu(), **kwargs)
        self.register_buffer("latent", latent.long(), persistent=False)
        self.register_buffer("parents", parents.long(), persistent=False)

    def update(self, codes: Tensor | Codes, features: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch of codes and their features' magnitudes ``[batch, n]``."""
        super().update(codes, features, self.latent, self.parents, weight)
