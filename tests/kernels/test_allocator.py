"""Large blocks stay with the process."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from hedgelab.kernels.allocator import keep_large_blocks
if not keep_large_blocks():
    raise SystemExit(7)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12, 1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(8)))  # the kernel may take pages back at times
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_block_freed_and_taken_again_costs_no_page_faults():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    if done.returncode == 7:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500  # 48 MiB are 12 288 pages
