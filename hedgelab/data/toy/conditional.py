"""Firing by conditional tables: each feature's probability given the features before it."""

import math
import re

import torch
from torch import Tensor

from hedgelab.data.toy.firing import Firing, all_patterns, check_probability, pattern_numbers
from hedgelab.errors import UserError

_TERM = re.compile(r"(not )?f(\d+)")
_MAX_PARENTS = 16


class ConditionalFiring(Firing):
    """Each feature fires with a probability that depends on which of the features before it fire.

    Args:
        features: One entry a feature, in order. A number is a probability that depends on nothing. A table gives conditional
            probabilities: its keys say which earlier features fire (``f0``, ``not f0``, ``f0 and not f1``, counted from 0) or
            ``otherwise``, which stands for every case not named: ``[0.25, {f0: 0.2, otherwise: 0}]`` lets f1 fire only with f0.
    """

    def __init__(self, features: list[float | dict[str, float]]) -> None:
        if not features:
            raise UserError("data.firing.features: needs at least one feature")
        self.n = len(features)
        self._tables = [_parse(f"data.firing.features[{i}]", i, feature) for i, feature in enumerate(features)]

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Firing patterns, bool ``[count, n]``, each feature drawn after its parents."""
        uniform = torch.rand(self.n, count, generator=generator)
        states = torch.empty(self.n, count, dtype=torch.bool)
        for i, (parents, table) in enumerate(self._tables):
            case = torch.zeros(count if parents else 1, dtype=torch.int32)
            for bit, parent in enumerate(parents):
                case.add_(states[parent], alpha=1 << bit)
            torch.lt(uniform[i], table.float().index_select(0, case), out=states[i])
        return states.T.contiguous()

    def pattern_probabilities(self) -> Tensor:
        """Probability of each pattern: the product of the tables' entries, ``[2**n]``."""
        patterns = all_patterns(self.n)
        product = torch.ones(len(patterns), dtype=torch.float64)
        for i, (parents, table) in enumerate(self._tables):
            fires = table[pattern_numbers(patterns[:, parents])]
            product *= torch.where(patterns[:, i], fires, 1 - fires)
        return product


class CorrelatedPair(ConditionalFiring):
    """Two features whose rates stay fixed while their correlation varies.

    Args:
        rates: P(f0) and P(f1), both between 0 and 1 (exclusive).
        correlation: Pearson's correlation of the two firings, ``Cov / sqrt(Var f0 · Var f1)``.
    """

    def __init__(self, rates: list[float], correlation: float) -> None:
        if len(rates) != 2 or not all(0 < check_probability("data.firing.rates", rate) < 1 for rate in rates):
            raise UserError(f"data.firing.rates: expected two probabilities between 0 and 1 (exclusive), got {rates}")
        first, second = rates
        deviations = math.sqrt(first * (1 - first) * second * (1 - second))
        low = (max(0.0, first + second - 1) - first * second) / deviations
        high = (min(first, second) - first * second) / deviations
        if not low - 1e-12 <= correlation <= high + 1e-12:
            possible = f"features of rates {first:g} and {second:g} have correlations between {low:.4g} and {high:.4g}"
            raise UserError(f"data.firing.correlation: {possible}, got {correlation:g}")
        both = first * second + correlation * deviations
        given, otherwise = (min(1.0, max(0.0, p)) for p in (both / first, (second - both) / (1 - first)))
        super().__init__([first, {"f0": given, "not f0": otherwise}])


def _parse(key: str, index: int, feature: float | dict[str, float]) -> tuple[list[int], Tensor]:
    """Parents of a feature, and its probability given each of their patterns, ``[2**len(parents)]``."""
    if not isinstance(feature, dict):
        return [], torch.tensor([check_probability(key, feature)], dtype=torch.float64)
    cases = {name: _parse_case(f"{key}['{name}']", index, name) for name in feature if name != "otherwise"}
    parents = sorted({parent for case in cases.values() for parent in case})
    if not parents:
        raise UserError(f"{key}: a table needs a case such as 'f0'; for an unconditional probability give a number")
    if len(parents) > _MAX_PARENTS:
        raise UserError(f"{key}: depends on {len(parents)} features; at most {_MAX_PARENTS} are possible")
    patterns = all_patterns(len(parents))
    table = torch.full((len(patterns),), torch.nan, dtype=torch.float64)
    for name, case in cases.items():
        columns = [parents.index(parent) for parent in case]
        matching = (patterns[:, columns] == torch.tensor(list(case.values()))).all(1)
        if bool((matching & ~table.isnan()).any()):
            raise UserError(f"{key}['{name}']: overlaps another case of the table; every case must be told apart")
        table[matching] = check_probability(f"{key}['{name}']", feature[name])
    if "otherwise" in feature:
        table[table.isnan()] = check_probability(f"{key}['otherwise']", feature["otherwise"])
    elif bool(table.isnan().any()):
        missing = patterns[table.isnan()][0].tolist()
        case_name = " and ".join(f"{'' if fires else 'not '}f{p}" for p, fires in zip(parents, missing, strict=True))
        raise UserError(f"{key}: no probability for the case '{case_name}'; name it, or add 'otherwise'")
    return parents, table


def _parse_case(key: str, index: int, name: str) -> dict[int, bool]:
    """Which earlier feature must fire (True) or be silent (False), from ``f0 and not f1``."""
    terms = [_TERM.fullmatch(term.strip()) for term in name.split(" and ")]
    case = {int(term[2]): term[1] is None for term in terms if term is not None}
    if len(case) < len(terms):
        cases = "'f0', 'not f0', 'f0 and not f1' or 'otherwise'"
        raise UserError(f"{key}: expected a case such as {cases}, each feature once")
    if (last := max(case)) >= index:
        raise UserError(f"{key}: feature {index} can depend only on features before it, not on f{last}")
    return case
