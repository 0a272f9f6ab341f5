"""Triton kernels for CUDA: top-k selection, decode, and gradients; to be imported only where :func:`available` says so."""

import os
from functools import cache

import torch


@cache
def available() -> bool:
    """Whether the kernels can run: Triton is installed and has a CUDA device, or its CPU interpreter is switched on."""
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return False
    try:
        import triton.language  # noqa: F401
    except ImportError:
        return False
    return True
