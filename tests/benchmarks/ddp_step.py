"""What averaging gradients over two ranks (DDP, gloo, one thread each) adds to a training step, beside dense gradients.

``python -m tests.benchmarks.ddp_step [--sae topk] [--turns 15] [--copied] [--static-graph] [--bucket-mb 25] [--json]``

d_in 576, d_sae 8192, k 32, a global batch of 2048. Four steps in turns, each on both ranks at once:

- ``alone``: hedgelab's step on a rank's half of the batch, without the other's gradients: what a step costs before averaging;
- ``ddp``: the same under DistributedDataParallel, as Lightning's strategy ``ddp`` wraps it;
- ``dense_alone`` and ``dense_ddp``: the same two of a plain PyTorch TopK SAE, dense autograd, stock DDP;

and ``all_reduce``, the bare sum of one tensor of as many numbers. A time is the slower rank's; ratios are medians over turns.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from hedgelab.batch import Batch
from hedgelab.kernels.allocator import keep_large_blocks
from hedgelab.kernels.ranks import ALONE, Ranks
from hedgelab.saes import SAE, BatchTopKSAE, MatryoshkaSAE, TopKSAE
from hedgelab.training.trainee import Trainee

D_IN, D_SAE, K, BATCH, RANKS = 576, 8192, 32, 2048, 2
LEVELS = [D_SAE // 64, D_SAE // 16, D_SAE // 4, D_SAE]
SAES: dict[str, Callable[[], SAE]] = {
    "topk": lambda: TopKSAE(D_IN, D_SAE, k=K),
    "batch_topk": lambda: BatchTopKSAE(D_IN, D_SAE, k=K),
    "matryoshka": lambda: MatryoshkaSAE(D_IN, lambda d_in: BatchTopKSAE(d_in, D_SAE, k=K), levels=LEVELS),
}
WARM_UP = 3
Step = Callable[[Tensor], object]


class Loss(nn.Module):
    """The loss of an SAE as a module's forward pass, which is where DDP gets ready for the backward pass."""

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.sae = sae
        self.result: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.result = self.sae.loss(Batch(x))
        return self.result.total


class DenseTopK(nn.Module):
    """A TopK SAE as one writes it down: every product dense, gradients by autograd."""

    def __init__(self) -> None:
        super().__init__()
        rows = unit_rows()
        self.W_enc, self.W_dec = nn.Parameter(rows.t().contiguous()), nn.Parameter(rows.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(D_SAE)), nn.Parameter(torch.zeros(D_IN))

    def forward(self, x: Tensor) -> Tensor:
        before = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        kept = before.topk(K, dim=-1, sorted=False)
        latents = torch.zeros_like(before).scatter(-1, kept.indices, kept.values)
        return (latents @ self.W_dec + self.b_dec - x).square().sum(dim=-1).mean()


def unit_rows() -> Tensor:
    """Decoder rows to start from, ``[d_sae, d_in]``."""
    rows = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(0))
    return rows / rows.norm(dim=1, keepdim=True)


def our_step(kind: str, together: bool, ddp: dict[str, Any]) -> Step:
    """hedgelab's step: loss, backward pass, fused Adam, dead-latent clock."""
    sae = SAES[kind]()
    with torch.no_grad():
        flat: Any = sae.inner if isinstance(sae, MatryoshkaSAE) else sae
        flat.W_dec.copy_(unit_rows())
        flat.W_enc.copy_(flat.W_dec.t())
    sae.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=3e-4, fused=True)
    optimizer = sae.configure_optimizers()
    sae.ranks = Ranks.of(None) if together else ALONE
    loss = Loss(sae)
    forward: Any = DistributedDataParallel(loss, **ddp) if together else loss

    def take(x: Tensor) -> None:
        sae.zero_grad()
        forward(x).backward()
        Trainee(sae).prepare_gradients()
        optimizer.step()
        sae.after_step(loss.result)
        sae.steps_done += 1

    return take


def dense_step(together: bool) -> Step:
    """The plain step, under stock DDP or alone."""
    sae = DenseTopK()
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-4, fused=True)
    forward: Any = DistributedDataParallel(sae) if together else sae

    def take(x: Tensor) -> None:
        optimizer.zero_grad()
        forward(x).backward()
        optimizer.step()

    return take


def work(rank: int, kind: str, turns: int, ddp: dict[str, Any], folder: str) -> None:
    """One rank: every step in every turn, the times of rank zero and of the slower one into a file."""
    torch.set_num_threads(1)
    keep_large_blocks()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    numbers = torch.zeros(2 * D_IN * D_SAE + D_IN + D_SAE)
    steps: dict[str, Step] = {
        "alone": our_step(kind, False, ddp),
        "ddp": our_step(kind, True, ddp),
        "dense_alone": dense_step(False),
        "dense_ddp": dense_step(True),
        "all_reduce": lambda x: dist.all_reduce(numbers),
    }
    source = torch.Generator().manual_seed(rank)
    batches = [torch.randn(BATCH // RANKS, D_IN, generator=source) for _ in range(4)]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + turns):
        for name, take in steps.items():
            dist.barrier()
            start = time.perf_counter()
            take(batches[turn % len(batches)])
            seconds = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if turn >= WARM_UP:
                times[name].append(float(seconds))
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times))
    dist.barrier()
    os._exit(0)  # taking DDP's modules apart may wait for a rank that is gone


def measure(kind: str, turns: int, ddp: dict[str, Any]) -> dict[str, Any]:
    """Medians in ms, and what they say."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (kind, turns, ddp, folder), nprocs=RANKS)
        times: dict[str, list[float]] = json.loads(Path(folder, "times.json").read_text())

    def ratio(over: str, under: str) -> float:
        return median(a / b for a, b in zip(times[over], times[under], strict=True))

    def added(over: str, under: str) -> float:
        return 1e3 * median(a - b for a, b in zip(times[over], times[under], strict=True))

    middle = sorted(times["ddp"])[len(times["ddp"]) // 4 : -(len(times["ddp"]) // 4) or None]
    return {
        "sae": kind,
        **{f"{name}_ms": 1e3 * median(values) for name, values in times.items()},
        "added_ms": added("ddp", "alone"),
        "dense_added_ms": added("dense_ddp", "dense_alone"),
        "ddp / alone": ratio("ddp", "alone"),
        "dense_ddp / dense_alone": ratio("dense_ddp", "dense_alone"),
        "dense_ddp / ddp": ratio("dense_ddp", "ddp"),
        "spread of ddp (middle half)": (middle[-1] - middle[0]) / median(middle),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", choices=SAES, nargs="+", default=list(SAES))
    parser.add_argument("--turns", type=int, default=15, help="measured turns, after 3 to warm up")
    parser.add_argument("--copied", action="store_true", help="without DDP's gradient_as_bucket_view, for ours")
    parser.add_argument("--static-graph", action="store_true", help="DDP's static_graph, for ours")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="DDP's bucket_cap_mb, for ours")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    options = parser.parse_args()
    ddp = {
        "gradient_as_bucket_view": not options.copied,
        "static_graph": options.static_graph,
        "bucket_cap_mb": options.bucket_mb,
    }
    for kind in options.sae:
        result = measure(kind, options.turns, ddp)
        if options.json:
            print(json.dumps(result))
            continue
        for key, value in result.items():
            print(f"{key:28} {value if isinstance(value, str) else f'{value:,.3f}'}")
        print()


if __name__ == "__main__":
    main()
