"""Metrics that need the true features of each example: detection, hierarchy, absorption."""

from typing import Any

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes
from hedgelab.metrics.additive import AdditiveMetric
from hedgelab.metrics.functional.accumulate import total_weight, weighted_sum
from hedgelab.metrics.functional.detection import CoFiring, co_firing
from hedgelab.metrics.functional.hierarchy import (
    AbsorptionScores,
    AbsorptionSums,
    absorption_compute,
    absorption_update,
    infer_parents,
)
from hedgelab.metrics.functional.sparsity import firing_update
from hedgelab.metrics.functional.true_hedging import RegressionSums, regression_update


class FeatureDetection(AdditiveMetric):
    """How often each latent fires together with each feature.

    Feed the result to :func:`.functional.detection_scores` (precision, recall, F1 of each latent for its feature) or to
    :func:`.functional.absorption_from_co_firing`. Holds ``8 · d_sae · n`` bytes.

    Args:
        d_sae: Number of latents.
        n: Number of features.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = None
    weight: Tensor
    latents: Tensor
    features: Tensor
    both: Tensor

    def __init__(self, d_sae: int, n: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("weight")
        self.add_sum("latents", d_sae)
        self.add_sum("features", n)
        self.add_sum("both", d_sae, n)

    def update(self, codes: Tensor | Codes, features: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch of codes and their features' magnitudes ``[batch, n]``; ``weight``: ``[batch]``."""
        latents, count = firing_update(codes, weight)
        present = weighted_sum(features > 0, weight)
        self.add_to(weight=count, latents=latents, features=present, both=co_firing(codes, features, weight))

    def compute(self) -> CoFiring:
        """Counts over everything seen."""
        return CoFiring(self.weight, self.latents, self.features, self.both)


class FeatureRegression(AdditiveMetric):
    """Sums behind true hedging where features overlap: the regression of true activations on codes.

    Feed the result to :func:`.functional.regressed_hedging`. Holds ``8 · d_sae · (n + d_sae)`` bytes: .7 GB for 4096 latents
    and 16384 features; a batch costs what :class:`FeatureDetection`'s does, and ``batch · d_sae²`` multiplications more.

    Args:
        d_sae: Number of latents.
        n: Number of features.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = None
    examples: Tensor
    weight: Tensor
    codes: Tensor
    features: Tensor
    code_products: Tensor
    products: Tensor

    def __init__(self, d_sae: int, n: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("examples")
        self.add_sum("weight", 2)
        self.add_sum("codes", 2, d_sae)
        self.add_sum("features", 2, n)
        self.add_sum("code_products", d_sae, d_sae)
        self.add_sum("products", 2, d_sae, n, dtype=torch.float32)

    def update(self, codes: Tensor | Codes, features: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch of latents and their features' magnitudes ``[batch, n]``; ``weight``: ``[batch]``."""
        self.add_to(**regression_update(codes, features, weight)._asdict())

    def compute(self) -> RegressionSums:
        """Sums over everything seen."""
        return RegressionSums(*(getattr(self, name) for name in RegressionSums._fields))


class FeatureHierarchy(AdditiveMetric):
    """Which feature is whose parent, inferred from firing; see :func:`.functional.infer_parents`.

    Holds ``8 · n²`` bytes. Batches with weights are taken for exact populations, which leave nothing to chance.

    Args:
        n: Number of features.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = None
    weight: Tensor
    both: Tensor
    weighted_batches: Tensor

    def __init__(self, n: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("weight")
        self.add_sum("both", n, n)
        self.add_sum("weighted_batches")

    def update(self, features: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch of magnitudes ``[batch, n]``; ``weight``: ``[batch]``."""
        both = co_firing(Codes.from_dense(features), features, weight)
        self.add_to(weight=total_weight(features, weight), both=both)
        if weight is not None:
            self.weighted_batches += 1

    def compute(self) -> Tensor:
        """Parent of each feature, ``[n]`` int64; -1 for none."""
        return infer_parents(self.both, self.weight, exact=bool(self.weighted_batches > 0))


class Absorption(AdditiveMetric):
    """Absorption of each child feature by a finished SAE whose latents have been matched.

    Unlike :func:`.functional.absorption_from_co_firing` exact even where children fire without their parent.

    Args:
        latent: The latent that tracks each feature, ``[n]`` int64; -1 for none (``tracked_features(...).latent``).
        parents: Parent of each feature, ``[n]`` int64; -1 for none.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    higher_is_better = False
    latent: Tensor
    parents: Tensor
    with_child: Tensor
    missed_with_child: Tensor
    without_child: Tensor
    missed_without_child: Tensor

    def __init__(self, latent: Tensor, parents: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("latent", latent.to(torch.long), persistent=False)
        self.register_buffer("parents", parents.to(torch.long), persistent=False)
        for name in AbsorptionSums._fields:
            self.add_sum(name, parents.shape[0])

    def update(self, codes: Tensor | Codes, features: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch of codes and their features' magnitudes ``[batch, n]``; ``weight``: ``[batch]``."""
        self.add_to(**absorption_update(codes, features, self.latent, self.parents, weight)._asdict())

    def compute(self) -> AbsorptionScores:
        """Scores over everything seen."""
        return absorption_compute(
            AbsorptionSums(self.with_child, self.missed_with_child, self.without_child, self.missed_without_child)
        )
