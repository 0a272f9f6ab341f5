"""Filling an activation cache: shard by shard, by one process or several, from wherever the last one stopped."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from filelock import BaseFileLock
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.llm.cache_files import ActivationCache
from hedgelab.data.llm.datamodule import LLMDataModule
from hedgelab.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_RESERVE = 1.02  # chunk indices and records
_POLL_SECONDS = 1.0
_FULL = "free space and run the same command again"


class Written(NamedTuple):
    """A complete cache, and the tokens and seconds that this process spent on it.

    ``repeatable`` says whether the model gave the same bits when contexts shared its forward pass with others; it is None
    where nothing was left to write.
    """

    cache: ActivationCache
    tokens: int
    seconds: float
    repeatable: bool | None


def write_cache(data: LLMDataModule, folder: str, verify: bool = False, shard: int | None = None) -> Written:
    """Bring a cache to where it holds every context of a DataModule's text.

    Shards that are there are kept; ``verify`` reads them first and writes anew what is damaged. Several processes may do this
    at once: each takes the next shard that nobody works on, and stays until all are written. ``shard`` is the number of
    contexts in each shard of a new cache; None takes about 16 thousand tokens.
    """
    data.files.prepare()
    contexts = len(data.contexts.tokens)
    cache = ActivationCache.begin(folder, data.identity(), contexts, data.d_in, data.storage_dtype, shard)
    if verify:
        for number in tqdm(cache.shards, desc="Verifying", unit="shard"):
            if cache.is_done(number):
                cache.verify(number)
    _check_room(cache)
    started, before = time.perf_counter(), data.harvester.tokens if "harvester" in vars(data) else 0
    total = contexts * data.context_length
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="Caching", smoothing=0.05) as bar:
        try:
            repeatable = _fill(data, cache, bar)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise UserError(f"data.cache: cannot write '{folder}': {error.strerror}") from error
            raise UserError(
                f"data.cache: the disk of '{folder}' is full; {_FULL}, or make do with the {cache.leading()} contexts that are "
                f"written: data.max_contexts: {cache.leading()}"
            ) from error
    tokens = data.harvester.tokens - before if repeatable is not None else 0
    return Written(cache, tokens, time.perf_counter() - started, repeatable)


def _fill(data: LLMDataModule, cache: ActivationCache, bar: tqdm[None]) -> bool | None:
    """Write until everything is there; whether the model gave the same bits twice, None if nothing was to do."""
    repeatable = None
    _show(cache, bar)
    bar.initial = bar.n
    with ThreadPoolExecutor(1, "hedgelab-cache") as writer:
        while todo := [shard for shard in cache.shards if not cache.is_done(shard)]:
            pending: Callable[[], None] | None = None
            for shard in todo:
                lock = cache.claim(shard)
                if lock is None:
                    continue
                if cache.is_done(shard):
                    lock.release()
                    continue
                numbers = torch.tensor(cache.contexts_of(shard))
                rows = _rows(data, numbers, bar)
                if repeatable is None:
                    repeatable = _is_repeatable(data, numbers, rows)
                if pending is not None:  # at most one shard waits
                    pending()
                pending = writer.submit(_write, cache, shard, rows, lock).result
            if pending is None:
                time.sleep(_POLL_SECONDS)  # others are at the last shards, or die at them
            else:
                pending()
            _show(cache, bar)
    return repeatable


def _write(cache: ActivationCache, shard: int, rows: Tensor, lock: BaseFileLock) -> None:
    try:
        cache.write(shard, rows)
    finally:
        lock.release()


def _rows(data: LLMDataModule, numbers: Tensor, bar: tqdm[None] | None = None) -> Tensor:
    """Activations at every position of some contexts, ``[n, length, d_in]``."""
    tokens = data.contexts.tokens[numbers]
    return data.harvester.rows(tokens, torch.ones_like(tokens, dtype=torch.bool), bar).view(*tokens.shape, -1)


def _is_repeatable(data: LLMDataModule, numbers: Tensor, rows: Tensor) -> bool:
    """Whether some contexts, in another order, get the activations that they got."""
    some = torch.arange(min(len(numbers), data.contexts_at_once)).flip(0)
    return torch.equal(_rows(data, numbers[some]), rows[some])


def _show(cache: ActivationCache, bar: tqdm[None]) -> None:
    """Count what is on disk, other processes' work too."""
    bar.n = cache.shape[0] * sum(len(cache.contexts_of(shard)) for shard in cache.shards if cache.is_done(shard))
    bar.refresh()


def _check_room(cache: ActivationCache) -> None:
    """Find out early that the disk cannot hold what is missing."""
    needed = int(_RESERVE * sum(cache.bytes_of(shard) for shard in cache.shards if not cache.is_done(shard)))
    free = shutil.disk_usage(cache.folder).free
    if needed > free:
        raise UserError(
            f"data.cache: '{cache.folder}' needs {needed / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free; "
            f"{_FULL}, take data.storage_dtype: bfloat16, or lower data.max_contexts"
        )
