"""Writing and reading an activation cache: ``python -m tests.benchmarks.cache_speed``.

``read`` is random contexts from disk, and their checksums; ``stream`` all that a training run does: that, outliers, shuffling,
batches, as float32. The file system's cache is warm. Both take blocks of 64 contexts; medians over blocks, and the best, since
neighbours disturb. An SAE of 8192 latents on activations 576 wide takes some 12 000 rows a second on two cores.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hedgelab.data.llm.cache_files import ActivationCache
from hedgelab.data.llm.stream import BlockStream
from hedgelab.kernels.allocator import keep_large_blocks

CONSUMED = 12_000


def main() -> None:
    """Print rows and bytes a second by number format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_large_blocks()  # as every fit does
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
            block_bytes = 64 * options.context * options.width * cache.dtype.itemsize
            print(f"{dtype:9s} write  {written * options.width * cache.dtype.itemsize / 1e9:5.2f} GB/s {written:9,.0f} rows/s")
            for name, seconds in (("read", reading(cache, contexts)), ("stream", streaming(cache, contexts, options.context))):
                best, median = min(seconds), statistics.median(seconds)
                rate = 64 * options.context / median
                print(
                    f"{dtype:9s} {name:6s} {block_bytes / 1e9 / median:5.2f} GB/s (best {block_bytes / 1e9 / best:.2f}) "
                    f"{rate:9,.0f} rows/s = {rate / CONSUMED:.1f} x what an SAE takes"
                )


def reading(cache: ActivationCache, contexts: int) -> list[float]:
    """Seconds of reading each block of 64 contexts, in a random order."""
    seconds = []
    for numbers in torch.randperm(contexts)[: contexts // 64 * 64].split(64):
        start = time.perf_counter()
        cache.read(numbers)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def streaming(cache: ActivationCache, contexts: int, length: int) -> list[float]:
    """Seconds of each block of a stream's batches behind the first, each prefetched while none is used."""
    usable = torch.ones(contexts, length, dtype=torch.bool)
    background = ThreadPoolExecutor(1)
    stream = BlockStream(
        lambda numbers, usable: cache.read(numbers).flatten(0, 1).index_select(0, usable.flatten().nonzero().flatten()),
        background, torch.arange(contexts), usable, contexts_per_block=64, batch_size=1024,
        max_norm_ratio=10.0, seed=0, name="train", device=torch.device("cpu"),
    )  # fmt: skip
    seconds = []
    for block in range(1, 1 + contexts // 64):
        start = time.perf_counter()
        for number in range(block * stream.batches_per_block, (block + 1) * stream.batches_per_block):
            stream.batch(number).float()
        seconds.append(time.perf_counter() - start)
    background.shutdown()
    return seconds


if __name__ == "__main__":
    main()
