"""Cost of generating toy batches: ``python -m tests.benchmarks.toy_data``."""

import time

import torch

from hedgelab.data.toy import ConditionalFiring, CopulaFiring, ToyDataModule


def seconds_per_batch(data: ToyDataModule, batches: int) -> float:
    """Mean cost of ``batch('train', i)`` over consecutive batches, after the first block."""
    first = data.block_batches
    data.batch("train", first - 1)
    start = time.perf_counter()
    for index in range(first, first + batches):
        data.batch("train", index)
    return (time.perf_counter() - start) / batches


def main() -> None:
    """Print the cost of a batch of the two-feature toy and of copula toys with 2000 features."""
    torch.set_num_threads(1)
    hierarchy = {"parents": 100, "children_per_parent": 15}
    toys = {
        "2 features, d_in 50, batch 500": ToyDataModule(ConditionalFiring([0.25, {"f0": 0.2, "otherwise": 0.0}])),
        "2 features, noisy magnitudes": ToyDataModule(ConditionalFiring([0.25, 0.2]), magnitude_std=0.1),
        "2000 features, copula, d_in 256, batch 1024": ToyDataModule(CopulaFiring(2000, mean_l0=20), 256, 1024),
        "the same with 100 parents of 15 children": ToyDataModule(
            CopulaFiring(2000, mean_l0=20, **hierarchy), 256, 1024
        ),
    }
    for name, data in toys.items():
        batches = 20 * data.block_batches
        print(f"{name:45s} {1e6 * seconds_per_batch(data, batches):10.1f} us/batch ({data.block_batches} a block)")


if __name__ == "__main__":
    main()
