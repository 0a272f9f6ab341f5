"""Launch shapes of the kernels, chosen by ``python -m tests.benchmarks.gpu_kernels`` on an H100."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a program of a kernel is cut; ``block`` and ``entries`` are powers of two."""

    block: int  # columns of d_in that a program handles
    entries: int  # stored values of a row, or of a latent, in flight at once
    num_warps: int


@dataclass(frozen=True)
class SelectionTile:
    """How the selection kernels are cut; ``groups`` is a power of two."""

    groups: int  # of latents of a row; the k-th largest of their maxima bounds the threshold
    num_warps: int


DECODE = Tile(block=256, entries=8, num_warps=2)
GRADIENT = Tile(block=256, entries=4, num_warps=1)
SELECTION = SelectionTile(groups=2048, num_warps=8)
