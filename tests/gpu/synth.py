"""SynthSAEBench-16k on a GPU: milliseconds of drawing a batch, and of a training step with and without a CUDA graph.

    python tests/gpu/synth.py [--small] [--json FILE]

Each step is loss, backward pass, clipping, fused Adam and clocks; in the second half of the steps, whose losses are compared.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import hedgelab as hl
from hedgelab.data import toy
from hedgelab.training.captured import SWITCH, StepGraph

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> float:
    """The time when the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def kinds(d_in: int, d_sae: int, k: int) -> dict[str, Callable[[], hl.SAE]]:
    """SAEs of the verdict; of two some latents die soon, so that the auxiliary loss is in their steps."""
    few = {"k": k, "norm_aware_selection": True}
    levels = [d_sae // 32, d_sae // 8, d_sae // 2, d_sae]
    return {
        "BatchTopK": lambda: hl.BatchTopKSAE(d_in, d_sae, **few),
        "BatchTopK, dead latents": lambda: hl.BatchTopKSAE(d_in, d_sae, dead_after_steps=10, **few),
        "matryoshka, dead latents": lambda: hl.MatryoshkaSAE(
            d_in, lambda d: hl.BatchTopKSAE(d, d_sae, dead_after_steps=10, **few), levels, auxiliary_per_level=True
        ),
        "JumpReLU": lambda: hl.JumpReLUSAE(d_in, d_sae, target_l0=k),
    }


def train(make: Callable[[], hl.SAE], batches: list[hl.Batch], steps: int, switch: str) -> tuple[float, list[float], int]:
    """Milliseconds a step, losses, and how many steps were replayed."""
    os.environ[SWITCH] = switch
    torch.manual_seed(0)
    sae = make().to(DEVICE)
    graph, optimizer, losses, replays, start = (StepGraph(sae), torch.optim.Adam(sae.parameters(), fused=True), [], 0, 0.0)
    for step in range(steps):
        if step == steps // 2:
            start = wait()
        sae.steps_done, batch = step, batches[step % len(batches)]
        optimizer.zero_grad()
        terms = graph.take(batch)
        replays += terms is not None
        if terms is None:
            terms = sae.loss(batch)
            terms.total.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.after_step(terms)
        losses.append(terms.total.detach())
    return (wait() - start) / (steps - steps // 2) * 1e3, torch.stack(losses).tolist(), replays


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    small, results = options.small, {}
    n, d_in, d_sae, k, steps = (1024, 96, 256, 6, 8) if small else (16384, 768, 4096, 25, 200)
    law, factors = toy.Zipf(0.5, 0.4, 5e-4), toy.LowRankCorrelation(25, scale=0.1)
    forest = toy.Forest(8 if small else 128, 4, 3, scale_children=True)
    firing = toy.CopulaFiring(n, law, factors, forest, structure_seed=42)
    magnitudes = {"magnitude_mean": 4.0, "magnitude_std": 0.5, "bias": 0.5, "seed": 0}
    data = toy.ToyDataModule(firing, d_in, 1024, device=DEVICE, **magnitudes)
    first = data.batch("train", 0)
    start, blocks = wait(), 4
    for number in range(1, 1 + blocks):
        data.batch("train", number * data.block_batches)
    drawn = (wait() - start) / blocks / data.block_batches * 1e3
    l0 = first.features.active_per_example().float().mean()
    print(f"drawing a batch: {drawn:.2f} ms, {data.block_batches} at once; L0 {l0:.1f}")
    batches, failed = [data.batch("train", number) for number in range(4)], False
    for name, make in kinds(d_in, d_sae, k).items():
        plain, expected, _ = train(make, batches, steps, "0")
        captured, losses, replays = train(make, batches, steps, "1")
        off = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
        failed |= off > 0.02 or (DEVICE == "cuda" and not replays)
        results[name] = {"samples_per_s": 1024e3 / (min(plain, captured) + drawn), "step_ms": plain, "captured_ms": captured}
        print(f"{name}: {plain:.2f} ms, captured {captured:.2f} ms ({replays} replays); losses differ by {off:.1e}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"drawing_ms": drawn, **results}, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
