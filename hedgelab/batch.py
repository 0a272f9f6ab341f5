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
        features = on_device(self.features, device) if isinstance(self.features, Tensor) else self.features
        features = features.to(device) if isinstance(features, Codes) else features
        return Batch(on_device(self.x, device), features, None if self.weight is None else on_device(self.weight, device))


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device; what goes from the host to a GPU goes through pinned memory, so that nobody waits for it."""
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
