"""What makes the activations of two configs the same: compared before a cache is read or written on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from hedgelab.errors import UserError

Identity = Mapping[str, Any]
"""Keys of section ``data`` (``model``, ``hook``, …) with the values that raw activations depend on."""

_SHOWN = 72
_WINDOWS, _WINDOW_BYTES = 256, 4096


def check_identity(folder: Path, cached: Identity, wanted: Identity, earlier: Identity | None = None) -> None:
    """Make sure that a cache holds what a config asks for.

    Args:
        folder: The cache, for error lines.
        cached: What it holds.
        wanted: What the config asks for.
        earlier: Values that earlier releases wrote in place of the wanted ones.

    Raises:
        UserError: It does not; names the first key that differs, and both values.
    """
    for key, value in wanted.items():
        if cached.get(key) not in (value, (earlier or {}).get(key, value)):
            raise UserError(
                f"data.{key}: the cache in '{folder}' holds {_shown(cached.get(key))}, this config asks for "
                f"{_shown(value)}; correct the key, or give data.cache a folder of its own"
            )


def sampled_fingerprint(folder: Path, written: datetime) -> str | None:
    """What hedgelab 0.1.0 wrote for ``model`` into a cache: a digest of 256 windows of 4 KiB of each file of weights.

    The windows cover a file of up to 1 MiB. Of a larger file they may miss an edit, so they count only where the file has
    not changed since the cache was written.

    Args:
        folder: The model's folder.
        written: When the cache was written.

    Returns:
        None where the windows could miss an edit.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b"")
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        stat = path.stat()
        size = stat.st_size
        if size > _WINDOWS * _WINDOW_BYTES and max(stat.st_mtime, stat.st_ctime) >= written.timestamp():
            return None
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for window in range(_WINDOWS):
                file.seek(window * max(0, size - _WINDOW_BYTES) // (_WINDOWS - 1))
                digest.update(file.read(_WINDOW_BYTES))
    return f"weights {digest.hexdigest()[:16]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
