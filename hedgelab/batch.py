"""What travels from a DataModule to an SAE: one batch of activations, and the truth behind it where it is known."""

from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.codes import Codes


class Batch(NamedTuple):
    """One batch of activations.

    Attributes:
        x: Activations, ``[batch, d_in]``.
        features: True firing magnitudes of the known features, ``[batch, n]`` (0 where silent): a tensor, or
            :class:`~hedgelab.kernels.codes.Codes` where features are many and few fire; None where unknown.
        weight: Probability of each example, ``[batch]``, summing to 1 (population mode); None means equal weights.
    """

    x: Tensor
    features: Tensor | Codes | None = None
    weight: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        features = None if self.features is None else self.features.to(device)
        return Batch(self.x.to(device), features, None if self.weight is None else self.weight.to(device))
