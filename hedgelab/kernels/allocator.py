"""Keep large blocks of memory in the process: a training step allocates the same gradients again and again."""

import ctypes
import sys
from functools import cache

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_KEPT = 64 * 2**20  # larger blocks are mapped one by one, which wastes nothing between them
KEPT_IN_ALL = 2**31 - 1


@cache
def keep_large_blocks() -> bool:
    """Let glibc reuse freed blocks of up to 64 MiB instead of returning them to the kernel; whether it could be done.

    By default glibc maps blocks above 32 MiB anew each time, and returns freed memory at the end of the heap, so each step
    pays page faults for blocks that it has held before. Call once a process, before training. Elsewhere than on Linux with
    glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_IN_ALL))
