"""The activation stream: contexts through the cut model, in shuffled blocks that depend on (config, seed, number) alone."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import groupby, pairwise
from threading import Barrier
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from hedgelab.batch import on_device
from hedgelab.data.llm.hook import CutModel, check_tokens
from hedgelab.errors import UserError
from hedgelab.seeding import generator

Rows = Callable[[Tensor, Tensor], Tensor]
"""Takes numbers of contexts ``[n]`` and positions ``[n, length]`` that count to their activations ``[rows, d_in]``."""

_KEPT_BLOCKS = 2  # at least: the one in use, and the one being prefetched
_KEPT_BYTES = 2**29  # as many blocks as fit: who reads a short stream again, SAE after SAE, need not run the model again
_ROOM_FOR_OUTLIERS = 0.05  # how many outliers a block has is not known before the model has run
_PERCENTILES = (0.0, 0.1, 1.0, 50.0, 99.0, 99.9, 100.0)
_PATIENCE = timedelta(hours=1)  # a rank may wait for another's block


@cache
def _own_stream(index: int) -> Any:
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def beside_training(device: torch.device) -> AbstractContextManager[Any]:
    """Queue what follows on a GPU's CUDA stream apart from that on which SAEs train; on a CPU it makes no difference."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(_own_stream(torch.cuda.current_device() if device.index is None else device.index))


