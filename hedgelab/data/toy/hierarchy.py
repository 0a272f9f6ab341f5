"""Hierarchies of features: children fire only where their parent does, and siblings may exclude each other."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hedgelab.errors import UserError, whole_number


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """A forest over n features, given by arrays.

    Attributes:
        parent: Parent of each feature, int64 ``[n]``; -1 for features without one.
        group: Number (below n) of the features that exclude each other, int64 ``[n]``; -1: none. Members share their parent.
        scaled: Whether a feature's magnitude is multiplied by its parent's over the parent's mean, bool ``[n]``.
    """

    parent: Tensor
    group: Tensor
    scaled: Tensor

    def to(self, device: torch.device) -> "Hierarchy":
        """The same on another device."""
        return Hierarchy(self.parent.to(device), self.group.to(device), self.scaled.to(device))

    @cached_property
    def levels(self) -> list[Tensor]:
        """Features by depth, roots and features without a tree first; a UserError where parents go round in a circle."""
        depth, missing = torch.zeros_like(self.parent), self.parent >= 0
        ancestor = self.parent.clone()
        for _ in range(len(self.parent)):
            if not bool(missing.any()):
                return [(depth == level).nonzero().squeeze(1) for level in range(int(depth.max()) + 1)]
            depth[missing] += 1
            ancestor[missing] = self.parent[ancestor[missing]]
            missing = ancestor >= 0
        raise UserError("data.firing.hierarchy: some feature is its own ancestor")

    @cached_property
    def children(self) -> tuple[Tensor, Tensor]:
        """Where each feature's children start ``[n + 1]``, and the children one after the other."""
        order = self.parent.argsort(stable=True)[int((self.parent < 0).sum()) :]
        start = self.parent.new_zeros(len(self.parent) + 1)
        start[1:] = torch.bincount(self.parent[order], minlength=len(self.parent)).cumsum(0)
        return start, order

    def compensated(self, rates: Tensor) -> Tensor:
        """Probabilities of candidates that make up, roughly, for what the hierarchy takes away; ``[n]``, at most 1.

        ``rate / parent's rate``, times ``1 + sum of other siblings' rates / parent's rate`` where siblings exclude each other:
        the formula of SAELens (``compute_probability_correction_factors``), so that toys are those of SynthSAEBench
        (Chanin & Garriga-Alonso 2026, arXiv 2602.14687). It takes firings as independent, and exclusion to first order.
        """
        above = torch.where(self.parent >= 0, rates[self.parent.clamp(min=0)], 1.0)
        grouped = self.group >= 0
        total = _sums(self.group, rates)
        factor = torch.where(grouped, 1 + (total - rates).clamp(min=0) / above, 1.0)
        return (rates / above * factor).clamp(max=1.0)

    def effective(self, candidates: Tensor) -> Tensor:
        """How often features fire whose candidates are independent with the given probabilities, ``[n, ...]``.

        A child fires with its parent's rate × its candidates' rate × E[1 / (1 + K)], K other siblings being candidates:
        the integral over u in [0, 1] of the product over these of ``1 - p (1 - u)``, by a quadrature that is exact.
        """
        rates = candidates.clone()
        exclusive = (self.group >= 0).nonzero().squeeze(1)
        if len(exclusive):
            group, rivals = self.group[exclusive], candidates[exclusive]
            share = torch.zeros_like(rivals)
            nodes = (int(torch.bincount(group).max()) + 1) // 2
            for x, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
                silent = (1 - rivals * (1 - x) / 2).log()
                share += weight / 2 * (_sums(group, silent) - silent).exp()
            rates[exclusive] *= share
        for level in self.levels[1:]:
            rates[level] *= rates[self.parent[level]]
        return rates


def _sums(group: Tensor, values: Tensor) -> Tensor:
    """The sum of ``values [n, ...]`` over each feature's group, ``[n, ...]``; those of no group (-1) count as one."""
    sums = values.new_zeros(int(group.max()) + 2, *values.shape[1:]).index_add(0, group + 1, values)
    return sums[group + 1]


class Forest:
    """Trees of equal shape, numbered breadth-first: all roots, then the children of root 0, of root 1, …, then the next depth.

    The features that come after the last tree's leaves have no tree.

    Args:
        roots: Number of trees.
        branching: Children of each feature that has any.
        depth: Generations below the roots.
        mutually_exclusive: Whether siblings exclude each other: of those that would fire, one does, by lot.
        scale_children: Whether a child's magnitude is multiplied by its parent's, over the parent's mean magnitude.
        compensate: Whether firing probabilities are raised for what the hierarchy takes away (:meth:`Hierarchy.compensated`).
    """

    def __init__(
        self,
        roots: int,
        branching: int,
        depth: int = 1,
        mutually_exclusive: bool = True,
        scale_children: bool = False,
        compensate: bool = True,
    ) -> None:
        self.roots = whole_number("data.firing.hierarchy.roots", roots)
        self.branching = whole_number("data.firing.hierarchy.branching", branching)
        self.depth = whole_number("data.firing.hierarchy.depth", depth)
        self.mutually_exclusive, self.scale_children = mutually_exclusive, scale_children
        self.compensate = compensate

    def over(self, n: int) -> Hierarchy:
        """The hierarchy of n features.

        >>> Forest(roots=2, branching=2).over(7).parent.tolist()
        [-1, -1, 0, 0, 1, 1, -1]
        """
        size = self.roots * sum(self.branching**level for level in range(self.depth + 1))
        if size > n:
            raise UserError(f"data.firing.hierarchy: the trees hold {size} features, more than n = {n}")
        number = torch.arange(n)
        parent = torch.where((number >= self.roots) & (number < size), (number - self.roots) // self.branching, -1)
        group = parent if self.mutually_exclusive and self.branching > 1 else torch.full_like(parent, -1)
        return Hierarchy(parent, group, (parent >= 0) & self.scale_children)
