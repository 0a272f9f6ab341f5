"""Running a cut model over contexts, in threads of its own, so that the next activations grow while an SAE trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Barrier, Event
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.llm.hook import CutModel, check_tokens

T = TypeVar("T")


class Harvester:
    """Runs a cut model over contexts and keeps the activations that count.

    On a CPU each forward pass has one thread, and as many passes run side by side as PyTorch was given threads: nothing
    waits at barriers when the cores are shared with training, and the activations are the same to the last bit with
    any number of threads, prefetched or not. A GPU has one pass at a time.

    Args:
        model: The model, cut at its hook, on the device where it is to run.
        contexts_at_once: Contexts of one forward pass.
        dtype: Number format of the rows; None leaves the model's.

    Attributes:
        tokens: Tokens run through the model so far.
        seconds: What that took.
    """

    def __init__(self, model: CutModel, contexts_at_once: int, dtype: torch.dtype | None = None) -> None:
        self._model, self._contexts_at_once, self._dtype = model, contexts_at_once, dtype
        self._device = next(model.parameters()).device
        self._pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None
        self._interrupted = Event()
        self.tokens, self.seconds = 0, 0.0

    def submit(self, work: Callable[[int], T], number: int) -> Future[T]:
        """Do ``work(number)`` in the background, after what was submitted before."""
        return self._running()[0].submit(work, number)

    def rows(self, tokens: Tensor, usable: Tensor, progress: Callable[[int], object] | None = None) -> Tensor:
        """Activations at the usable positions of some contexts, context by context.

        Args:
            tokens: ``[n, length]``.
            usable: Positions to keep, ``[n, length]``.
            progress: Called with the number of tokens of each forward pass; None shows a progress bar.

        Returns:
            ``[rows, d_in]`` on the model's device.

        Raises:
            CancelledError: ``close`` was called meanwhile.
            UserError: The model has no embedding for some token.
        """
        check_tokens(tokens, self._model.vocabulary)
        start = time.perf_counter()
        parts = [torch.split(tensor, self._contexts_at_once) for tensor in (tokens, usable)]
        # Later calls run in the background, where training shows its own progress.
        quiet = self.tokens > 0 or progress is not None
        with tqdm(total=tokens.numel(), desc="First activations", unit=" tokens", disable=quiet) as bar:
            kept = []
            for part, rows in zip(parts[0], self._running()[1].map(self._forward, *parts), strict=True):
                kept.append(rows)
                (progress or bar.update)(part.numel())
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

    def _running(self) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
        """The thread that works off what was submitted, and those of the forward passes."""
        if self._pools is None:
            passes = 1 if self._device.type == "cuda" else torch.get_num_threads()
            self._pools = ThreadPoolExecutor(1, "hedgelab-blocks"), _single_threaded_pool(passes)
        return self._pools

    def close(self) -> None:
        """End the work in progress at its next forward pass and drop what waits; usable again afterwards."""
        if self._pools is not None:
            self._interrupted.set()
            for pool in self._pools:
                pool.shutdown(cancel_futures=True)
            self._interrupted.clear()
            self._pools = None


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
