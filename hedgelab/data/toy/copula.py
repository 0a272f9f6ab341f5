"""Firing of thousands of correlated features: a Gaussian copula of low rank, given rates, and a hierarchy over it."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from hedgelab.data.toy.gaussian import GaussianFiring
from hedgelab.data.toy.hierarchy import Forest
from hedgelab.data.toy.laws import Law
from hedgelab.errors import UserError, positive, whole_number

_LARGEST_SQUARED_NORM = 0.99  # of a row of loadings, as in SAELens: some noise of its own is left to each feature
_RATES = "rates: {class_path: Zipf, init_args: {exponent: …, largest: …, total: …}}"
_CORRELATION = "correlation: {class_path: LowRankCorrelation, init_args: {rank: …, strength: …}}"
_HIERARCHY = "hierarchy: {class_path: Forest, init_args: {roots: …, branching: …, depth: 1, mutually_exclusive: false}}"
_SEED_OF_LOADINGS = 4  # what SAELens adds to a model's seed for them: the same seed gives the same loadings


class LowRankCorrelation:
    """Random loadings on few common factors: give their ``scale``, or the ``strength`` of correlation.

    Args:
        rank: Number of common factors.
        scale: Standard deviation of independent normal loadings; rows whose squared norm exceeds .99 are shortened to it.
        strength: Share of each feature's variance that the factors explain, the same for all, in [0, 1), in random directions.
    """

    def __init__(self, rank: int, scale: float | None = None, strength: float | None = None) -> None:
        self.rank = whole_number("data.firing.correlation.rank", rank)
        if (scale is None) == (strength is None):
            raise UserError("data.firing.correlation.scale: give either it or strength")
        if strength is not None and not 0 <= strength < 1:
            raise UserError(f"data.firing.correlation.strength: must be at least 0 and below 1, got {strength}")
        self.scale = scale if scale is None else positive("data.firing.correlation.scale", scale, True)
        self.strength = strength

    def loadings(self, n: int, seed: int) -> Tensor:
        """Loadings of n features, float64 ``[n, rank]``."""
        normal = torch.randn(n, self.rank, generator=torch.Generator().manual_seed(seed + _SEED_OF_LOADINGS)).double()
        if self.scale is None:
            directions: Tensor = torch.nn.functional.normalize(normal, dim=1)
            return directions * math.sqrt(self.strength or 0.0)
        loadings: Tensor = self.scale * normal
        norms = torch.linalg.vector_norm(loadings, dim=1, keepdim=True)
        excess = torch.clamp(norms / math.sqrt(_LARGEST_SQUARED_NORM), min=1.0)
        return torch.div(loadings, excess)


class CopulaFiring(GaussianFiring):
    """Many features with given rates, correlated through a few common factors, in a hierarchy or none.

    SynthSAEBench-16k (Chanin & Garriga-Alonso 2026, arXiv 2602.14687) is ``n = 16384``, ``Zipf(.5, .4, 5e-4)``,
    ``LowRankCorrelation(25, scale=.1)``, ``Forest(128, 4, 3, scale_children=True)`` and ``structure_seed = 42``: SAELens' own
    loadings.

    In a hierarchy ``rates`` are what compensation aims at, and :meth:`rates` says what comes of it. Where siblings have
    room below their parent the two agree within a few percent. In SynthSAEBench-16k they do not: the rates of four siblings
    add up to more than their parent's, so that of what is asked for the median child gets .67, grandchild .42 and leaf .34,
    and 34.7 features fire at a time instead of 59.

    >>> from hedgelab.data.toy.laws import Zipf
    >>> CopulaFiring(3, Zipf(exponent=1, largest=0.6)).rates().tolist()
    [0.6, 0.3, 0.19999999999999998]

    Args:
        n: Number of features.
        rates: Probability that each feature fires.
        correlation: Correlation of the Gaussians behind the firing; None: features are independent.
        hierarchy: Trees of features; None: every feature fires by itself.
        structure_seed: Seed of the random loadings; part of the toy's definition, apart from the run's seed.
    """

    former_arguments: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("exponent", "max_rate", "mean_l0"), _RATES),
        **dict.fromkeys(("rank", "strength", "loadings"), _CORRELATION),
        **dict.fromkeys(("parents", "children_per_parent"), _HIERARCHY),
    }
    """What releases up to 0.2 had, and what says it now."""

    def __init__(
        self,
        n: int,
        rates: Law,
        correlation: LowRankCorrelation | None = None,
        hierarchy: Forest | None = None,
        structure_seed: int = 0,
    ) -> None:
        whole_number("data.firing.n", n)
        whole_number("data.firing.structure_seed", structure_seed, 0)
        candidates = rates.values(n)
        possible = (candidates > 0) & (candidates <= 1)
        if not bool(possible.all()):
            wrong = float(candidates[~possible][0])
            raise UserError(f"data.firing.rates: must be above 0 and at most 1 for every feature, got {wrong:.6g}")
        forest = None if hierarchy is None else hierarchy.over(n)
        if hierarchy is not None and forest is not None and hierarchy.compensate:
            candidates = forest.compensated(candidates)
        super().__init__(candidates, None if correlation is None else correlation.loadings(n, structure_seed), forest)
