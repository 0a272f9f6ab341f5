"""Weighted sums over examples, in float64: what every additive metric state is made of."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The detached tensor in its own precision, or in float32 where that is lower (bf16, fp16)."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def total_weight(examples: Tensor, weight: Tensor | None) -> Tensor:
    """Weight of a batch, a float64 scalar: the sum of ``weight [batch]``, or the number of rows of ``examples``."""
    if weight is None:
        return torch.tensor(examples.shape[0], dtype=torch.float64, device=examples.device)
    return weight.sum(dtype=torch.float64)


def weighted_sum(per_example: Tensor, weight: Tensor | None) -> Tensor:
    """Sum over the first dimension of ``[batch, ...]`` in float64, weighted by ``weight [batch]`` where given."""
    if weight is None:
        return per_example.sum(0, dtype=torch.float64)
    return torch.einsum("b,b...->...", weight.double(), per_example.double())
