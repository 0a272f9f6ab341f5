"""Modifiers: changes, applied in order, that correlate a simpler firing distribution."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from hedgelab.data.toy.firing import Firing, all_patterns, check_probability, pattern_numbers
from hedgelab.errors import UserError, whole_number


class Modifier(ABC):
    """A random change of firing patterns; ``naming`` lists the arguments that name features, one or a list each."""

    naming: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def apply(self, states: Tensor, generator: torch.Generator) -> None:
        """Change firing patterns, bool ``[count, n]``, in place."""

    @abstractmethod
    def outcomes(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What can become of patterns ``[m, n]``: new patterns ``[m, n]`` and their probabilities ``[m]``, sum 1."""


class _Triggered(Modifier):
    """When one feature fires, another is forced into a state."""

    naming = ("trigger", "target")
    _forced_state: bool

    def __init__(self, trigger: int, target: int, probability: float = 1.0) -> None:
        if trigger == target:
            raise UserError(f"data.firing.modifiers.target: must differ from trigger, both are {trigger}")
        check_probability("data.firing.modifiers.probability", probability)
        self.trigger, self.target, self.probability = trigger, target, probability

    def apply(self, states: Tensor, generator: torch.Generator) -> None:
        """Force the state where the trigger fires and chance has it."""
        hit = states[:, self.trigger] & (torch.rand(len(states), generator=generator) < self.probability)
        states[hit, self.target] = self._forced_state

    def outcomes(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The forced patterns, and the unchanged ones."""
        hit = self.probability * states[:, self.trigger].double()
        forced = states.clone()
        forced[:, self.target] = self._forced_state
        yield forced, hit
        yield states, 1 - hit


class Cooccurrence(_Triggered):
    """When ``trigger`` fires, ``target`` fires too with at least ``probability``.

    Args:
        trigger: Feature that draws the other along, counted from 0.
        target: Feature that is drawn along.
        probability: How often it is.
    """

    _forced_state = True


class Suppression(_Triggered):
    """When ``trigger`` fires, ``target`` is silenced with ``probability``.

    Args:
        trigger: Feature that silences the other, counted from 0.
        target: Feature that is silenced.
        probability: How often it is.
    """

    _forced_state = False


class MutualExclusion(Modifier):
    """At most one of the features fires: of those that would, one survives, each with equal chance.

    Args:
        features: The features that exclude one another, counted from 0.
    """

    naming = ("features",)

    def __init__(self, features: list[int]) -> None:
        if len(set(features)) != len(features) or len(features) < 2:
            raise UserError(f"data.firing.modifiers.features: needs two or more different features, got {features}")
        self.features = features

    def apply(self, states: Tensor, generator: torch.Generator) -> None:
        """Draw lots among those that fire."""
        members = states[:, self.features]
        lots = torch.rand(members.shape, generator=generator).masked_fill_(~members, -1.0)
        survivor = torch.zeros_like(members).scatter_(1, lots.argmax(1, keepdim=True), True)
        states[:, self.features] = members & survivor

    def outcomes(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """One outcome for each possible survivor, and one for patterns in which none fires."""
        members = states[:, self.features]
        firing = members.sum(1)
        for i, feature in enumerate(self.features):
            alone = states.clone()
            alone[:, self.features] = False
            alone[:, feature] = True
            yield alone, members[:, i].double() / firing.clamp(min=1)
        yield states, (firing == 0).double()


class ParentChild(Modifier):
    """Children fire only where their parent fires.

    Args:
        parent: The parent feature, counted from 0.
        children: Features that are silenced where the parent is silent.
    """

    naming = ("parent", "children")

    def __init__(self, parent: int, children: list[int]) -> None:
        if not children or parent in children:
            raise UserError(f"data.firing.modifiers.children: needs features other than parent {parent}: {children}")
        self.parent, self.children = parent, children

    def apply(self, states: Tensor, generator: torch.Generator | None) -> None:
        """Silence the children of silent parents; nothing is drawn."""
        states[:, self.children] &= states[:, [self.parent]]

    def outcomes(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The one outcome."""
        silenced = states.clone()
        self.apply(silenced, None)
        yield silenced, torch.ones(len(states), dtype=torch.float64)


class ModifiedFiring(Firing):
    """A firing distribution changed by modifiers, one after the other.

    Args:
        base: The distribution to start from.
        modifiers: What to change, in order; later ones see what earlier ones did.
    """

    def __init__(self, base: Firing, modifiers: list[Modifier]) -> None:
        for i, modifier in enumerate(modifiers):
            for name in modifier.naming:
                key, value = f"data.firing.modifiers[{i}].{name}", getattr(modifier, name)
                for feature in value if isinstance(value, list) else [value]:
                    if whole_number(key, feature, 0) >= base.n:
                        raise UserError(f"{key}: there is no feature {feature}; the base has 0 to {base.n - 1}")
        self.n, self.base, self.modifiers = base.n, base, modifiers

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Firing patterns, bool ``[count, n]``."""
        states = self.base.sample(count, generator)
        for modifier in self.modifiers:
            modifier.apply(states, generator)
        return states

    def pattern_probabilities(self) -> Tensor:
        """Probability of each pattern, carried through the modifiers, ``[2**n]``."""
        patterns = all_patterns(self.n)
        probabilities = self.base.pattern_probabilities()
        for modifier in self.modifiers:
            changed = torch.zeros_like(probabilities)
            for outcome, chance in modifier.outcomes(patterns):
                changed.index_add_(0, pattern_numbers(outcome), probabilities * chance)
            probabilities = changed
        return probabilities

    def magnitudes(self) -> Tensor | None:
        """The base's magnitudes."""
        return self.base.magnitudes()

    def magnitude_spreads(self) -> Tensor | None:
        """The base's."""
        return self.base.magnitude_spreads()
