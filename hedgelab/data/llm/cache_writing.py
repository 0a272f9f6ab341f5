"""Filling an activation cache."""

import errno
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import BaseFileLock
from torch import Tensor
from tqdm import tqdm

from hedgelab.data.llm.cache_files import ActivationCache
from hedgelab.data.llm.datamodule import LLMDataModule
from hedgelab.errors import UserError

_FULL = "free space and run the same command again"
_RESERVE = 1.02  # headers and records
_POLL_SECONDS = 1.0


class Written(NamedTuple):
    """A complete cache, and the tokens and seconds that this process spent on it."""

    cache: ActivationCache
    tokens: int
    seconds: float
    repeatable: bool | None  # whether contexts get the same bits beside others; None where nothing was left to write


def write_cache(data: LLMDataModule, folder: str, verify: bool = False, shard: int | None = None) -> Written:
    """Bring a cache to where it holds every context of a DataModule's text.

    Shards that are there are kept; ``verify`` reads them first and writes anew what is damaged. Several processes may do this
    at once: each takes the next shard that nobody works on, and stays until all are written. ``shard`` is the number of
    contexts in each shard of a new cache; None takes about 16 thousand tokens.
    """
    data.files.prepare()
    contexts, identity = len(data.contexts.tokens), data.identity()
    cache = ActivationCache.begin(Path(folder), identity, contexts, data.d_in, data.storage_dtype, shard)
    if verify:
        for number in tqdm(cache.shards, desc="Verifying", unit="shard"):
            if cache.is_done(number):
                cache.verify(number)
    needed = int(_RESERVE * sum(cache.bytes_of(shard) for shard in cache.shards if not cache.is_done(shard)))
    if needed > (free := shutil.disk_usage(folder).free):
        lacks = f"'{folder}' needs {needed / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free"
        raise UserError(f"data.cache: {lacks}; {_FULL}, take data.storage_dtype: bfloat16, or lower data.max_contexts")
    started = time.perf_counter()
    try:
        tokens, repeatable = _fill(data, cache)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"data.cache: cannot write '{folder}': {error.strerror}") from error
        fewer = f"make do with the {cache.leading()} contexts that are written: data.max_contexts: {cache.leading()}"
        raise UserError(f"data.cache: the disk of '{folder}' is full; {_FULL}, or {fewer}") from error
    return Written(cache, tokens, time.perf_counter() - started, repeatable)


def _fill(data: LLMDataModule, cache: ActivationCache) -> tuple[int, bool | None]:
    """Write until everything is there; the tokens run, and whether the model gave the same bits twice."""
    tokens, repeatable = 0, None
    total = cache.contexts * data.context_length
    with (
        tqdm(total=total, unit=" tokens", unit_scale=True, desc="Caching", smoothing=0.05) as bar,
        ThreadPoolExecutor(1, "hedgelab-cache") as writer,
    ):
        while todo := [shard for shard in cache.shards if not cache.is_done(shard)]:
            # What is on disk counts, other processes' work too.
            bar.n = total - data.context_length * sum(len(cache.contexts_of(shard)) for shard in todo)
            if repeatable is None:  # nothing run so far: not to count in the speed
                bar.initial = bar.n
            pending: Future[None] | None = None
            for shard in todo:
                if (lock := cache.claim(shard)) is None:
                    continue
                if cache.is_done(shard):
                    lock.release()
                    continue
                numbers = torch.tensor(cache.contexts_of(shard))
                rows = _rows(data, numbers)
                tokens += rows.shape[0] * rows.shape[1]
                if repeatable is None:  # the same contexts in another order
                    some = torch.arange(min(len(numbers), data.contexts_at_once)).flip(0)
                    repeatable = torch.equal(_rows(data, numbers[some]), rows[some])
                if pending is not None:  # at most one shard waits
                    pending.result()
                pending = writer.submit(_write, cache, shard, rows, lock)
                bar.update(rows.shape[0] * rows.shape[1])
            if pending is None:
                time.sleep(_POLL_SECONDS)  # others are at the last shards, or die at them
            else:
                pending.result()
        bar.n = total
    return tokens, repeatable


def _rows(data: LLMDataModule, numbers: Tensor) -> Tensor:
    """Activations at every position of some contexts, ``[n, length, d_in]``."""
    tokens = data.contexts.tokens[numbers]
    return data.harvester.rows(tokens, torch.ones_like(tokens, dtype=torch.bool)).view(*tokens.shape, -1)


def _write(cache: ActivationCache, shard: int, rows: Tensor, lock: BaseFileLock) -> None:
    try:
        cache.write(shard, rows)
    finally:
        lock.release()
