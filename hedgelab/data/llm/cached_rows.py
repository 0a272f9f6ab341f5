"""Activations from disk, in the place of a language model at work."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from hedgelab.data.llm.cache_files import ActivationCache
from hedgelab.errors import UserError

T = TypeVar("T")


class CachedRows:
    """Reads the activations that count out of a cache, in a thread of its own.

    Args:
        cache: The cache, checked to hold all contexts that will be asked for.
        dtype: Number format of the rows.
        device: Where the rows go.

    Attributes:
        tokens: Tokens read so far.
        seconds: What that took.
    """

    def __init__(self, cache: ActivationCache, dtype: torch.dtype, device: torch.device) -> None:
        self._cache, self._dtype, self._device = cache, dtype, device
        self._pool: ThreadPoolExecutor | None = None
        self.tokens, self.seconds = 0, 0.0

    def submit(self, work: Callable[[int], T], number: int) -> Future[T]:
        """Do ``work(number)`` in the background, after what was submitted before."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "hedgelab-cache")
        return self._pool.submit(work, number)

    def rows(self, numbers: Tensor, usable: Tensor) -> Tensor:
        """Activations at the usable positions of some contexts, context by context.

        Args:
            numbers: Which contexts of the text, ``[n]``.
            usable: Positions to keep, ``[n, length]``.

        Returns:
            ``[rows, d_in]``.

        Raises:
            UserError: The cache is damaged there.
        """
        start = time.perf_counter()
        rows = self._cache.read(numbers).to(self._dtype)[usable]
        if not torch.isfinite(rows).all():
            raise UserError(
                f"data.cache: '{self._cache.folder}' lacks activations that it had, or holds some that are not finite; "
                "`hedgelab cache --verify` with this config finds and writes anew whatever is damaged"
            )
        self.tokens += usable.numel()
        self.seconds += time.perf_counter() - start
        return rows.to(self._device)

    def close(self) -> None:
        """End the work in progress and drop what waits; usable again afterwards."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
