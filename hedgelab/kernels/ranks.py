"""The ranks that share something, a global batch or the latents of an SAE, and what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Processes that each hold a part. Every method must be called by all of them, with tensors of one type and shape.

    A rank that is alone gets its argument back from every method, and sends nothing.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None is all processes

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The processes of a group that exists; None: all processes."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the ranks."""
        return self.sum(value) / self.size if self.size > 1 else value

    def max(self, value: Tensor) -> Tensor:
        """Maximum over the ranks."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def min(self, value: Tensor) -> Tensor:
        """Minimum over the ranks."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def any(self, mask: Tensor) -> Tensor:
        """Where any rank's mask holds."""
        return self.max(mask.to(torch.uint8)).bool() if self.size > 1 else mask

    def stack(self, value: Tensor) -> Tensor:
        """The ranks' tensors, in their order, along a new first dimension."""
        if self.size == 1:
            return value.unsqueeze(0)
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.stack(parts)

    def cat(self, value: Tensor) -> Tensor:
        """The ranks' tensors one after the other; their first dimensions may differ."""
        if self.size == 1:
            return value
        lengths = self.stack(torch.tensor([value.shape[0]], device=value.device)).flatten().tolist()
        padded = value.new_zeros(max(lengths), *value.shape[1:])
        padded[: value.shape[0]] = value
        parts = self.stack(padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def _reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return value
        result = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, operation, group=self.group)
        return result


ALONE = Ranks()
