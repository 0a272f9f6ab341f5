"""``hedgelab ui``: its servers end with it."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from hedgelab.cli import main, ui

SERVER = """
import json, os, subprocess, sys, time
workers = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
with open("pids.part", "w") as file:
    json.dump([os.getpid(), *(worker.pid for worker in workers)], file)
os.rename("pids.part", "pids")
time.sleep(600)
"""


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 0)])
def test_a_signal_ends_the_servers_too(number, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    Path("mlflow.db").write_text("")
    monkeypatch.setattr(ui, "check_database", lambda database: None)
    monkeypatch.setattr(ui, "server_command", lambda *_: [sys.executable, "-c", SERVER])

    def stop():
        while not Path("pids").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    assert main(["ui", "--port=5963"]) == code
    pids = json.loads(Path("pids").read_text())
    assert len(pids) == 3
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if alive(pid)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_server_that_ends_by_itself_says_how(tmp_path):
    assert ui.serve([sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_no_wait_for_a_server_is_without_end(monkeypatch):
    """A signal that comes just before such a wait would be noticed after it only."""
    waits, wait = [], ui.subprocess.Popen.wait

    def spied(server, timeout=None):
        waits.append(timeout)
        return wait(server, timeout)

    monkeypatch.setattr(ui.subprocess.Popen, "wait", spied)
    assert ui.serve([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert waits
    assert None not in waits
