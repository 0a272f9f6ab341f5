"""Triton kernels for CUDA: top-k selection, decode, and gradients that touch only the latents that fired.

Import :mod:`hedgelab.kernels.triton.products` only where :func:`available` says so; elsewhere plain PyTorch does the same work.
The encoder product and the optimiser bound a step from below: at d_in 2304, d_sae 65536, k 25 and batch 4096 on an H100
(3 TB/s, 750 TFLOP/s in bf16)

====================================  ==============  ====
what                                  moves or does   ms
====================================  ==============  ====
encoder weights to bf16               0.9 GB          0.3
encoder product                       1.24 TFLOP      1.65
pre-activations, written and read     1.1 GB          0.35
decode: rows of ``W_dec`` gathered    0.5–0.9 GB      0.2–0.3
``W_dec`` and value gradients         1.1 GB          0.4
``W_enc`` gradient                    0.6 GB          0.2
``b_dec`` gradient through encoder    0.3 GB          0.1
Adam on 302M float32 parameters       8.5 GB          2.8
====================================  ==============  ====

in all about 6 ms, of which every product of dense autograd would add another 1.65.
"""

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
