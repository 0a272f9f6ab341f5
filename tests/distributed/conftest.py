import os
import socket
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def on_ranks(tmp_path):
    """Run a function of (rank, *args) in as many processes as asked for, as a launcher would have started them."""

    def run(count, function, *args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(_as_rank, (count, port, function, args), count, start_method="fork")

    return run


def _as_rank(rank, count, port, function, args):
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    function(rank, *args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
