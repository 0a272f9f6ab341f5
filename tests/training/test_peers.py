"""A process ends soon after one that it depends on, even where it waits for ever; errors of a broken connection are a line."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from lightning.fabric.strategies.launchers import subprocess_script
from torch import distributed as dist

from hedgelab.training.checkpoints import peers

SECONDS = 30.0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. Check the logs."),
            "rank 3: cannot reach another rank, which has died or lost its network (Connection closed by peer [127.0.0.1]:1); "
            "go on with --resume",
        ),
        (dist.DistNetworkError("The client socket has timed out\nafter 600s"), "(The client socket has timed out after 600s)"),
        (dist.DistBackendError("NCCL error in: x.cpp, remote: ncclRemoteError: A call failed"), "ncclRemoteError"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("Connection reset by peer"), None),
        (dist.DistBackendError("NCCL error: invalid usage, duplicate GPU"), None),
    ],
)
def test_what_a_broken_connection_says(error, said, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    line = peers.lost(error)
    assert (line is None) if said is None else (said in line and "\n" not in line)


def in_child(act):
    """Run something in a process of its own, which waits for ever after it: its id, and a pipe with what it says."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    try:
        os.setpgid(0, 0)
        os.close(reading)
        os.dup2(writing, 2)
        os.close(writing)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", peers._MAIN):
            os.environ.pop(name, None)
        peers.GRACE, peers._POLL = 0.2, 0.05
        act()
        time.sleep(SECONDS)
    finally:
        os._exit(99)


def all_said(reading):
    """Everything until all who hold the pipe have ended; what comes in time."""
    said, until = b"", time.monotonic() + SECONDS / 2
    while select.select([reading], [], [], max(0, until - time.monotonic()))[0]:
        part = os.read(reading, 1000)
        if not part:
            return said.decode()
        said += part
    return said.decode() + "(never ended)"


def test_main_process_ends_after_a_rank():
    def act():
        peers.watch()
        ranks = [subprocess.Popen(["sh", "-c", f"exec {what}"]) for what in ("sleep 60", "false")]
        subprocess_script._ChildProcessObserver(os.getpid(), ranks, sleep_period=0.1).start()

    pid, reading = in_child(act)
    try:
        assert (
            all_said(reading) == "hedgelab: rank 0: rank 2 has died, and this one waits for it in vain; go on with --resume\n"
        )
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def test_main_process_outlives_ranks_that_were_told_to_stop():
    def act():
        peers.watch()
        ranks = [subprocess.Popen(["sh", "-c", what]) for what in ("exit 143", "exit 0")]
        subprocess_script._ChildProcessObserver(os.getpid(), ranks, sleep_period=0.1).start()
        time.sleep(1.5)
        os.write(2, b"done")
        os._exit(7)

    pid, reading = in_child(act)
    try:
        assert all_said(reading) == "done"
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def test_rank_ends_after_the_main_process():
    def act():
        peers.watch()
        if os.fork() == 0:
            os.environ["LOCAL_RANK"] = "1"
            peers.watch()
            time.sleep(SECONDS)
            os._exit(99)
        os.kill(os.getpid(), signal.SIGKILL)

    pid, reading = in_child(act)
    try:
        assert all_said(reading) == "hedgelab: rank 1: rank 0 has died; go on with --resume\n"
    finally:
        os.waitpid(pid, 0)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def test_ranks_of_another_launcher_are_left_to_it(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.delenv(peers._MAIN, raising=False)
    peers.watch()
    assert peers._MAIN not in os.environ
