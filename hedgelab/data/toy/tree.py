"""Firing by a feature tree: a node can fire only where its parent does."""

from __future__ import annotations

import difflib
import itertools
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from hedgelab.data.toy.firing import Firing, check_probability
from hedgelab.errors import UserError, one_line
from hedgelab.plain_yaml import read_yaml

_EXCLUSIVE_SLACK = 1e-9  # so that ten children of .1 are not refused for rounding
_MAX_DEPTH = 100


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
    children: tuple[TreeNode, ...] = ()


_KEYS = tuple(field.name for field in fields(TreeNode))


def parse_tree(raw: object, path: str = "tree") -> TreeNode:
    """Check a tree given as plain mappings and lists, and build it.

    The root's ``probability`` is 1 and its ``is_read_out`` false unless given; other nodes must give a probability.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping with keys such as 'probability', got {_shown(raw)}")
    if path.count(".children[") > _MAX_DEPTH:  # YAML aliases can close a circle
        raise UserError(f"tree: nested deeper than {_MAX_DEPTH} levels; does an alias refer to a node above it?")
    for key in raw:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"valid keys are {', '.join(_KEYS)}"
            raise UserError(f"{path}.{key}: unknown key; {hint}")
    if path == "tree":
        raw = {"probability": 1.0, "is_read_out": False} | raw
    elif "probability" not in raw:
        raise UserError(f"{path}.probability: missing; give the probability that it fires given its parent")

    def number(key: str, default: float) -> float:
        value = raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path}.{key}: expected a number, got {_shown(value)}")
        return float(value)

    def flag(key: str, default: bool) -> bool:
        value = raw.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{path}.{key}: expected true or false, got {_shown(value)}")
        return value

    probability = check_probability(f"{path}.probability", number("probability", 1.0))
    if not 0 < (magnitude := number("magnitude", 1.0)) < math.inf:
        raise UserError(f"{path}.magnitude: must be positive and finite, got {magnitude}")
    if not 0 <= (deviation := number("magnitude_std", 0.0)) < math.inf:
        raise UserError(f"{path}.magnitude_std: must be at least 0 and finite, got {deviation}")
    raw_children: object = raw.get("children", [])
    if not isinstance(raw_children, list):
        raise UserError(f"{path}.children: expected a list of nodes, got {_shown(raw_children)}")
    children = tuple(parse_tree(child, f"{path}.children[{i}]") for i, child in enumerate(raw_children))
    exclusive = flag("mutually_exclusive_children", False)
    total = sum(child.probability for child in children)
    if exclusive and total > 1 + _EXCLUSIVE_SLACK:
        raise UserError(f"{path}.children: probabilities of mutually exclusive children sum to {total:.6g}, above 1")
    return TreeNode(probability, magnitude, deviation, flag("is_read_out", True), exclusive, children)


def load_tree(file: str | Path) -> object:
    """The plain content of a YAML or JSON file."""
    path = Path(file)
    try:
        return read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"data.firing.file: there is no file {path}; the path is relative to {Path.cwd()}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.firing.file: cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"data.firing.file: {path} is neither YAML nor JSON: {one_line(str(error))}") from error


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

    Raises:
        UserError: If both or none are given, the file cannot be read, or the tree is not valid.
    """

    def __init__(self, tree: dict[str, Any] | None = None, file: str | None = None) -> None:
        if file is not None and tree is not None:
            raise UserError("data.firing: give 'tree' or 'file', not both")
        if file is None and tree is None:
            raise UserError("data.firing: needs 'tree' (inline) or 'file' (a YAML or JSON file)")
        self.root = parse_tree(tree if file is None else load_tree(file))
        self._flat = _flatten(self.root)
        self._read_out = [i for i, row in enumerate(self._flat) if row.node.is_read_out]
        self.n = len(self._read_out)
        if not self._read_out:
            raise UserError("tree: has no feature; at least one node below the root must be read out")

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Firing patterns, bool ``[count, n]``, parents before children."""
        uniform = torch.rand(1 + max(row.slot for row in self._flat), count, generator=generator)
        active = torch.empty(len(self._flat), count, dtype=torch.bool)
        for i, row in enumerate(self._flat):
            draw = uniform[row.slot]
            torch.lt(draw, row.low + row.node.probability, out=active[i])
            if row.low > 0:
                active[i] &= draw >= row.low
            if row.parent is not None:
                active[i] &= active[row.parent]
        return active[self._read_out].T.contiguous()

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
        reached: list[float] = []
        for row in self._flat:
            reached.append(row.node.probability * (1.0 if row.parent is None else reached[row.parent]))
        return torch.tensor(reached, dtype=torch.float64)[self._read_out]

    def magnitudes(self) -> Tensor:
        """Magnitude of each read-out node, ``[n]``."""
        return torch.tensor([self._flat[i].node.magnitude for i in self._read_out], dtype=torch.float64)

    def magnitude_spreads(self) -> Tensor:
        """Standard deviation of the magnitude of each read-out node, ``[n]``."""
        return torch.tensor([self._flat[i].node.magnitude_std for i in self._read_out], dtype=torch.float64)


class _Row(NamedTuple):
    """A node in depth-first order; it fires if its parent does and uniform draw ``slot`` is in [low, low + p)."""

    node: TreeNode
    parent: int | None
    slot: int
    low: float


def _flatten(root: TreeNode) -> list[_Row]:
    rows: list[_Row] = []
    slots = itertools.count()

    def visit(node: TreeNode, parent: int | None, slot: int, low: float) -> None:
        index = len(rows)
        rows.append(_Row(node, parent, slot, low))
        shared = next(slots) if node.mutually_exclusive_children else None
        reached = 0.0
        for child in node.children:
            if shared is None:
                visit(child, index, next(slots), 0.0)
            else:
                visit(child, index, shared, reached)
                reached += child.probability

    visit(root, None, next(slots), 0.0)
    return rows


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
