"""Firing of thousands of correlated features: a Gaussian copula with low-rank correlation and Zipf rates."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hedgelab.data.toy.firing import Firing
from hedgelab.errors import UserError, whole_number
from hedgelab.seeding import generator as make_generator

_Array = NDArray[np.float64]


class CopulaFiring(Firing):
    """Feature i fires where a Gaussian ``g_i`` exceeds the normal quantile that gives it its rate.

    ``g = loadings @ eta + sqrt(1 - |loadings|^2) * eps`` with few common factors eta, so that
    ``corr(g_i, g_j) = loadings_i . loadings_j``: positive and negative correlations, no ``n x n`` matrix anywhere.
    Rates fall by Zipf's law: feature i fires with probability ``min(max_rate, c (i + 1)^-exponent)``.

    In a hierarchy the most frequent features are parents; then comes each parent's block of children in turn, then the rest.
    A child fires only where its parent does; its threshold is the one at which its rate is still that of Zipf's law.

    Args:
        n: Number of features.
        exponent: Of Zipf's law; 0 gives all the same rate.
        max_rate: Rate of the most frequent feature, or a ceiling to all rates where mean_l0 is given.
        mean_l0: Features firing at a time, on average: sets c. None: ``c = max_rate``.
        rank: Number of common factors; random loadings.
        strength: Share of each ``g_i``'s variance that the common factors explain, in [0, 1); 0 is no correlation.
        loadings: Loadings to use instead of random ones, ``[n, rank]``, rows of norm below 1.
        parents: Number of features that have children.
        children_per_parent: Children of each of them.
        structure_seed: Seed of the random loadings; part of the toy's definition, apart from the run's seed.
    """

    def __init__(
        self,
        n: int,
        exponent: float = 1.0,
        max_rate: float = 0.5,
        mean_l0: float | None = None,
        rank: int = 8,
        strength: float = 0.2,
        loadings: list[list[float]] | None = None,
        parents: int = 0,
        children_per_parent: int = 0,
        structure_seed: int = 0,
    ) -> None:
        self.n = whole_number("data.firing.n", n)
        self._parents = whole_number("data.firing.parents", parents, 0)
        self._children = whole_number("data.firing.children_per_parent", children_per_parent, 0)
        whole_number("data.firing.structure_seed", structure_seed, 0)
        if (parents == 0) != (children_per_parent == 0):
            raise UserError("data.firing.children_per_parent: give both it and 'parents', or neither")
        if (hierarchy := parents * (1 + children_per_parent)) > n:
            each = f"{parents} parents with {children_per_parent} children each"
            raise UserError(f"data.firing.parents: {each} are {hierarchy} features, more than n = {n}")
        self._rates = zipf_rates(n, exponent, max_rate, mean_l0)
        random = loadings is None
        self._loadings = _random_loadings(n, rank, strength, structure_seed) if random else _checked(n, loadings or [])
        scale = (1 - self._loadings.square().sum(1)).sqrt()  # in units of the noise, sampling needs no more scaling
        self._scaled_loadings = (self._loadings / scale[:, None]).float()
        self._scaled_thresholds = (torch.from_numpy(self._solve_thresholds()) / scale).float()

    @property
    def parent_of(self) -> list[int | None]:
        """Parent of each feature; None for features without one."""
        children = [k for k in range(self._parents) for _ in range(self._children)]
        return [None] * self._parents + children + [None] * (self.n - self._parents - len(children))

    def rates(self) -> Tensor:
        """Probability that each feature fires, ``[n]``."""
        return torch.from_numpy(self._rates.copy())

    def correlation(self) -> Tensor:
        """Correlation of the underlying Gaussians, ``[n, n]`` float64; to look at, never used in sampling."""
        return (self._loadings @ self._loadings.T).fill_diagonal_(1.0)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Firing patterns, bool ``[count, n]``."""
        factors = torch.randn(count, self._scaled_loadings.shape[1], generator=generator)
        first, last = self._parents, self._parents * (1 + self._children)
        parents = self._fires(factors, slice(0, first), generator)
        others = self._fires(factors, slice(last, self.n), generator)
        children = self._sample_children(factors, parents, slice(first, last), generator)
        return torch.cat([parents, children, others], dim=1)

    def _fires(self, factors: Tensor, features: slice, generator: torch.Generator) -> Tensor:
        """Whether ``g`` of a range of features exceeds their thresholds, ``[count, features]``."""
        thresholds = self._scaled_thresholds[features]
        noise = torch.randn(len(factors), len(thresholds), generator=generator)
        return noise.addmm_(factors, self._scaled_loadings[features].T) > thresholds

    def _sample_children(self, factors: Tensor, parents: Tensor, block: slice, generator: torch.Generator) -> Tensor:
        """Firing of all children, ``[count, parents * children]``; only those of firing parents are drawn at all."""
        shape = (len(factors), self._parents, self._children)
        fires = torch.zeros(shape, dtype=torch.bool)
        if fires.numel():
            rows, parent = parents.nonzero(as_tuple=True)
            threshold = torch.addmm(self._scaled_thresholds[block], factors, self._scaled_loadings[block].T, alpha=-1)
            noise = torch.randn(len(rows), self._children, generator=generator)
            fires[rows, parent] = noise > threshold.view(shape)[rows, parent]
        return fires.view(len(factors), -1)

    def _solve_thresholds(self) -> _Array:
        """Thresholds of every ``g``: quantiles, and for children, by bisection, where P(child and parent) is their rate."""
        from scipy.special import ndtri  # late: scipy is slow to import

        thresholds: _Array = -ndtri(self._rates)
        first, last = self._parents, self._parents * (1 + self._children)
        if last > first:
            parent = np.repeat(np.arange(self._parents), self._children)
            loadings = self._loadings.numpy()
            correlation = (loadings[first:last] * loadings[parent]).sum(1)
            rates = self._rates[first:last]
            low, high = np.full_like(rates, -40.0), np.full_like(rates, 40.0)
            for _ in range(70):
                middle = (low + high) / 2
                too_often = _joint_tail(middle, thresholds[parent], correlation) > rates
                low, high = np.where(too_often, middle, low), np.where(too_often, high, middle)
            thresholds[first:last] = (low + high) / 2
        return thresholds


