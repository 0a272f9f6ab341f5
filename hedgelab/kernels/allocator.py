"""Keep large blocks of memory in the process: a training step allocates the same gradients again and again."""

import ctypes
import mmap
from functools import cache

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SCRATCH_MAPPED_FROM = 64 * 2**20
LARGEST_KEPT = SCRATCH_MAPPED_FROM + 2**20  # with room for alignment
KEPT_IN_ALL = 2**31 - 1


@cache
def keep_large_blocks() -> bool:
    """Let glibc reuse freed blocks of up to 64 MiB instead of returning them to the kernel; whether it could be done.

    By default glibc maps blocks above 32 MiB anew each time and returns freed memory at the end of the heap, so each step
    pays page faults for blocks that it has held before. Call this once a process, before training.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_IN_ALL))


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Uninitialised working memory ``[rows, columns]``, which from 64 MiB on returns to the kernel when it is freed.

    The heap would keep a block of that size as a hole that no gradient fits, and the process's peak would grow by it.
    """
    size = rows * columns * dtype.itemsize
    if size < SCRATCH_MAPPED_FROM or (device is not None and device.type != "cpu"):
        return torch.empty(rows, columns, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(rows, columns)
