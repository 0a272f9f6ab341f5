"""Running a cut model over contexts, in threads of its own, so that the next activations grow while an SAE trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from threading import Barrier, Event
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.llm.hook import CutModel, check_tokens

T = TypeVar("T")
Rows = Callable[[Tensor, Tensor], Tensor]
"""Takes numbers of contexts ``[n]`` and positions ``[n, length]`` that count to their activations ``[rows, d_in]``."""

_PATIENCE = timedelta(hours=1)  # a rank may wait for another's block


class Worker:
    """Works in a thread of its own, one thing after the other; counts tokens, and the seconds that they took."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self.tokens, self.seconds = 0, 0.0

    def submit(self, work: Callable[[int], T], number: int) -> Future[T]:
        """Do ``work(number)`` in the background, after what was submitted before."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "hedgelab-blocks")
        return self._thread.submit(work, number)

    def close(self) -> None:
        """End the work in progress and drop what waits; usable again afterwards."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None


class Harvester(Worker):
    """Runs a cut model over contexts and keeps the activations that count.

    On a CPU each forward pass has one thread, and as many passes run side by side as PyTorch was given threads: nothing
    waits at barriers when the cores are shared with training, and the activations are the same to the last bit with
    any number of threads, prefetched or not. A GPU has one pass at a time. The model runs on the device where it is; its
    activations are rounded to ``dtype``.
    """

    def __init__(self, model: CutModel, contexts_at_once: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._model, self._contexts_at_once, self._dtype = model, contexts_at_once, dtype
        self._device = next(model.parameters()).device
        self._passes: ThreadPoolExecutor | None = None
        self._interrupted = Event()

    def rows(self, tokens: Tensor, usable: Tensor, bar: tqdm[Any] | None = None) -> Tensor:
        """Activations at the usable positions ``[n, length]`` of token ids ``[n, length]``, ``[rows, d_in]`` on its device.

        The bar counts tokens; without one, the first call shows its own. Raises ``CancelledError`` after :meth:`close`.
        """
        check_tokens(tokens, self._model.vocabulary)
        start = time.perf_counter()
        if self._passes is None:
            self._passes = _single_threaded_pool(1 if self._device.type == "cuda" else torch.get_num_threads())
        parts = [torch.split(tensor, self._contexts_at_once) for tensor in (tokens, usable)]
        # Later calls run in the background, where training shows its own progress.
        quiet = self.tokens > 0 or bar is not None
        with tqdm(total=tokens.numel(), desc="First activations", unit=" tokens", disable=quiet) as own:
            kept = []
            for part, rows in zip(parts[0], self._passes.map(self._forward, *parts), strict=True):
                kept.append(rows)
                (own if bar is None else bar).update(part.numel())
        self.tokens += tokens.numel()
        self.seconds += time.perf_counter() - start
        return torch.cat(kept)

    @torch.no_grad()  # inference mode's own tensors could not be used in the SAE's backward pass
    def _forward(self, tokens: Tensor, usable: Tensor) -> Tensor:
        if self._interrupted.is_set():
            raise CancelledError
        with torch.inference_mode():
            output = self._model(tokens.long().to(self._device))
        rows: Tensor = output[usable.to(self._device)].to(self._dtype or output.dtype)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return rows

    def close(self) -> None:
        """End the work in progress at its next forward pass and drop what waits; usable again afterwards."""
        self._interrupted.set()
        super().close()
        if self._passes is not None:
            self._passes.shutdown(cancel_futures=True)
            self._passes = None
        self._interrupted.clear()


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
        return torch.cat(pieces).to(mine.device)

    return shared
