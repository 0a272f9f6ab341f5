"""Hierarchies as arrays: numbering, compensation and effective rates against enumeration by hand."""

from itertools import product

import pytest
import torch

from hedgelab.data.toy import Forest, Hierarchy
from hedgelab.errors import UserError


def test_forests_are_numbered_breadth_first():
    forest = Forest(2, 2, 2).over(16)
    assert forest.parent.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, -1, -1]
    assert forest.group.tolist() == forest.parent.tolist()
    assert [level.tolist() for level in forest.levels] == [[0, 1, 14, 15], [2, 3, 4, 5], list(range(6, 14))]
    start, children = forest.children
    assert [children[start[i] : start[i + 1]].tolist() for i in (0, 1, 5, 6)] == [[2, 3], [4, 5], [12, 13], []]
    assert not bool(forest.scaled.any())
    apart = Forest(2, 2, 1, mutually_exclusive=False, scale_children=True).over(6)
    assert apart.group.tolist() == [-1] * 6
    assert apart.scaled.tolist() == [False] * 2 + [True] * 4


def test_compensation_by_hand():
    """Rates .4; .1, .2 exclusive below it: .1/.4 (1 + .2/.4) and .2/.4 (1 + .1/.4); then .09 and .08 of .1: clamped at 1."""
    rates = torch.tensor([0.4, 0.1, 0.2, 0.09, 0.08, 0.01, 0.02, 0.3], dtype=torch.float64)
    candidates = Forest(1, 2, 2).over(8).compensated(rates)
    expected = [0.4, 0.375, 0.625, 1.0, 1.0, 0.05 * 1.1, 0.1 * 1.05, 0.3]
    assert candidates.tolist() == pytest.approx(expected)
    alone = Forest(1, 2, 2, mutually_exclusive=False).over(8).compensated(rates)
    assert alone.tolist() == pytest.approx([0.4, 0.25, 0.5, 0.9, 0.8, 0.05, 0.1, 0.3])


def test_effective_rates_are_those_of_all_outcomes():
    """Root, four exclusive children, a grandchild below each of two of them, and two exclusive roots apart."""
    parent = torch.tensor([-1, 0, 0, 0, 0, 1, 2, -1, -1])
    group = torch.tensor([-1, 0, 0, 0, 0, -1, -1, 3, 3])
    p = torch.tensor([0.6, 0.9, 0.5, 1.0, 0.2, 0.7, 0.4, 0.3, 0.8], dtype=torch.float64)
    expected = torch.zeros(9, dtype=torch.float64)
    for outcome in product([0, 1], repeat=9):
        fires = torch.tensor(outcome)
        chance = torch.where(fires == 1, p, 1 - p).prod()
        mean = torch.zeros(9, dtype=torch.float64)
        for i in range(9):  # mean firing given the candidates, top down
            rivals = fires[group == group[i]].sum() if group[i] >= 0 else 1
            mean[i] = float(fires[i]) / max(int(rivals), 1) * (1 if parent[i] < 0 else mean[parent[i]])
        expected += chance * mean
    hierarchy = Hierarchy(parent, group, torch.zeros(9, dtype=torch.bool))
    assert hierarchy.effective(p).tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    pairs = hierarchy.effective(torch.stack([p, p / 2], 1))
    assert torch.allclose(pairs[:, 0], expected)


def test_circles_and_trees_that_do_not_fit_are_refused():
    circle = Hierarchy(torch.tensor([1, 0]), torch.tensor([-1, -1]), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(UserError, match="its own ancestor"):
        _ = circle.levels
    with pytest.raises(UserError, match=r"data\.firing\.hierarchy: the trees hold 15 features, more than n = 14"):
        Forest(5, 2).over(14)
    with pytest.raises(UserError, match=r"data\.firing\.hierarchy\.roots: expected a whole number of at least 1"):
        Forest(0, 2)
