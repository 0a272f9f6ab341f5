import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import slurm


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real SLURM of one node with two processors, for the session."""
    absent = slurm.missing_programs()
    if absent:
        pytest.skip(f"SLURM is not installed here: no {', '.join(absent)}")
    programs = Path(sys.executable).parent  # hedgelab and torchrun of this environment
    with slurm.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        running.environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        yield running
