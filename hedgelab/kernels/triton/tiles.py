"""Launch shapes of the kernels, chosen by ``python -m tests.benchmarks.gpu_kernels`` on an H100."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """How a program of a kernel is cut.

    Attributes:
        block: Columns of ``d_in`` a program handles (a power of two).
        entries: Stored values of a row, or of a latent, in flight at once (a power of two).
        num_warps: Warps a program.
    """

    block: int
    entries: int
    num_warps: int


@dataclass(frozen=True)
class SelectionTile:
    """How the selection kernels are cut.

    Attributes:
        groups: Groups of latents a row is cut into (a power of two); the k-th largest of their maxima bounds the threshold.
        num_warps: Warps a program.
    """

    groups: int
    num_warps: int


DECODE = Tile(block=256, entries=8, num_warps=2)
GRADIENT = Tile(block=256, entries=4, num_warps=1)
SELECTION = SelectionTile(groups=2048, num_warps=8)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of ``dtype`` are accumulated in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
