"""The kernels an SAE calls; each runs on the fastest path that fits, and :func:`backend` forces one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from hedgelab.kernels.reference import (
    decode,
    decode_levels,
    encode_batch_topk,
    encode_columns,
    encode_jumprelu,
    encode_relu,
    encode_threshold,
    encode_topk,
)

__all__ = [
    "Backend",
    "backend",
    "decode",
    "decode_levels",
    "encode_batch_topk",
    "encode_columns",
    "encode_jumprelu",
    "encode_relu",
    "encode_threshold",
    "encode_topk",
]

Backend = Literal["auto", "dense", "sparse"]
_backend: Backend = "auto"


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Force every kernel onto one path: ``dense`` (the reference), ``sparse`` (the fast one) or ``auto`` (by size)."""
    global _backend
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous
