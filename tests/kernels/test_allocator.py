"""Blocks of up to 64 MiB stay in the process's heap."""

import subprocess
import sys

import pytest
import torch

from hedgelab.kernels.allocator import scratch

PROGRAM = """
import ctypes, sys, torch
from hedgelab.kernels.allocator import keep_large_blocks

class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                                                     "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
if not hasattr(libc, "mallinfo2") or not keep_large_blocks():
    raise SystemExit(7)
libc.mallinfo2.restype = MallInfo

def mapped_by(mebibytes):
    before = libc.mallinfo2().hblks
    block = torch.empty(mebibytes, 1 << 18)
    return libc.mallinfo2().hblks - before

print(mapped_by(48), mapped_by(96))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_blocks_up_to_the_limit_come_from_the_heap_and_larger_ones_are_mapped():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    if done.returncode == 7:
        pytest.skip("not glibc, or one too old to tell")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]


@pytest.mark.parametrize("rows", [0, 1, 2**14 - 1, 2**14])
def test_scratch_can_be_written_whatever_its_size(rows):
    block = scratch(rows, 1024, torch.float32)  # the largest is mapped
    assert block.shape == (rows, 1024)
    assert block.fill_(2.0).sum() == 2048.0 * rows
