"""Firing where correlated Gaussians exceed thresholds, drawn sparsely: few features of very many fire at a time."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from hedgelab.data.toy.firing import SPARSE_FEATURES, Firing, Magnitudes, true_positions
from hedgelab.data.toy.hierarchy import Hierarchy
from hedgelab.errors import UserError
from hedgelab.kernels.codes import Codes, row_pointers, stable_order
from hedgelab.kernels.products import dots
from hedgelab.seeding import generator as make_generator

_RARE = 0.004  # up to this probability proposals are cheaper than noise for each entry
_HITS = 0.01  # proposals for each entry of a rare feature
_LIMIT = -NormalDist().inv_cdf(-math.expm1(-_HITS))  # entries of lower thresholds fire more often than they are hit
_CHUNK = {"cpu": 2**19, "cuda": 2**26}  # entries of features without parents at once: they should stay in a CPU's cache
_DRAWN = {"cpu": 2**24, "cuda": 2**28}  # entries in all at once


class GaussianFiring(Firing):
    """A feature is a candidate where its Gaussian ``g_i`` exceeds a quantile, and fires if the hierarchy lets it.

    ``g = L eta + sqrt(1 - |L|^2) eps`` with few common factors eta, so that ``corr(g_i, g_j) = L_i . L_j``. Without a
    hierarchy candidates fire. In one, from the roots on: a child is no candidate where its parent is silent, of several
    candidates in a group one survives by lot, and a magnitude may be scaled by the parent's (over its mean).

    Only what can fire is drawn. Given eta, entries are independent, with probabilities p. A *rare* feature's entry is hit
    by a Poisson number of proposals of mean h; each is accepted with probability ``-log(1 - p) / h``, so that none is
    accepted with probability 1 - p, exactly. Entries with p above ``1 - exp(-h)`` are found and drawn one by one.

    Args:
        candidates: Probability that each feature is a candidate, ``[n]``, in [0, 1].
        loadings: L, ``[n, rank]``, rows of norm below 1; None for independent candidates.
        hierarchy: Who needs and excludes whom; None for nobody.
    """

    def __init__(self, candidates: Tensor, loadings: Tensor | None = None, hierarchy: Hierarchy | None = None) -> None:
        self.n, self.hierarchy = len(candidates), hierarchy
        self._elsewhere: dict[torch.device, GaussianFiring] = {}
        self.candidates = candidates.double()
        self.loadings = self.candidates.new_zeros(self.n, 0) if loadings is None else loadings.double()
        unexplained = 1 - self.loadings.square().sum(1)
        if not bool((unexplained > 0).all()):
            raise UserError("data.firing.correlation: rows of loadings must have norms below 1")
        if not bool(((self.candidates >= 0) & (self.candidates <= 1)).all()):
            raise UserError("data.firing.rates: must be probabilities between 0 and 1")
        # Of the factors and a 1, in units of the noise: what noise must exceed is the product of these with the weights.
        weights = torch.cat([self.loadings, torch.special.ndtri(self.candidates)[:, None]], dim=1)
        self._weights = (-weights / unexplained.sqrt()[:, None]).float()
        free = torch.arange(self.n, device=candidates.device) if hierarchy is None else hierarchy.levels[0]
        frequent = self.candidates[free] > _RARE
        self._frequent, self._rare = free[frequent], free[~frequent]

    @property
    def parents(self) -> Tensor | None:
        """Parent of each feature, int64 ``[n]``, -1 for none; None without a hierarchy."""
        return None if self.hierarchy is None else self.hierarchy.parent

    @property
    def stored_per_example(self) -> float:
        """Numbers that hold an example's activations: three (value and 64-bit feature) for each feature that fires."""
        return float(3 * self._if_independent().sum()) if self.n > SPARSE_FEATURES else self.n

    def _if_independent(self) -> Tensor:
        return self.candidates if self.hierarchy is None else self.hierarchy.effective(self.candidates)

    def _on(self, device: torch.device) -> "GaussianFiring":
        """The same on a device; generators of different devices draw different numbers."""
        if device == self.candidates.device:
            return self
        if device not in self._elsewhere:
            hierarchy = None if self.hierarchy is None else self.hierarchy.to(device)
            self._elsewhere[device] = GaussianFiring(self.candidates.to(device), self.loadings.to(device), hierarchy)
        return self._elsewhere[device]

    def rates(self) -> Tensor:
        """Probability that each feature fires, ``[n]``, where no magnitude is 0: exact without a hierarchy or correlation.

        With both, those of children are the mean over 1024 draws of the common factors of the exact rates given these.
        """
        if self.hierarchy is None or not self.loadings.shape[1]:
            return self._if_independent().clone()
        half = torch.randn(512, self.loadings.shape[1], generator=make_generator(0, "rates"))
        factors = _with_one(torch.cat([half, -half]))
        total = torch.zeros_like(self.candidates)
        for some in torch.split(factors, 64):
            given = torch.special.ndtr(-self._weights @ some.T)
            total += self.hierarchy.effective(given).double().sum(1)
        alone = self.hierarchy.levels[0][self.hierarchy.group[self.hierarchy.levels[0]] < 0]
        total /= len(factors)
        total[alone] = self.candidates[alone]
        return total

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Firing patterns, bool ``[count, n]``, where no magnitude is 0."""
        ones = torch.ones(self.n, device=generator.device)
        return self._draw(count, generator, Magnitudes(ones, torch.zeros_like(ones))).to_dense() > 0

    def activations(self, count: int, generator: torch.Generator, magnitudes: Magnitudes) -> Tensor | Codes:
        """True activations ``[count, n]``; a feature whose magnitude is 0 does not fire."""
        codes = self._draw(count, generator, magnitudes)
        return codes if self.n > SPARSE_FEATURES else codes.to_dense()

    def _draw(self, count: int, generator: torch.Generator, magnitudes: Magnitudes) -> Codes:
        factors = torch.randn(count, self.loadings.shape[1], generator=generator, device=generator.device)
        factors, here = _with_one(factors), self._on(generator.device)
        rows, fired = max(1, _DRAWN[factors.device.type] // self.n), []
        for start in range(0, count, rows):
            row, feature, value = here._fired(factors[start : start + rows], generator, magnitudes)
            fired.append((row + start, feature, value))
        row, feature, value = (torch.cat(parts) for parts in zip(*fired, strict=True))
        return Codes.from_csr(row_pointers(row, count), feature, value, self.n)

    def _survivors(
        self, row: Tensor, feature: Tensor, value: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of candidates those that fire: of magnitude above 0, and one by lot of those that exclude each other."""
        fires = value > 0
        if self.hierarchy is not None:
            group = self.hierarchy.group[feature]
            rivals = true_positions(fires & (group >= 0))
            _, rivalry = torch.unique(row[rivals] * self.n + group[rivals], return_inverse=True)
            # The place in the low bits: no two lots are equal.
            places, device = torch.arange(len(rivals), device=row.device), generator.device
            lots = torch.randint(2**31, (len(rivals),), generator=generator, device=device) * 2**32 + places
            best = lots.new_zeros(len(rivals)).scatter_reduce(0, rivalry, lots, "amax")
            fires[rivals] = lots == best[rivalry]
        kept = true_positions(fires)
        return row[kept], feature[kept], value[kept]

    def _fired(self, factors: Tensor, generator: torch.Generator, magnitudes: Magnitudes) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, features and values of what fires, row by row."""
        row, feature = self._free_candidates(factors, generator)
        fired = [self._survivors(row, feature, magnitudes.draw(feature, generator), generator)]
        while self.hierarchy is not None and len(fired[-1][0]):
            row, feature, value = fired[-1]
            entry, feature = _children(feature, *self.hierarchy.children)
            row = row[entry]
            given = dots(row_pointers(row, len(factors)), feature, factors, self._weights)
            fires = _candidates(given, generator)
            row, feature, entry = row[fires], feature[fires], entry[fires]
            draw = magnitudes.draw(feature, generator)
            ratio = value[entry] / magnitudes.mean[self.hierarchy.parent[feature]]
            draw = torch.where(self.hierarchy.scaled[feature], draw * ratio, draw)
            fired.append(self._survivors(row, feature, draw, generator))
        row, feature, value = (torch.cat(parts) for parts in zip(*fired, strict=True))
        order = stable_order(row, len(factors))
        return row[order], feature[order], value[order]

    def _free_candidates(self, factors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows and features of the candidates that have no parent, row by row."""
        found = []
        for features, rare in ((self._frequent, False), (self._rare, True)):
            weights = self._weights[features].T
            rows = min(len(factors), max(1, _CHUNK[factors.device.type] // max(1, len(features))))
            space = factors.new_empty(rows, len(features))
            for start in range(0, len(factors) if len(features) else 0, rows):
                some = factors[start : start + rows]
                given = torch.mm(some, weights, out=space[: len(some)])
                place = _rare_candidates(given, generator) if rare else _candidates(given, generator)
                found.append((place // len(features) + start, features[place % len(features)]))
        row, feature = (torch.cat(parts) for parts in zip(*found, strict=True))
        order = stable_order(row, len(factors))
        return row[order], feature[order]


def _with_one(factors: Tensor) -> Tensor:
    """Factors ``[count, rank]`` and a column of ones."""
    return torch.cat([factors, factors.new_ones(len(factors), 1)], dim=1)


def _candidates(given: Tensor, generator: torch.Generator) -> Tensor:
    """Positions in ``given`` of the entries whose noise exceeds these thresholds."""
    return true_positions(torch.randn(given.shape, generator=generator, device=generator.device) > given)


def _rare_candidates(given: Tensor, generator: torch.Generator) -> Tensor:
    """The same where few do, without noise for each entry (see :class:`GaussianFiring`)."""
    given, device = given.view(-1), generator.device
    mean = torch.tensor(_HITS * len(given), dtype=torch.float64, device=device)
    hits = int(torch.poisson(mean, generator=generator))
    hit = torch.randint(len(given), (hits,), generator=generator, device=device)
    threshold = given.index_select(0, hit)
    wanted = -torch.log1p(-torch.special.ndtr(-threshold))
    chance = torch.rand(hits, generator=generator, dtype=torch.float64, device=device)
    accepted = (_HITS * chance < wanted) & (threshold >= _LIMIT)
    likely = true_positions(given < _LIMIT)
    fires = _candidates(given.index_select(0, likely), generator)
    return torch.cat([torch.unique(hit[accepted]), likely[fires]])


def _children(feature: Tensor, start: Tensor, children: Tensor) -> tuple[Tensor, Tensor]:
    """All children of the given features: the place of each one's parent among these, and the child."""
    count = start[feature + 1] - start[feature]
    entry = torch.repeat_interleave(torch.arange(len(feature), device=feature.device), count)
    first = (start[feature] - count.cumsum(0) + count)[entry]
    return entry, children[first + torch.arange(len(entry), device=feature.device)]
