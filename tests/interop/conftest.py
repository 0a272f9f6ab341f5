"""Where the other libraries are: in this interpreter, or in the one that HEDGELAB_PEER_PYTHON names."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

PEER = Path(__file__).with_name("peer.py")


def peer_python():
    """An interpreter with SAELens; None where there is none."""
    if named := os.environ.get("HEDGELAB_PEER_PYTHON"):
        return named
    return sys.executable if find_spec("sae_lens") else None


@pytest.fixture(scope="session")
def run_peer():
    """Run jobs of ``peer.py`` in one process; gives the answers of those whose library is there, by name."""
    python = peer_python()
    if python is None:
        pytest.skip("SAELens is not installed; set HEDGELAB_PEER_PYTHON to an interpreter that has it")

    def run(jobs, folder):
        (folder / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [python, str(PEER), str(folder / "jobs.json")], capture_output=True, text=True, cwd=folder, timeout=900
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results = json.loads(done.stdout.split("RESULTS ")[-1])
        missing = {name: result for name, result in results.items() if result != "done"}
        return {job["name"]: load_file(job["answer"]) for job in jobs if job["name"] not in missing}, missing

    return run
