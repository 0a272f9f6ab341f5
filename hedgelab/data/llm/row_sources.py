"""Where a stream's rows come from: the model at work, or the model at work on several ranks; a cache is the third."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hedgelab.data.llm.harvest import Harvester

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)  # a rank may wait for another's block


class RowSource(Protocol):
    """Gives the activations of contexts by number."""

    def submit(self, work: Callable[[int], T], number: int) -> Future[T]:
        """Do ``work(number)`` in the background, after what was submitted before."""

    def rows(self, numbers: Tensor, usable: Tensor) -> Tensor:
        """Activations ``[rows, d_in]`` at the ``usable`` positions ``[n, length]`` of contexts ``numbers`` ``[n]``."""


class LiveRows:
    """The model runs over the contexts when they are asked for.

    Args:
        harvester: The model at work.
        tokens: The text, ``[contexts, length]``.
    """

    def __init__(self, harvester: Harvester, tokens: Tensor) -> None:
        self.harvester, self.tokens = harvester, tokens

    def submit(self, work: Callable[[int], T], number: int) -> Future[T]:
        """Do ``work(number)`` in the background, after what was submitted before."""
        return self.harvester.submit(work, number)

    def rows(self, numbers: Tensor, usable: Tensor) -> Tensor:
        """Run the model over these contexts."""
        return self.harvester.rows(self.tokens[numbers], usable)


class SharedRows:
    """Each rank runs the model over its part of the contexts, and gets the other parts from the others.

    All ranks must ask for the same contexts in the same order, as ranks do that take slices of the same batches. The
    exchange has a process group of its own, so that it may go on in the background while the SAE's gradients travel.

    Args:
        source: Gives this rank's part.
        group: The ranks (gloo).
    """

    def __init__(self, source: RowSource, group: Any) -> None:
        self._source, self._group = source, group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def submit(self, work: Callable[[int], T], number: int) -> Future[T]:
        """Do ``work(number)`` in the background, after what was submitted before."""
        return self._source.submit(work, number)

    def rows(self, numbers: Tensor, usable: Tensor) -> Tensor:
        """Run the model over a part of these contexts, and gather the others' parts."""
        if len(numbers) < self._size:
            return self._source.rows(numbers, usable)
        bounds = [len(numbers) * rank // self._size for rank in range(self._size + 1)]
        parts = [slice(*pair) for pair in pairwise(bounds)]
        mine = self._source.rows(numbers[parts[self._rank]], usable[parts[self._rank]])
        pieces = []
        for rank, part in enumerate(parts):
            piece = (
                mine.cpu()
                if rank == self._rank
                else torch.empty(int(usable[part].sum()), mine.shape[1], dtype=mine.dtype)
            )
            dist.broadcast(piece.view(torch.uint8), group_src=rank, group=self._group)  # as bytes: any number format
            pieces.append(piece)
        return torch.cat(pieces).to(mine.device)


def shared_by_ranks(source: RowSource) -> RowSource:
    """The source, its work shared where there are several ranks; every rank must call this at the same point."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return source
    return SharedRows(source, dist.new_group(backend="gloo", timeout=_PATIENCE))
