"""The largest entries of something that is split over ranks, found without gathering it: ranks exchange counts.

Positive floating-point numbers sort as their bit patterns do, so the edge of a selection is found digit by digit: in each round
every rank counts its entries by the next 11 bits, and the sum of the counts tells which digit the edge has. Three rounds do for
single precision. The result is exact: what one rank would select that held all entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.kernels.ranks import Ranks

DIGIT_BITS = 11
_INTEGERS = {4: torch.int32, 8: torch.int64}


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


class Edge(NamedTuple):
    """Where a selection ends: its smallest value, how many of the entries equal to it are kept, and how many there are."""

    value: Tensor
    places: int
    ties: int


def edge_of_largest(values: Tensor, wanted: int, ranks: Ranks) -> Edge | None:
    """The edge of the ``wanted`` largest of all ranks' positive values ``[n]``; None where there are no more than those."""
    integers = _INTEGERS[values.itemsize]
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
            return None
        found = int((at_least >= places).count_nonzero()) - 1
        ties = int(counts[found])
        places -= int(at_least[found]) - ties
        prefix = prefix << digit | found
        keys = keys[digits == found]
    value = torch.tensor([prefix], dtype=integers, device=values.device).view(values.dtype)
    return Edge(value, places, ties)


def among_largest(values: Tensor, positions: Callable[[Tensor], Tensor], wanted: int, ranks: Ranks) -> Tensor:
    """Which of this rank's positive values are among the ``wanted`` largest of all ranks, ``[n]`` bool.

    All positive ones are, if there are fewer. Of values equal at the edge those with the lowest ``positions`` are kept, which
    turns indices into ``values`` (of at least single precision) into numbers that no two values of any ranks share.
    """
    edge = edge_of_largest(values, wanted, ranks)
    if edge is None:
        return values > 0
    if edge.places == edge.ties:
        return values >= edge.value
    tied = (values == edge.value).nonzero().squeeze(1)
    numbers = positions(tied)
    last = ranks.cat(numbers).sort().values[edge.places - 1]
    keep = values > edge.value
    keep[tied[numbers <= last]] = True
    return keep
