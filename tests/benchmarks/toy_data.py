"""Cost of generating toy batches: ``python -m tests.benchmarks.toy_data``.

With ``HEDGELAB_PEER_PYTHON`` also that of SAELens' own generator of SynthSAEBench-16k, and always that of an SAE's step on it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from hedgelab.data.toy import (
    ConditionalFiring,
    CopulaFiring,
    FoldedNormal,
    Forest,
    Linear,
    LowRankCorrelation,
    ToyDataModule,
    Zipf,
)
from hedgelab.data.toy.dictionary import Orthogonalised
from hedgelab.saes import BatchTopKSAE

_ROUNDS = 12
_PEER = """
import time, torch
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig
from sae_lens.synthetic import (FoldedNormalMagnitudeConfig, HierarchyConfig, LinearMagnitudeConfig, LowRankCorrelationConfig,
    ZipfianFiringProbabilityConfig)
torch.set_num_threads(1)
model = SyntheticModel(SyntheticModelConfig(
    num_features=16384, hidden_dim=768, seed=42, bias=0.5,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
    hierarchy=HierarchyConfig(total_root_nodes=128, branching_factor=4, max_depth=3, mutually_exclusive_portion=1.0,
        compensate_probabilities=True, scale_children_by_parent=True),
    correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5)), device="cpu")
for sparse in (False, True):
    model.use_sparse_tensors = sparse
    costs = []
    for _ in range(2):
        start = time.process_time()
        model.sample(1024)
        costs.append(time.process_time() - start)
    print(min(costs))
"""


def seconds(run: Callable[[int], object], rounds: int) -> float:
    """Least processor time of a call, of those numbered 0, 1, …: what other programs do at the same time hardly matters."""
    costs = []
    for number in range(rounds):
        start = time.process_time()
        run(number)
        costs.append(time.process_time() - start)
    return min(costs)


def synth_sae_bench() -> ToyDataModule:
    """SynthSAEBench-16k with a dictionary of random directions, whose making is not at stake here."""
    firing = CopulaFiring(
        16384,
        Zipf(0.5, 0.4, 5e-4),
        LowRankCorrelation(25, scale=0.1),
        Forest(128, 4, 3, scale_children=True),
        structure_seed=42,
    )
    magnitudes = {"magnitude_mean": Linear(5, 4), "magnitude_std": FoldedNormal(0.5, 0.5, seed=43)}
    return ToyDataModule(firing, 768, 1024, dictionary=Orthogonalised(steps=0), bias=0.5, **magnitudes)


def show(name: str, cost: float) -> None:
    """One line of the output."""
    print(f"{name:60s} {1e3 * cost:10.3f} ms/batch", flush=True)


def main() -> None:
    """Print the cost of a batch of several toys, of SAELens' generator, and of a step."""
    torch.set_num_threads(1)
    rates, forest = Zipf(total=20), Forest(100, 15, mutually_exclusive=False)
    correlation = LowRankCorrelation(8, strength=0.2)
    toys = {
        "2 features, d_in 50, batch 500": ToyDataModule(ConditionalFiring([0.25, {"f0": 0.2, "otherwise": 0.0}])),
        "2 features, noisy magnitudes": ToyDataModule(ConditionalFiring([0.25, 0.2]), magnitude_std=0.1),
        "2000 features, copula, d_in 256, batch 1024": ToyDataModule(CopulaFiring(2000, rates, correlation), 256, 1024),
        "the same with 100 parents of 15 children": ToyDataModule(CopulaFiring(2000, rates, correlation, forest), 256, 1024),
        "SynthSAEBench-16k, d_in 768, batch 1024": synth_sae_bench(),
    }
    for name, data in toys.items():
        show(name, seconds(lambda number, data=data: data._draw_block("train", number), _ROUNDS) / data.block_batches)
    bench = toys["SynthSAEBench-16k, d_in 768, batch 1024"]
    magnitudes = bench._magnitudes
    draws = seconds(lambda i: bench.firing.activations(1024, torch.Generator().manual_seed(i), magnitudes), _ROUNDS)
    show("  of which firing and magnitudes", draws)
    sae = BatchTopKSAE(d_in=768, d_sae=4096, k=25)
    batch = bench.batch("train", 0)
    sae.initialize(batch, None)
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)

    def step(_: int) -> None:
        terms = sae.loss(batch)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(terms)

    show("  a step of a BatchTopK SAE of 4096 latents on it", seconds(step, _ROUNDS))
    if peer := os.environ.get("HEDGELAB_PEER_PYTHON"):
        found = subprocess.run([peer, "-c", _PEER], check=True, text=True, stdout=subprocess.PIPE, stderr=sys.stderr)
        for kind, cost in zip(("dense", "sparse"), found.stdout.split(), strict=True):
            show(f"  SAELens' own, {kind} tensors", float(cost))


if __name__ == "__main__":
    main()
