"""Harvesting activations beside plain transformers on the truncated model: ``python -m tests.benchmarks.llm_forward``.

Both have the model up to the same block, the same contexts and the same number of threads, and take turns.
"""

import argparse
import statistics
import time

import torch
import transformers

from hedgelab.data.llm.hook import CutModel
from hedgelab.data.llm.model import ModelFiles
from hedgelab.data.llm.stream import Harvester


def main() -> None:
    """Print both speeds, the median of their ratios, and how far the activations are apart."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    files = ModelFiles(options.model)
    harvester = Harvester(CutModel(files.causal_lm(), f"model.layers.{options.layer}"), options.at_once)
    blocks = options.layer + 1
    plain = transformers.AutoModel.from_pretrained(files.location, num_hidden_layers=blocks, dtype=torch.float32).eval()
    plain.norm = torch.nn.Identity()  # the residual stream itself, for comparison
    source = torch.Generator().manual_seed(0)
    shape = (options.contexts, options.context)
    tokens = torch.randint(100, files.config().vocab_size, shape, generator=source)
    usable = torch.ones(shape, dtype=torch.bool)

    def ours() -> torch.Tensor:
        return harvester.rows(tokens, usable)

    @torch.inference_mode()
    def theirs() -> torch.Tensor:
        parts = [plain(input_ids=part, use_cache=False).last_hidden_state for part in tokens.split(options.at_once)]
        return torch.cat(parts).flatten(0, 1)

    difference = (ours() - theirs()).abs().max().item()  # both warm now
    speeds: dict[str, list[float]] = {"hedgelab": [], "transformers": []}
    for _ in range(options.rounds):
        for name, run in (("hedgelab", ours), ("transformers", theirs)):
            start = time.perf_counter()
            run()
            speeds[name].append(tokens.numel() / (time.perf_counter() - start))
    harvester.close()
    for name, values in speeds.items():
        print(f"{name:13s} {statistics.median(values):8.0f} tokens/s   ({min(values):.0f} to {max(values):.0f})")
    ratios = [a / b for a, b in zip(speeds["hedgelab"], speeds["transformers"], strict=True)]
    print(f"ratio         {statistics.median(ratios):8.2f}            ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"largest difference of an activation: {difference:.2g}")


if __name__ == "__main__":
    main()
