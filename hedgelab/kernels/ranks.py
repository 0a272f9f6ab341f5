"""The ranks that share something, a global batch or the latents of an SAE, and what they tell each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch import distributed as dist

DIGIT_BITS = 11


@dataclass(frozen=True)
class Ranks:
    """Processes that each hold a part. Every method must be called by all of them, with tensors of one type and shape.

    A rank that is alone gets its argument back from every method, and sends nothing.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None  # None is all processes

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Self:
        """The processes of a group that exists; None: all processes."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the ranks."""
        return self.sum(value) / self.size if self.size > 1 else value

    def min(self, value: Tensor) -> Tensor:
        """Minimum over the ranks."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def any(self, mask: Tensor) -> Tensor:
        """Where any rank's mask holds."""
        return self._reduced(mask.to(torch.uint8), dist.ReduceOp.MAX).bool() if self.size > 1 else mask

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
        return torch.cat([part[:length] for part, length in zip(self.stack(padded), lengths, strict=True)])

    def _reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return value
        result = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, operation, group=self.group)
        return result


ALONE = Ranks()


class Share(NamedTuple):
    """Which part of the pre-activations ``[rows, d_sae]`` of a global batch a rank has: its first row, its first latent."""

    ranks: Ranks
    rows: int
    d_sae: int
    first_row: int = 0
    first_latent: int = 0

    def positions(self, rows: Tensor, latents: Tensor) -> Tensor:
        """Numbers of this part's entries in the global batch, counted row by row: no two entries of any parts share one."""
        return (rows + self.first_row) * self.d_sae + (latents + self.first_latent)


def among_largest(values: Tensor, positions: Callable[[Tensor], Tensor], wanted: int, ranks: Ranks) -> Tensor:
    """Which of this rank's positive values are among the ``wanted`` largest of all ranks, ``[n]`` bool.

    Of equal values at the edge those with the lowest ``positions`` are kept, which turns indices into ``values`` (of at least
    single precision) into numbers that no two values of any ranks share. Values are not gathered: positive floating-point
    numbers sort as their bit patterns do, so each round counts the values of all ranks by 11 bits, the next digit of the edge.
    """
    integers = torch.int32 if values.itemsize == 4 else torch.int64
    keys = values[values > 0].view(integers)
    shift = 8 * values.itemsize - 1  # all bits but the sign
    prefix, places, ties = 0, wanted, 0
    while shift:
        digit = min(DIGIT_BITS, shift)
        shift -= digit
        digits = (keys >> shift) & ((1 << digit) - 1)
        counts = ranks.sum(torch.bincount(digits, minlength=1 << digit))
        at_least = counts.flip(0).cumsum(0).flip(0)
        if not ties and int(at_least[0]) <= wanted:  # in the first round
            return values > 0
        found = int((at_least >= places).count_nonzero()) - 1
        ties = int(counts[found])
        places -= int(at_least[found]) - ties
        prefix = prefix << digit | found
        keys = keys[digits == found]
    edge = torch.tensor([prefix], dtype=integers, device=values.device).view(values.dtype)
    if places == ties:
        return values >= edge
    tied = (values == edge).nonzero().squeeze(1)
    numbers = positions(tied)
    last = ranks.cat(numbers).sort().values[places - 1]
    keep = values > edge
    keep[tied[numbers <= last]] = True
    return keep
