import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fits


@pytest.fixture
def on_ranks():
    """Run a function of (rank, *args) in as many processes as asked for, as a launcher would have started them."""
    return fits.on_ranks
