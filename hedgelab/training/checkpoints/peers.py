"""Ranks that die: the others end soon, whatever they are waiting for, and each says so in a line."""

import math
import os
import re
import signal
import sys
import threading
import time
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.launchers import subprocess_script
from torch import distributed as dist

from hedgelab.errors import SIGNALS, one_line

GRACE = 20.0  # seconds in which a process may end by itself, its run closed in the tracking store, once another is gone
_MAIN, _RANK = "HEDGELAB_MAIN_PROCESS", "LOCAL_RANK"
_POLL = 0.1
_ORDERLY = (0, *(128 + number for number in (*SIGNALS, signal.SIGINT)))
_BROKEN = re.compile(r"gloo/transport/|Connection (closed|reset) by peer|ncclRemoteError|NCCL communicator was aborted")


def lost(error: Exception) -> str | None:
    """The line about an exception that another rank's death has caused; None of any other."""
    kinds = (dist.DistNetworkError, dist.DistStoreError) if dist.is_available() else ()
    if not isinstance(error, RuntimeError) or not (isinstance(error, kinds) or _BROKEN.search(str(error))):
        return None
    reason = one_line(re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition(". ")[0])
    return _line(f"cannot reach another rank, which has died or lost its network ({reason})")


def watch() -> None:
    """Have this process end soon after one that it depends on: a rank after the process that started it, and the reverse."""
    # Torchrun, srun and a sweep's executor see to their processes themselves.
    if TorchElasticEnvironment.detect() or SLURMEnvironment.detect() or "SUBMITIT_EXECUTOR" in os.environ:
        return
    if _RANK not in os.environ:
        os.environ[_MAIN] = str(os.getpid())
        if (observer := getattr(subprocess_script, "_ChildProcessObserver", None)) is not None:
            observer._terminate_all = _end_after_child
    elif _MAIN in os.environ:
        threading.Thread(target=_end_after_main_process, name="hedgelab-parent", daemon=True).start()


def main_process_ends(seconds: float = GRACE / 2) -> bool:
    """Whether the process that started this rank ends within some seconds; False in that process itself."""
    return _MAIN in os.environ and os.environ.get(_RANK, "0") != "0" and _outlived(int(os.environ[_MAIN]), seconds)


def _outlived(parent: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < end:
        time.sleep(_POLL)
    return os.getppid() != parent


def _end_after_child(observer: Any) -> None:
    """In the main process, once one that it has started is dead: Lightning would kill all of them on the spot."""
    children = observer._child_processes
    dead = [rank for rank, child in enumerate(children, start=1) if child.returncode not in (*_ORDERLY, None)]
    if dead:  # and not stopped by a signal, as this one is
        time.sleep(GRACE)
        for child in children:
            child.kill()
        _leave(f"rank {dead[0]} has died, and this one waits for it in vain")


def _end_after_main_process() -> None:
    _outlived(int(os.environ[_MAIN]), math.inf)
    time.sleep(GRACE / 4)
    _leave("rank 0 has died")


def _leave(what: str) -> None:
    sys.stderr.write(f"hedgelab: {_line(what)}\n")
    sys.stderr.flush()
    os._exit(1)


def _line(what: str) -> str:
    return f"rank {os.environ.get('RANK') or os.environ.get(_RANK) or 0}: {what}; go on with --resume"
