"""Firing by a feature tree: a node can fire only where its parent does."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hedgelab.config.names import suggest
from hedgelab.config.tree import load
from hedgelab.data.toy.firing import Firing, check_probability
from hedgelab.errors import UserError

_EXCLUSIVE_SLACK = 1e-9  # so that ten children of .1 are not refused for rounding
_NUMBER, _FLAG, _NODES = ((int, float), "a number"), (bool, "true or false"), (list, "a list of nodes")
_KINDS: dict[str, tuple[Any, str]] = {
    "probability": _NUMBER, "magnitude": _NUMBER, "magnitude_std": _NUMBER, "is_read_out": _FLAG,
    "mutually_exclusive_children": _FLAG, "children": _NODES,
}  # fmt: skip


@dataclass(frozen=True)
class TreeNode:
    """A node of a feature tree.

    Attributes:
        probability: That it fires given that its parent does.
        magnitude: Mean activation along its direction when it fires.
        magnitude_std: Standard deviation of that before the ReLU.
        is_read_out: Whether it is a feature with a direction of its own; if not, it only gates its children.
        mutually_exclusive_children: Whether at most one of its children fires at a time.
        children: The nodes below.
    """

    probability: float
    magnitude: float = 1.0
    magnitude_std: float = 0.0
    is_read_out: bool = True
    mutually_exclusive_children: bool = False
    children: tuple["TreeNode", ...] = ()


def parse_tree(raw: object, path: str = "tree") -> TreeNode:
    """Build a tree of plain mappings; the root's ``probability`` is 1 and ``is_read_out`` false, unless given."""
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping with keys such as 'probability', got {_shown(raw)}")
    given: dict[str, Any] = {"probability": 1.0, "is_read_out": False} | raw if path == "tree" else dict(raw)
    for key, value in given.items():
        if key not in _KINDS:
            raise UserError(f"{path}.{key}: unknown key; {suggest(str(key), _KINDS)}")
        kind, words = _KINDS[key]
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise UserError(f"{path}.{key}: expected {words}, got {_shown(value)}")
        given[key] = float(value) if (kind, words) == _NUMBER else value
    if "probability" not in given:
        raise UserError(f"{path}.probability: missing; give the probability that it fires given its parent")
    children = (parse_tree(child, f"{path}.children[{i}]") for i, child in enumerate(given.pop("children", [])))
    node = TreeNode(**given, children=tuple(children))
    check_probability(f"{path}.probability", node.probability)
    if not 0 < node.magnitude < math.inf:
        raise UserError(f"{path}.magnitude: must be positive and finite, got {node.magnitude}")
    if not 0 <= node.magnitude_std < math.inf:
        raise UserError(f"{path}.magnitude_std: must be at least 0 and finite, got {node.magnitude_std}")
    total = sum(child.probability for child in node.children)
    if node.mutually_exclusive_children and total > 1 + _EXCLUSIVE_SLACK:
        raise UserError(f"{path}.children: probabilities of mutually exclusive children sum to {total:.6g}, above 1")
    return node


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r}" if value is not None else "nothing"


class TreeFiring(Firing):
    """Features of a tree, numbered depth first: a node fires with its probability where its parent fires.

    Mutually exclusive siblings share one draw: each fires with exactly its own probability, never two at once.

    Args:
        tree: The root as a mapping: ``probability``, ``magnitude``, ``magnitude_std``, ``is_read_out``,
            ``mutually_exclusive_children``, ``children`` (a list of nodes of the same form). The root always fires
            and is not read out unless it says so.
        file: A YAML or JSON file with such a mapping, relative to the working directory; instead of ``tree``.
    """

    def __init__(self, tree: dict[str, Any] | None = None, file: str | None = None) -> None:
        if (tree is None) == (file is None):
            raise UserError("data.firing: needs either 'tree' (inline) or 'file' (a YAML or JSON file)")
        self.root = parse_tree(tree if file is None else load(Path(file), "data.firing.file"))
        self._features = list(_features(self.root, 1.0))
        self.n = len(self._features)
        if not self._features:
            raise UserError("tree: has no feature; at least one node below the root must be read out")

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Firing patterns, bool ``[count, n]``, parents before children."""
        draws = iter(torch.rand(1 + _draws_below(self.root), count, generator=generator))
        everywhere = torch.ones(count, dtype=torch.bool)
        return torch.stack(list(_sample(self.root, everywhere, next(draws), 0.0, draws))).T.contiguous()

    def pattern_probabilities(self) -> Tensor:
        """Probability of each pattern, ``[2**n]``."""
        table = torch.zeros(2**self.n, dtype=torch.float64)
        patterns, _ = _firing_patterns(self.root, 0)
        for mask, probability in patterns.items():
            table[mask] = self.root.probability * probability
        table[0] += 1 - self.root.probability
        return table

    def rates(self) -> Tensor:
        """Probability that each feature fires: the product along its path from the root, ``[n]``."""
        return torch.tensor([rate for _, rate in self._features], dtype=torch.float64)

    def magnitudes(self) -> Tensor:
        """Magnitude of each read-out node, ``[n]``."""
        return torch.tensor([node.magnitude for node, _ in self._features], dtype=torch.float64)

    def magnitude_spreads(self) -> Tensor:
        """Standard deviation of the magnitude of each read-out node, ``[n]``."""
        return torch.tensor([node.magnitude_std for node, _ in self._features], dtype=torch.float64)


def _features(node: TreeNode, parent_rate: float) -> Iterator[tuple[TreeNode, float]]:
    """The read-out nodes of a subtree, depth first, and how often they fire."""
    rate = node.probability * parent_rate
    if node.is_read_out:
        yield node, rate
    for child in node.children:
        yield from _features(child, rate)


def _draws_below(node: TreeNode) -> int:
    """How many uniform draws decide which nodes below one fire: one each, or one for all that exclude each other."""
    return (1 if node.mutually_exclusive_children else len(node.children)) + sum(map(_draws_below, node.children))


def _sample(node: TreeNode, parent: Tensor, draw: Tensor, low: float, draws: Iterator[Tensor]) -> Iterator[Tensor]:
    """Where the read-out nodes of a subtree fire: where their parent does and their draw is in [low, low + probability)."""
    fires = (draw < low + node.probability) & parent
    if low > 0:
        fires &= draw >= low
    if node.is_read_out:
        yield fires
    shared, low = next(draws) if node.mutually_exclusive_children else None, 0.0
    for child in node.children:
        yield from _sample(child, fires, next(draws) if shared is None else shared, low, draws)
        low += 0.0 if shared is None else child.probability


def _firing_patterns(node: TreeNode, first_bit: int) -> tuple[dict[int, float], int]:
    """Patterns of a node's subtree given that the node fires, as bit masks, and the next free bit."""
    own, bit = (1 << first_bit, first_bit + 1) if node.is_read_out else (0, first_bit)
    below = {0: 1.0}
    if node.mutually_exclusive_children:
        silent = 1 - sum(child.probability for child in node.children)
        below = {0: silent} if silent > _EXCLUSIVE_SLACK else {}
    for child in node.children:
        branch, bit = _firing_patterns(child, bit)
        fires = {mask: child.probability * p for mask, p in branch.items()}
        if node.mutually_exclusive_children:
            for mask, p in fires.items():
                below[mask] = below.get(mask, 0.0) + p
        else:
            fires[0] = fires.get(0, 0.0) + 1 - child.probability
            below = {mask | more: p * q for mask, p in below.items() for more, q in fires.items()}
    return {own | mask: p for mask, p in below.items()}, bit
