"""Matryoshka levels drawn anew each step."""

import math
from typing import Any

import torch

from hedgelab.errors import UserError, whole_number
from hedgelab.kernels.values import Target
from hedgelab.saes.mitigations.base import Mitigation
from hedgelab.seeding import generator, resolve_seed


class RandomPrefixes(Mitigation):
    """Each step cuts levels of other sizes, drawn log-uniformly from ``smallest`` to d_sae; the last is always d_sae.

    With fixed levels a latent matters only to those outside its prefix, and latents of one level are in no order; with random
    ones every latent is more important than the next. The SAE's ``levels`` say how many are drawn, its weights go by position,
    innermost first, and so do names of loss terms: ``mse/level1`` is the innermost. Sizes follow from seed and step alone.

    Args:
        smallest: Smallest level; null for the SAE's first.
        seed: Seed of the sizes; null takes the run's ``seed_everything``.
    """

    needs_levels = True

    def __init__(self, smallest: int | None = None, seed: int | None = None) -> None:
        super().__init__()
        self.smallest = None if smallest is None else whole_number("model.mitigations.smallest", smallest)
        self.seed = resolve_seed(seed)

    def check(self, sae: Any) -> None:
        """See that there is room for as many levels, and name them by their position."""
        if sae.adaptive:
            raise UserError("model.adaptive: weighs levels of fixed sizes; set it to false, or remove RandomPrefixes")
        self.smallest = sae.levels[0] if self.smallest is None else self.smallest
        if self.smallest + len(sae.levels) - 1 > sae.d_sae:
            room = f"{len(sae.levels)} levels from {self.smallest} up do not fit into d_sae = {sae.d_sae}"
            raise UserError(f"model.mitigations: RandomPrefixes: {room}; lower smallest, or give fewer levels")
        sae.level_names = [f"level{number}" for number in range(1, len(sae.levels) + 1)]

    def sizes(self, step: int, count: int, d_sae: int) -> list[int]:
        """The ``count`` rising sizes of a step.

        >>> RandomPrefixes(smallest=2, seed=0).sizes(step=0, count=3, d_sae=64)[-1]
        64
        """
        least = self.smallest or 1
        share = torch.rand(count - 1, generator=generator(self.seed, "prefixes", step), dtype=torch.float64)
        drawn = sorted(int(least * math.exp(one * math.log(d_sae / least))) for one in share.tolist())
        sizes: list[int] = []
        for number, size in enumerate(drawn):  # distinct, and with room for those that follow
            above = max(size, sizes[-1] + 1 if sizes else least)
            sizes.append(min(above, d_sae - (count - 1 - number)))
        return [*sizes, d_sae]

    def target(self, sae: Any, target: Target) -> Target:
        """The same, of this step's levels."""
        return target._replace(levels=self.sizes(sae.steps_done, len(target.levels), sae.d_sae))
