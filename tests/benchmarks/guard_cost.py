"""What watching for NaN adds to a step of the smallest toy (one latent, batch 500), without Lightning: medians of 15 rounds.

python -m tests.benchmarks.guard_cost
"""

import functools
import statistics
import time

import torch

from hedgelab.data.toy import ConditionalFiring, ToyDataModule
from hedgelab.kernels.ranks import ALONE
from hedgelab.saes import VanillaSAE
from hedgelab.training.guard import check_window

STEPS = 100  # between two reports


def train(sae, optimizer, batches):
    """Seconds of some steps, and their loss terms."""
    window = []
    start = time.perf_counter()
    for i in range(STEPS):
        sae.zero_grad()
        result = sae.loss(batches[i % len(batches)])
        result.total.backward()
        optimizer.step()
        window.append({name: term.detach() for name, term in result.terms.items()})
    return time.perf_counter() - start, window


def main():
    torch.set_num_threads(1)
    data = ToyDataModule(ConditionalFiring([0.25, {"f0": 0.2, "otherwise": 0}]), d_in=50, batch_size=500, seed=0)
    batches = [data.batch("train", i) for i in range(20)]
    sae = VanillaSAE(50, 1, 1e-3)
    optimizer = functools.partial(torch.optim.Adam, lr=3e-4, fused=True)(sae.parameters())
    train(sae, optimizer, batches)
    steps, checks = [], []
    for _ in range(15):
        seconds, window = train(sae, optimizer, batches)
        steps.append(seconds / STEPS)
        start = time.perf_counter()
        check_window(window, STEPS, ALONE, None)
        checks.append((time.perf_counter() - start) / STEPS)
    step, check = statistics.median(steps), statistics.median(checks)
    print(f"step {step * 1e6:.0f} µs, check {check * 1e6:.2f} µs a step: {100 * check / step:.2f} %")


if __name__ == "__main__":
    main()
