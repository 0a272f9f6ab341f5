"""Writing and reading an activation cache, rows a second: ``python -m tests.benchmarks.cache_speed``.

Reading is all that a training run does: random contexts from disk, checksums, outliers, shuffling, batches, as float32; the
file system's cache is warm. An SAE of 8192 latents on activations 576 wide takes some 12 000 rows a second on two cores.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hedgelab.data.llm.cache_files import ActivationCache
from hedgelab.data.llm.stream import BlockStream

CONSUMED = 12_000


def main() -> None:
    """Print rows a second by number format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    contexts = options.rows // options.context
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            identity = {"context_length": options.context}
            cache = ActivationCache.begin(Path(folder) / "cache", identity, contexts, options.width, dtype)
            rows = torch.randn(cache.contexts_per_shard, options.context, options.width)
            start = time.perf_counter()
            for shard in cache.shards:
                cache.write(shard, rows[: len(cache.contexts_of(shard))])
            written = contexts * options.context / (time.perf_counter() - start)
            read = read_speed(cache, contexts, options.context)
        print(f"{dtype:9s} write {written:9.0f}   read {read:9.0f} rows/s = {read / CONSUMED:.1f} x what an SAE takes")


def read_speed(cache: ActivationCache, contexts: int, length: int) -> float:
    """Rows a second of a stream's batches, over one pass behind a first block, each prefetched while none is used."""
    usable = torch.ones(contexts, length, dtype=torch.bool)
    background = ThreadPoolExecutor(1)
    stream = BlockStream(
        lambda numbers, usable: cache.read(numbers)[usable], background, torch.arange(contexts), usable,
        contexts_per_block=64, batch_size=1024,
        max_norm_ratio=10.0, seed=0, name="train",
    )  # fmt: skip
    stream.batch(0)
    first, stop = stream.batches_per_block, stream.batches_per_block * (1 + contexts // 64)
    start = time.perf_counter()
    for rows in stream.read(range(first, stop)):
        rows.float()
    elapsed = time.perf_counter() - start
    background.shutdown()
    return (stop - first) * 1024 / elapsed


if __name__ == "__main__":
    main()
