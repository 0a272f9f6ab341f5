"""``hedgelab cache``: a language model's activations to disk, once for all later runs."""

import os

import torch

from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.llm.cache_writing import write_cache
from hedgelab.errors import UserError
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Study


class Cache(Study):
    """Write a language model's activations to disk, for all later runs.

    Runs the language model of a config's section `data` over its text, and writes the activations to the folder data.cache.
    Every later fit, hedge or sweep with the same section reads them instead of running the model; batches are the same. All
    else in the config is ignored.

    An interrupted or failed run goes on where it was. Several processes, also on several machines that see the folder, share
    the work: run the same command as often as you like (srun, torchrun, or another terminal); each uses the GPU of its local
    rank. What is written is raw: batch_size, seed, contexts_per_block, skip_first, max_norm_ratio, normalisation and held_out
    may differ between the runs that read it. A cache of more contexts (data.max_contexts) than a run needs is fine.

    Args:
        data: The LLMDataModule whose activations are written.
        verify: Read what is there, compare all checksums, and write anew what is damaged.
    """

    tracked = False
    takes_any_config = True
    writes_to = frozenset({"data.cache"})

    def __init__(self, data: Recipe[ActivationDataModule], verify: bool = False) -> None:
        self.data, self.verify = data, verify

    def run(self, bench: Bench) -> Outcome:
        """Write what is missing."""
        data = self.data()
        if not isinstance(data, LLMDataModule):
            name = type(data).__name__
            raise UserError(f"data: {name} needs no cache; only activations of language models are cached")
        if data.cache is None:
            raise UserError("data.cache: names no folder to write; add it to the config, or give --data.cache DIR")
        local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
        if local is not None and str(data.device) == "cuda":
            data.device = torch.device("cuda", int(local) % torch.cuda.device_count())
        try:
            cache, tokens, seconds, repeatable = write_cache(data, data.cache, self.verify)
        finally:
            data.teardown("fit")
        length, d_in = cache.shape
        size = sum(cache.bytes_of(shard) for shard in cache.shards) / 1e9
        about = f"{cache.contexts} contexts of {length} tokens, {d_in} wide, {cache.storage_dtype}, {size:.2f} GB"
        done = f"this process ran {tokens} tokens, {tokens / seconds:.0f} a second"
        lines = [f"cache {cache.folder}: {about}", "nothing was left to write" if repeatable is None else done]
        if repeatable is False:
            lines.append(
                "here the model's last bits depend on what shares a forward pass: runs from the cache equal one another to the "
                "bit, and live runs to rounding"
            )
        return Outcome(headline=lines)