class Harvester:
    """Runs a cut model over contexts, and keeps the activations that count, rounded to ``dtype``, on its device.

    Of a model that is spread over several devices, ``device`` says which.

    On a CPU each forward pass has one thread, and as many passes run side by side as PyTorch was given threads: nothing
    waits at barriers when the cores are shared with training, and the activations are the same to the last bit with
    any number of threads, prefetched or not. A GPU has one pass at a time, on a CUDA stream of its own: only the thread
    that asks waits for it, and never for what other streams do.
    """

    def __init__(
        self, model: CutModel, contexts_at_once: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        self._model, self._contexts_at_once, self._dtype = model, contexts_at_once, dtype
        self._device = device or next(model.parameters()).device
        self._one_at_a_time = device is not None or self._device.type == "cuda"
        self._passes: ThreadPoolExecutor | None = None
        self._quiet = False

    def rows(self, tokens: Tensor, usable: Tensor) -> Tensor:
        """Activations at the usable positions ``[n, length]`` of token ids ``[n, length]``, ``[rows, d_in]`` on its device."""
        check_tokens(tokens, self._model.vocabulary)
        if self._passes is None:
            self._passes = _single_threaded_pool(1 if self._one_at_a_time else torch.get_num_threads())
        parts = [torch.split(tensor, self._contexts_at_once) for tensor in (tokens, usable)]
        passes = self._passes.map(self._forward, *parts)
        # Later calls run in the background, where training shows its own progress.
        pieces = list(tqdm(passes, "First activations", len(parts[0]), unit="pass", disable=self._quiet))
        self._quiet = True
        with beside_training(self._device):
            rows, made = torch.cat(pieces), _made(self._device)
        if made is not None:
            made.synchronize()
        return arrived(rows, made)

    @torch.no_grad()  # inference mode's own tensors could not be used in the SAE's backward pass
    def _forward(self, tokens: Tensor, usable: Tensor) -> Tensor:
        with beside_training(self._device):
            with torch.inference_mode():
                output = self._model(on_device(tokens.long(), self._device)).flatten(0, 1)
            rows: Tensor = output.index_select(0, on_device(usable.flatten().nonzero().flatten(), output.device))
            return rows.to(self._device, self._dtype or output.dtype)

    def close(self) -> None:
        """Let work in progress raise ``CancelledError`` at its next forward pass; usable again afterwards."""
        if self._passes is not None:
            self._passes.shutdown(cancel_futures=True)
            self._passes = None


def _made(device: torch.device) -> Any:
    """The event that a CUDA stream has done what it was given so far; None on a CPU, where that is so already."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def arrived(rows: Tensor, made: Any) -> Tensor:
    """Rows that another CUDA stream makes, for this one: it waits for ``made``, and their memory for its use of them."""
    if made is not None:
        stream = torch.cuda.current_stream(rows.device)
        stream.wait_event(made)
        rows.record_stream(stream)
    return rows


def _single_threaded_pool(workers: int) -> ThreadPoolExecutor:
    """Worker threads in which PyTorch uses one thread each; the calling thread keeps its number."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, "hedgelab-forward", initializer=torch.set_num_threads, initargs=(1,))
    ready = Barrier(workers + 1)
    for _ in range(workers):
        pool.submit(ready.wait)
    ready.wait()
    torch.set_num_threads(threads)  # the workers' call has also changed what later threads start with
    return pool


def shared_by_ranks(rows: Rows) -> Rows:
    """The same rows, of several ranks each running the model over its part of the contexts and getting the others' parts.

    Every rank must call this at the same point, and then ask for the same contexts in the same order, as ranks do that take
    slices of the same batches. The exchange has a process group of its own, so that it may go on in the background while the
    SAE's gradients travel.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    own, size = dist.get_rank(group), dist.get_world_size(group)

    def shared(numbers: Tensor, usable: Tensor) -> Tensor:
        if len(numbers) < size:
            return rows(numbers, usable)
        parts = [slice(*pair) for pair in pairwise(len(numbers) * rank // size for rank in range(size + 1))]
        mine = rows(numbers[parts[own]], usable[parts[own]])
        pieces = [torch.empty(int(usable[part].sum()), mine.shape[1], dtype=mine.dtype) for part in parts]
        pieces[own] = mine.cpu()
        for rank, piece in enumerate(pieces):
            dist.broadcast(piece.view(torch.uint8), group_src=rank, group=group)  # as bytes: any number format
        return on_device(torch.cat(pieces), mine.device)

    return shared


class Block(NamedTuple):
    """The activations of some contexts: shuffled rows, and the norms ``[usable]`` of all before outliers were dropped.

    ``places`` says of each row, the how many-th of the usable positions it is; ``made`` when a GPU has the rows.
    """

    rows: Tensor
    norms: Tensor
    places: Tensor
    made: Any


@dataclass(eq=False)
class BlockStream:
    """An endless stream of rows over some contexts, in blocks of equally many batches.

    Every epoch puts the contexts into a new order, and these orders, laid end to end, are cut into blocks: every context comes
    once an epoch. A block's usable rows are shuffled, and each block gives as many whole batches as the poorest contexts fill.
    The rows left over are not used in that epoch. So batch i comes from block ``i // batches_per_block``, whatever was asked
    for before. Blocks of up to half a gibibyte stay in memory, where the rows are.
    """

    rows: Rows
    background: Executor  # makes the blocks, one after the other
    numbers: Tensor  # of the contexts
    usable: Tensor  # which of their positions count
    contexts_per_block: int
    batch_size: int
    max_norm_ratio: float | None  # rows longer than this many times their block's median are dropped; None drops none
    seed: int
    name: str  # the stage's; gives independent seeds
    device: torch.device  # where the rows are

    def __post_init__(self) -> None:
        self.contexts_per_block = min(self.contexts_per_block, len(self.numbers))
        poorest = int(self.usable.sum(dim=1).sort().values[: self.contexts_per_block].sum())
        room = 0.0 if self.max_norm_ratio is None else _ROOM_FOR_OUTLIERS
        self.batches_per_block = int(poorest * (1 - room)) // self.batch_size
        if self.batches_per_block == 0:
            have = f"{self.contexts_per_block} of the {len(self.numbers)} {self.name} contexts have {poorest} usable tokens"
            hint = "give more contexts a block, more text, or a smaller data.batch_size"
            raise UserError(f"data.contexts_per_block: {have}, too few for a batch of {self.batch_size}; {hint}")
        self._blocks: OrderedDict[int, Future[Block]] = OrderedDict()
        self._kept = _KEPT_BLOCKS

    def batch(self, index: int) -> Tensor:
        """Rows of batch number ``index``, ``[batch_size, d_in]``."""
        number, position = divmod(index, self.batches_per_block)
        return self.block(number).rows[position * self.batch_size : (position + 1) * self.batch_size]

    def picked(self, index: int, values: Tensor) -> Tensor:
        """What ``values [contexts, length]`` of all contexts are at the rows of batch number ``index``, ``[batch_size]``."""
        number, position = divmod(index, self.batches_per_block)
        chosen, places = self.context_numbers(number), self.block(number).places
        mine = places[position * self.batch_size : (position + 1) * self.batch_size]
        return values[self.numbers[chosen]][self.usable[chosen]][mine]

    def read(self, numbers: Iterable[int]) -> Iterator[Tensor]:
        """Rows of the batches with these numbers, in this order, the next block of them under way in the background."""
        blocks = [(block, list(inside)) for block, inside in groupby(numbers, lambda i: i // self.batches_per_block)]
        for place, (_, inside) in enumerate(blocks, start=1):
            for number in inside:
                rows = self.batch(number)
                if place < len(blocks):
                    self._request(blocks[place][0])
                yield rows

    def block(self, number: int) -> Block:
        """Block ``number``."""
        block = self._request(number).result()
        arrived(block.rows, block.made)
        return block

    def context_numbers(self, number: int) -> Tensor:
        """Which contexts block ``number`` is made of, ``[contexts_per_block]``."""
        n, start = len(self.numbers), number * self.contexts_per_block
        epochs = range(start // n, (start + self.contexts_per_block - 1) // n + 1)
        sources = (generator(self.seed, self.name, "epoch", epoch) for epoch in epochs)
        order = torch.cat([torch.randperm(n, generator=source) for source in sources])
        return order[start % n :][: self.contexts_per_block]

    def norm_percentiles(self) -> dict[str, float]:
        """Percentiles of the norm over block 0, outliers included, and their share ``dropped``."""
        norms = self.block(0).norms
        values = torch.quantile(norms.double(), torch.tensor(_PERCENTILES, dtype=torch.float64) / 100).tolist()
        limit = float("inf") if self.max_norm_ratio is None else self.max_norm_ratio * norms.median()
        dropped = (norms > limit).float().mean().item()
        return {f"p{p:g}": value for p, value in zip(_PERCENTILES, values, strict=True)} | {"dropped": dropped}

    def _request(self, number: int) -> Future[Block]:
        if number not in self._blocks:
            self._blocks[number] = self.background.submit(self._compute, number)
            while len(self._blocks) > self._kept:
                self._blocks.popitem(last=False)[1].cancel()
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _compute(self, number: int) -> Block:
        chosen = self.context_numbers(number)
        with beside_training(self.device):
            rows = self.rows(self.numbers[chosen], self.usable[chosen])
            norms = rows.float().norm(dim=-1).cpu()
            places = torch.arange(len(rows))
            if self.max_norm_ratio is not None:
                places = (norms <= self.max_norm_ratio * norms.median()).nonzero().flatten()
            needed = self.batches_per_block * self.batch_size
            if len(places) < needed:
                left = f"leaves {len(places)} of a block's {len(norms)} rows where {needed} are needed"
                raise UserError(f"data.max_norm_ratio: {self.max_norm_ratio} {left}; raise it, or choose another data.layer")
            order = torch.randperm(len(places), generator=generator(self.seed, self.name, "block", number))
            places = places[order[:needed]]
            self._kept = max(_KEPT_BLOCKS, _KEPT_BYTES // (needed * rows[0].nbytes))
            rows = rows.index_select(0, on_device(places, rows.device))
            return Block(rows, norms, places, _made(rows.device))
