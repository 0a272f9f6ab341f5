"""Running a cut model over contexts, in a thread of its own, so that the next activations grow while an SAE trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Event
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.llm.hook import CutModel

T = TypeVar("T")


class Harvester:
    """Runs a cut model over contexts and keeps the activations that count.

    All of it happens in one background thread, also when the caller waits for the result: so the arithmetic is the
    same to the last bit whether a block was prefetched or not.

    Args:
        model: The model, cut at its hook, on the device where it is to run.
        contexts_at_once: Contexts of one forward pass.

    Attributes:
        tokens: Tokens run through the model so far.
        seconds: What that took.
    """

    def __init__(self, model: CutModel, contexts_at_once: int) -> None:
        self._model, self._contexts_at_once = model, contexts_at_once
        self._device = next(model.parameters()).device
        self._worker: ThreadPoolExecutor | None = None
        self._interrupted = Event()
        self.tokens, self.seconds = 0, 0.0

    @torch.no_grad()  # inference mode's tensors could not be used in the SAE's backward pass
    def rows(self, tokens: Tensor, usable: Tensor) -> Tensor:
        """Activations at the usable positions of some contexts, context by context.

        Args:
            tokens: ``[n, length]``.
            usable: Positions to keep, ``[n, length]``.

        Returns:
            ``[rows, d_in]`` on the model's device, in the model's dtype.

        Raises:
            CancelledError: ``close`` was called meanwhile.
        """
        start = time.perf_counter()
        kept = []
        parts = zip(*(torch.split(whole, self._contexts_at_once) for whole in (tokens, usable)), strict=True)
        # Only the first call has nothing else on the screen that moves.
        with tqdm(total=tokens.numel(), desc="First activations", unit=" tokens", disable=self.tokens > 0) as progress:
            for some, mask in parts:
                if self._interrupted.is_set():
                    raise CancelledError
                with torch.inference_mode():
                    output = self._model(some.long().to(self._device))
                kept.append(output[mask.to(self._device)])
                progress.update(some.numel())
        rows = torch.cat(kept)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.tokens += tokens.numel()
        self.seconds += time.perf_counter() - start
        return rows

    def submit(self, work: Callable[[int], T], number: int) -> Future[T]:
        """Do ``work(number)`` in the background, after what was submitted before."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hedgelab-llm")
        return self._worker.submit(work, number)

    def close(self) -> None:
        """End the work in progress at its next forward pass and drop what waits; usable again afterwards."""
        if self._worker is not None:
            self._interrupted.set()
            self._worker.shutdown(cancel_futures=True)
            self._interrupted.clear()
            self._worker = None
