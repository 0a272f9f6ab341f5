"""The activation stream: text through the cut model, in shuffled blocks that depend on (config, seed, number) alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from hedgelab.data.llm.harvest import Rows
from hedgelab.errors import UserError
from hedgelab.seeding import generator

_KEPT_BLOCKS = 2  # the one in use, and the one being prefetched
_ROOM_FOR_OUTLIERS = 0.05  # how many outliers a block has is not known before the model has run
_PERCENTILES = (0.0, 0.1, 1.0, 50.0, 99.0, 99.9, 100.0)


class Block(NamedTuple):
    """The activations of some contexts: shuffled rows, and the norms ``[usable]`` of all before outliers were dropped."""

    rows: Tensor
    norms: Tensor


class BlockStream:
    """An endless stream of rows over some contexts, in blocks of equally many batches.

    Every epoch puts the contexts into a new order. These orders, laid end to end, are cut into blocks, so that every context
    comes once an epoch; a block in which two epochs meet may hold a context twice. A block's usable rows are shuffled, and
    the same whole number of batches is taken from each block: as many as the poorest contexts fill. The rows left over (less
    than a batch where contexts are alike, and a twentieth of the block where outliers may be dropped) are not used in that
    epoch; the next one shuffles anew. So batch i comes from block ``i // batches_per_block``, whatever was asked for before.
    The last two blocks are kept.

    ``rows`` turns contexts, of which there are ``numbers``, into rows at the ``usable`` positions; ``submit`` does that in
    the background. Rows longer than ``max_norm_ratio`` times their block's median are dropped (None: none). ``name``, that of
    the stage, gives independent seeds.
    """

    def __init__(
        self,
        rows: Rows,
        submit: Callable[[Callable[[int], Block], int], Future[Block]],
        numbers: Tensor,
        usable: Tensor,
        *,
        contexts_per_block: int,
        batch_size: int,
        max_norm_ratio: float | None,
        seed: int,
        name: str,
    ) -> None:
        self._rows, self._submit, self._numbers, self._usable = rows, submit, numbers, usable
        self._batch_size, self._max_norm_ratio = batch_size, max_norm_ratio
        self._seed, self._name = seed, name
        self.contexts_per_block = min(contexts_per_block, len(numbers))
        poorest = int(usable.sum(dim=1).sort().values[: self.contexts_per_block].sum())
        room = 0.0 if max_norm_ratio is None else _ROOM_FOR_OUTLIERS
        self.batches_per_block = int(poorest * (1 - room)) // batch_size
        if self.batches_per_block == 0:
            raise UserError(
                f"data.contexts_per_block: {self.contexts_per_block} of the {len(numbers)} {name} contexts have {poorest} "
                f"usable tokens or a few more, too few for a batch of {batch_size}; give more contexts a block, more "
                "text, or a smaller data.batch_size"
            )
        self._blocks: OrderedDict[int, Future[Block]] = OrderedDict()

    def batch(self, index: int) -> Tensor:
        """Rows of batch number ``index``, ``[batch_size, d_in]``."""
        number, position = divmod(index, self.batches_per_block)
        return self.block(number).rows[position * self._batch_size : (position + 1) * self._batch_size]

    def read(self, numbers: Iterable[int]) -> Iterator[Tensor]:
        """Rows of the batches with these numbers, in this order, the next block of them under way in the background."""
        per_block = self.batches_per_block
        blocks = [(block, list(inside)) for block, inside in groupby(numbers, lambda number: number // per_block)]
        for place, (_, inside) in enumerate(blocks):
            for number in inside:
                rows = self.batch(number)
                if place + 1 < len(blocks):
                    self._request(blocks[place + 1][0])
                yield rows

    def block(self, number: int) -> Block:
        """Block ``number``."""
        return self._request(number).result()

    def forget(self) -> None:
        """Drop the kept blocks, unfinished ones too."""
        self._blocks.clear()

    def context_numbers(self, number: int) -> Tensor:
        """Which contexts block ``number`` is made of, ``[contexts_per_block]``."""
        n, start = len(self._numbers), number * self.contexts_per_block
        epochs = range(start // n, (start + self.contexts_per_block - 1) // n + 1)
        sources = (generator(self._seed, self._name, "epoch", epoch) for epoch in epochs)
        order = torch.cat([torch.randperm(n, generator=source) for source in sources])
        return order[start % n :][: self.contexts_per_block]

    def norm_percentiles(self) -> dict[str, float]:
        """Percentiles of the norm over block 0, outliers included, and their share ``dropped``."""
        norms = self.block(0).norms
        values = torch.quantile(norms.double(), torch.tensor(_PERCENTILES, dtype=torch.float64) / 100).tolist()
        limit = float("inf") if self._max_norm_ratio is None else self._max_norm_ratio * norms.median()
        dropped = (norms > limit).float().mean().item()
        return {f"p{p:g}": value for p, value in zip(_PERCENTILES, values, strict=True)} | {"dropped": dropped}

    def _request(self, number: int) -> Future[Block]:
        if number not in self._blocks:
            self._blocks[number] = self._submit(self._compute, number)
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)[1].cancel()
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _compute(self, number: int) -> Block:
        chosen = self.context_numbers(number)
        rows = self._rows(self._numbers[chosen], self._usable[chosen])
        norms = rows.float().norm(dim=-1)
        if self._max_norm_ratio is not None:
            rows = rows[norms <= self._max_norm_ratio * norms.median()]
        needed = self.batches_per_block * self._batch_size
        if len(rows) < needed:
            raise UserError(
                f"data.max_norm_ratio: {self._max_norm_ratio} leaves {len(rows)} of a block's {len(norms)} rows where "
                f"{needed} are needed; raise it, or choose another data.layer"
            )
        order = torch.randperm(len(rows), generator=generator(self._seed, self._name, "block", number))
        return Block(rows[order[:needed].to(rows.device)], norms.cpu())
