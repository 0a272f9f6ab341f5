"""What makes the activations of two configs the same: compared before a cache is read or written on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hedgelab.errors import UserError

Identity = Mapping[str, Any]
"""Keys of section ``data`` (``model``, ``hook``, …) with the values that raw activations depend on."""

_SHOWN = 72
_WINDOWS, _WINDOW_BYTES = 256, 4096


def check_identity(folder: Path, cached: Identity, wanted: Identity) -> None:
    """Make sure that a cache holds what a config asks for.

    Raises:
        UserError: It does not; names the first key that differs, and both values.
    """
    for key, value in wanted.items():
        if cached.get(key) != value:
            raise UserError(
                f"data.{key}: the cache in '{folder}' holds {_shown(cached.get(key))}, this config asks for "
                f"{_shown(value)}; correct the key, or give data.cache a folder of its own"
            )


def files_fingerprint(folder: Path) -> str:
    """A digest of a model's folder: its ``config.json`` whole; of each weights file the size, head and even samples.

    Samples (256 windows of 4 KiB a file) tell models apart that differ in most of their numbers, as training leaves
    them, in a fraction of the time that reading gigabytes would take.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b"")
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for window in range(_WINDOWS):
                file.seek(window * max(0, size - _WINDOW_BYTES) // (_WINDOWS - 1))
                digest.update(file.read(_WINDOW_BYTES))
    return digest.hexdigest()[:16]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
