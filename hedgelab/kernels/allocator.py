"""Keep large blocks of memory in the process: a training step allocates the same gradients again and again."""

import ctypes
import sys
from functools import cache

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEEP = 2**31 - 1  # the largest value mallopt takes


@cache
def keep_large_blocks() -> bool:
    """Let glibc reuse freed blocks of any size instead of returning them to the kernel; whether it could be done.

    By default glibc maps every block above 32 MiB anew and returns freed memory at the end of the heap, so each step pays
    page faults for gradients that it has held before. Call once a process, before training. Elsewhere than on Linux with
    glibc nothing is done. Memory once used stays with the process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEEP)) and bool(mallopt(M_TRIM_THRESHOLD, KEEP))
