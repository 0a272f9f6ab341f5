"""``session.sh`` walks through on a CPU, so that a GPU is never the first to run any part of it."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is missing")
def test_a_dry_run(tmp_path):
    pytest.importorskip("transformers", reason="needs hedgelab[llm]")
    command = ["bash", Path(__file__).with_name("session.sh"), "--dry-run", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "session.json").read_text())
    assert found["kernels"]["failed checks"] == 0
    assert {"decoder loss TopK k 2", "step TopK, ours"} <= found["kernels"].keys()
    assert [row["sae"] for row in found["steps"]] == ["topk"]
    assert found["synth"]["BatchTopK"]["samples_per_s"] > 0
    table = (tmp_path / "session.md").read_text()
    assert "| topk, dry |" in table
    assert "torch" in table.splitlines()[0]
