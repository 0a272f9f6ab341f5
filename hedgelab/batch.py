"""What travels from a DataModule to an SAE: one batch of activations, and the truth behind it where it is known."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One batch of activations.

    Attributes:
        x: Activations, ``[batch, d_in]``.
        features: True firing magnitudes of the known features, ``[batch, n]`` (0 where silent); None where unknown.
        weight: Probability of each example, ``[batch]``, summing to 1 (population mode); None means equal weights.
    """

    x: Tensor
    features: Tensor | None = None
    weight: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        features, weight = (None if part is None else part.to(device) for part in self[1:])
        return Batch(self.x.to(device), features, weight)