def zipf_rates(n: int, exponent: float, max_rate: float, mean_l0: float | None) -> _Array:
    """Firing rates ``min(max_rate, c (i + 1)^-exponent)``, ``[n]``, with c set by ``mean_l0`` (None: ``max_rate``)."""
    if not 0 <= exponent < math.inf:
        raise UserError(f"data.firing.exponent: must be at least 0 and finite, got {exponent}")
    if not 0 < max_rate < 1:
        raise UserError(f"data.firing.max_rate: must be between 0 and 1, both excluded, got {max_rate}")
    law: _Array = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    if law[-1] * max_rate < 1e-300:
        raise UserError(f"data.firing.exponent: {exponent} gives feature {n - 1} a rate of zero; lower it")
    if mean_l0 is None:
        return max_rate * law
    if not 0 < mean_l0 < n * max_rate:
        raise UserError(f"data.firing.mean_l0: must be above 0, below n * max_rate = {n * max_rate:.6g}, got {mean_l0}")
    from scipy.optimize import brentq  # late: scipy is slow to import

    low, high = math.log(mean_l0 / n) - 1, math.log(max_rate / law[-1])
    log_c = brentq(lambda log_c: float(np.minimum(max_rate, math.exp(log_c) * law).sum() - mean_l0), low, high)
    return np.minimum(max_rate, math.exp(log_c) * law)


def _random_loadings(n: int, rank: int, strength: float, seed: int) -> Tensor:
    """Loadings of squared norm ``strength`` in uniformly random directions, ``[n, rank]`` float64."""
    whole_number("data.firing.rank", rank)
    if not 0 <= strength < 1:
        raise UserError(f"data.firing.strength: must be at least 0 and below 1, got {strength}")
    directions = torch.randn(n, rank, generator=make_generator(seed, "loadings"), dtype=torch.float64)
    return math.sqrt(strength) * torch.nn.functional.normalize(directions, dim=1)


def _checked(n: int, loadings: list[list[float]]) -> Tensor:
    """Given loadings as a tensor ``[n, rank]`` float64."""
    lengths = sorted({len(row) for row in loadings})
    if len(loadings) != n or len(lengths) != 1 or 0 in lengths:
        got = f"got {len(loadings)} of {lengths} factors"
        raise UserError(f"data.firing.loadings: expected {n} rows of equally many factors, at least one, {got}")
    for i, row in enumerate(loadings):
        if not math.hypot(*row) < 1:
            raise UserError(f"data.firing.loadings[{i}]: norm must be below 1, got {math.hypot(*row):.6g}")
    return torch.tensor(loadings, dtype=torch.float64)


def _joint_tail(h: _Array, k: _Array, correlation: _Array) -> _Array:
    """P(X > h, Y > k) of standard normals with the given correlations, by Owen's T function (Owen 1956)."""
    from scipy.special import ndtr, owens_t  # late: scipy is slow to import

    h, k = (np.where(np.abs(v) < 1e-12, 1e-12, v) for v in (-h, -k))  # P(X < -h, Y < -k); zeros would divide
    root = np.sqrt(1 - correlation**2)
    tails = owens_t(h, (k / h - correlation) / root) + owens_t(k, (h / k - correlation) / root)
    joint: _Array = (ndtr(h) + ndtr(k)) / 2 - tails - 0.5 * (h * k < 0)
    return joint
