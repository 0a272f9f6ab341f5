"""The closed forms of a single latent beside a phase diagram: which minimum each trained SAE is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hedgelab.errors import UserError
from hedgelab.protocols.phase_cells import Array, Cell, Target, features_as_x
from hedgelab.saes.vanilla import VanillaSAE
from hedgelab.theory import Population, minima

_SAME = 1e-6  # losses of one minimum, found from different active sets


class Theory(NamedTuple):
    """The closed forms beside a diagram.

    Attributes:
        deepest: Hedging component of the deepest minimum whose latent tracks its own feature, ``[cells]``; NaN without one.
        nearest: That of the minimum nearest to each trained SAE, ``[cells, seeds]``; NaN where none is known.
        distance: From there to the measured component, ``[cells, seeds]``.
        depth: How much higher that minimum's loss is than the deepest's, ``[cells, seeds]``: 0 in the deepest.
    """

    deepest: Array
    nearest: Array
    distance: Array
    depth: Array

    @property
    def shallower(self) -> Array:
        """Whether each SAE is in a minimum that is not the deepest, ``[cells, seeds]`` bool."""
        return np.asarray(self.depth > _SAME)


def theory_of(cells: Sequence[Cell], hedging: Array, target: Target) -> Theory:
    """What the closed forms of a single latent say about each cell.

    Args:
        cells: The points of the diagram, of single-latent vanilla SAEs on orthonormal features.
        hedging: Measured components, ``[cells, seeds]``.
        target: The latent and the two features.

    Raises:
        UserError: SAEs or features that the closed forms do not cover.
    """
    deepest = np.full(len(cells), np.nan)
    nearest, distance, depth = (np.full(hedging.shape, np.nan) for _ in range(3))
    for i, (cell, measured) in enumerate(zip(cells, hedging, strict=True)):
        sae, directions, batch = cell.members[0], cell.data.feature_directions, cell.data.batch("train", 0)
        if not isinstance(sae, VanillaSAE) or sae.d_sae != 1:
            raise UserError("theory: closed forms are known for VanillaSAE with d_sae: 1, set theory: false")
        if not torch.allclose(directions @ directions.T, torch.eye(len(directions)).to(directions), atol=1e-5):
            raise UserError("theory: closed forms need orthonormal features, set theory: false")
        found = minima(Population.from_batch(features_as_x(batch)), sae.l1_coefficient)
        if found:
            own, other = (np.array([one.direction[j] for one in found]) for j in (target.own, target.other))
            components = other * np.sign(own)
            reached = np.abs(measured[:, None] - components).argmin(1)
            nearest[i] = components[reached]
            distance[i] = np.abs(measured - nearest[i])
            depth[i] = np.array([one.loss for one in found])[reached] - found[0].loss
            tracking = np.flatnonzero(own > np.abs(other))
            deepest[i] = other[tracking[0]] if len(tracking) else np.nan
    return Theory(deepest, nearest, distance, depth)
