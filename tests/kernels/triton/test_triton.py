"""Runs ``triton_cases.py`` in a process of its own: Triton decides at import whether its kernels are interpreted."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hedgelab.kernels import triton as kernels

CASES = Path(__file__).with_name("triton_cases.py")


def has_triton() -> bool:
    """Whether Triton itself is installed; a folder of that name is not enough."""
    try:
        return importlib.util.find_spec("triton.language") is not None
    except ModuleNotFoundError:
        return False


triton_missing = pytest.mark.skipif(not has_triton(), reason="Triton is missing")


def run_cases(*options: str, **environment: str) -> str:
    """Run cases; the output, with a failure if any failed or none ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *options, str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@triton_missing
def test_kernels_of_a_step_in_the_cpu_interpreter() -> None:
    few = "(a_k_sparse and plain-dtype0) or any_rows"
    assert " passed" in run_cases("-k", few, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
@triton_missing
def test_all_cases_in_the_cpu_interpreter() -> None:
    assert " passed" in run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@triton_missing
def test_all_cases_on_the_gpu() -> None:
    if os.environ.get("HEDGELAB_GPU_DRY_RUN"):
        pytest.skip("a dry run has no GPU; the interpreter's test runs these cases")
    assert torch.cuda.is_available(), "the gpu marker asks for a CUDA device"
    assert " passed" in run_cases(TRITON_INTERPRET="0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpu_or_interpreter_the_kernels_stand_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    kernels.available.cache_clear()
    assert not kernels.available()
    kernels.available.cache_clear()
