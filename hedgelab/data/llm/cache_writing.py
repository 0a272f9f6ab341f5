"""Filling an activation cache: shard by shard, by one process or several, from wherever the last one stopped."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import torch
from tqdm import tqdm

from hedgelab.data.llm.cache_files import ActivationCache
from hedgelab.data.llm.datamodule import LLMDataModule
from hedgelab.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_RESERVE = 1.02  # chunk indices and records
_POLL_SECONDS = 1.0
_FULL = "free space and run the same command again"


class Written(NamedTuple):
    """What writing came to.

    Attributes:
        cache: The cache, complete.
        tokens: Tokens that this process ran through the model.
        seconds: What that took.
        repeatable: Whether the model gave the same bits when contexts shared its forward pass with others; None where
            nothing was left to write.
    """

    cache: ActivationCache
    tokens: int
    seconds: float
    repeatable: bool | None


def write_cache(data: LLMDataModule, folder: str, verify: bool = False, shard: int | None = None) -> Written:
    """Bring a cache to where it holds every context of a DataModule's text.

    Shards that are there are kept. Several processes may do this at once: each takes the next shard that nobody works on,
    and stays until all are written.

    Args:
        data: Model, hook and text.
        folder: The cache.
        verify: Read what is there first, and write anew what is damaged.
        shard: Contexts a shard of a new cache; None for about 16 thousand tokens.

    Raises:
        UserError: The folder holds something else, or the disk has too little room.
    """
    data.files.prepare()
    contexts = len(data.contexts.tokens)
    cache = ActivationCache.begin(
        folder, data.identity(), contexts, data.d_in, data.storage_dtype, shard, data.earlier_identity
    )
    if verify:
        for number in tqdm(cache.shards(), desc="Verifying", unit="shard"):
            if cache.is_done(number):
                cache.verify(number)
    _check_room(cache)
    started, before = time.perf_counter(), data.harvester.tokens if "harvester" in vars(data) else 0
    repeatable = None
    with tqdm(
        total=contexts * data.context_length, unit=" tokens", unit_scale=True, desc="Caching", smoothing=0.05
    ) as bar:
        try:
            repeatable = _Filling(data, cache, bar).run()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise UserError(f"data.cache: cannot write '{folder}': {error.strerror}") from error
            raise UserError(
                f"data.cache: the disk of '{folder}' is full; {_FULL}, or make do with the {_leading(cache)} contexts that are "
                f"written: data.max_contexts: {_leading(cache)}"
            ) from error
    tokens = data.harvester.tokens - before if repeatable is not None else 0
    return Written(cache, tokens, time.perf_counter() - started, repeatable)


class _Filling:
    """One process at work on a cache.

    Args:
        data: Model, hook and text.
        cache: The cache.
        bar: Shows how much is there.
    """

    def __init__(self, data: LLMDataModule, cache: ActivationCache, bar: tqdm[None]) -> None:
        self._data, self._cache, self._bar = data, cache, bar
        self._length = cache.shape[0]

    def run(self) -> bool | None:
        """Write until everything is there; whether the model gave the same bits twice, None if nothing was to do."""
        repeatable = None
        self._bar.initial = self._bar.n = self._known()
        with ThreadPoolExecutor(1, "hedgelab-cache") as writer:
            pending: Callable[[], object] | None = None
            while todo := [shard for shard in self._cache.shards() if not self._cache.is_done(shard)]:
                wrote = False
                for shard in todo:
                    with ExitStack() as held:
                        if not held.enter_context(self._cache.claim(shard)) or self._cache.is_done(shard):
                            continue
                        numbers = torch.tensor(self._cache.contexts_of(shard))
                        rows = self._rows(numbers)
                        if repeatable is None:
                            repeatable = self._is_repeatable(numbers, rows)
                        if pending is not None:  # at most one shard waits
                            pending()
                        kept = held.pop_all()
                    pending = writer.submit(self._write, kept, shard, rows).result
                    wrote = True
                if pending is not None:
                    pending()
                    pending = None
                self._refresh()
                if not wrote:
                    time.sleep(_POLL_SECONDS)  # others are at the last shards, or die at them
        self._refresh()
        return repeatable

    def _write(self, held: ExitStack, shard: int, rows: torch.Tensor) -> None:
        with held:
            self._cache.write(shard, rows)

    def _rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Activations at every position of some contexts, ``[n, length, d_in]``."""
        tokens = self._data.contexts.tokens[numbers]
        rows = self._data.harvester.rows(tokens, torch.ones_like(tokens, dtype=torch.bool), self._bar.update)
        return rows.view(*tokens.shape, -1)

    def _is_repeatable(self, numbers: torch.Tensor, rows: torch.Tensor) -> bool:
        """Whether some contexts, in another order, get the activations that they got."""
        some = torch.arange(min(len(numbers), self._data.contexts_at_once)).flip(0)
        tokens = self._data.contexts.tokens[numbers[some]]
        again = self._data.harvester.rows(tokens, torch.ones_like(tokens, dtype=torch.bool), lambda count: None)
        return torch.equal(again.view(*tokens.shape, -1), rows[some])

    def _known(self) -> int:
        """Tokens that are on disk."""
        done: Iterable[int] = (shard for shard in self._cache.shards() if self._cache.is_done(shard))
        return self._length * sum(len(self._cache.contexts_of(shard)) for shard in done)

    def _refresh(self) -> None:
        """Count what other processes have written."""
        self._bar.n = self._known()
        self._bar.refresh()


def _check_room(cache: ActivationCache) -> None:
    """Find out early that the disk cannot hold what is missing.

    Raises:
        UserError: It cannot.
    """
    needed = int(_RESERVE * sum(cache.bytes_of(shard) for shard in cache.shards() if not cache.is_done(shard)))
    free = shutil.disk_usage(cache.folder).free
    if needed > free:
        raise UserError(
            f"data.cache: '{cache.folder}' needs {_size(needed)} more and its disk has {_size(free)} free; {_FULL}, take "
            "data.storage_dtype: bfloat16, or lower data.max_contexts"
        )


def _leading(cache: ActivationCache) -> int:
    """How many contexts are there without a gap."""
    first = next((shard for shard in cache.shards() if not cache.is_done(shard)), None)
    return cache.contexts if first is None else cache.contexts_of(first).start


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
