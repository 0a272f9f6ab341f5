"""One side of a benchmark: a process that builds a training step and takes it when told, JSON lines over pipes.

It must run in any library's environment, so it imports nothing but PyTorch and NumPy. A worker is started with its own
standard output as the channel; what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """What to train, the same for both sides.

    ``levels``, ``lr`` and the coefficients are those of every library in its own words; ``autocast`` means bf16.
    """

    library: str
    sae: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    levels: list[int]
    lr: float
    clip_norm: float | None
    sparsity_coefficient: float
    threads: int
    device: str
    autocast: bool
    data: str
    steps: int

    def initial_rows(self) -> Tensor:
        """Unit decoder rows ``[d_sae, d_in]``; the encoder starts as their transpose, biases at 0."""
        rows = torch.randn(self.d_sae, self.d_in, generator=torch.Generator().manual_seed(0))
        return rows / rows.norm(dim=1, keepdim=True)


@dataclass(frozen=True)
class Step:
    """A training step, and the reconstruction of a batch as training makes it."""

    take: Callable[[Tensor], object]
    reconstruct: Callable[[Tensor], Tensor]
    versions: dict[str, str]


def serve(build: Callable[[Task], Step]) -> None:
    """Answer commands until the pipe closes."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = Task(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(task.threads)
    batches = torch.from_numpy(np.load(task.data)).to(task.device)
    memory = Memory(task.device)
    step = build(task)
    synchronize = torch.cuda.synchronize if task.device == "cuda" else lambda: None

    def timed(work: Callable[[], object]) -> float:
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        return time.perf_counter() - start

    def answer(command: str, number: int) -> dict[str, object]:
        x = batches[number % len(batches)]
        match command:
            case "step":
                with torch.autocast(task.device, torch.bfloat16, enabled=task.autocast):
                    return {"seconds": timed(lambda: step.take(x))}
            case "finish":
                peak = memory.peak_bytes()
                with torch.no_grad():
                    loss = float((step.reconstruct(x).float() - x).square().sum(1).mean())
                return {"peak_bytes": peak, "loss": loss, "versions": step.versions}
        raise ValueError(command)

    channel.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        channel.write(json.dumps(answer(**json.loads(line))) + "\n")


class Memory:
    """Memory beyond what the process held when this was made: imports and data do not count."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark on Linux
        self.before = _status("VmRSS")

    def peak_bytes(self) -> int:
        """Highest use since, in bytes."""
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM")
        return peak - self.before


def _status(key: str) -> int:
    """A figure of this process in bytes; without /proc the lifetime's high-water mark stands in for both."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def bare_encoder(task: Task) -> Step:
    """The encoder's product and nothing else, in a process of its own so that its output counts as nobody's memory.

    Its output is allocated once: a new one each time costs page faults that no exact step must pay.
    """
    weights, bias = task.initial_rows().to(task.device), torch.zeros(task.d_sae, device=task.device)
    dtype = torch.bfloat16 if task.autocast else torch.float32
    weights, bias = weights.to(dtype), bias.to(dtype)
    out = torch.empty(task.batch, task.d_sae, device=task.device, dtype=dtype)

    def product(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.addmm(bias, x.to(dtype), weights.t(), out=out)

    return Step(product, lambda x: x, {})


if __name__ == "__main__":
    serve(bare_encoder)
