"""Digests of input files: all of a file's bytes, read once and remembered while the file stays as it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from filelock import FileLock

_SETTLED_SECONDS = 2.0  # a file changed this lately may change again without its times showing it
_remembered: dict[str, list[object]] = {}


def file_digest(path: Path, memory: Path | None = None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    A digest is remembered with the file's size, inode and times of change, and is computed anew when one of them differs.
    Editing a file and setting its modification time back changes the inode's own time, so that this is noticed too.

    Args:
        path: The file.
        memory: A JSON file that remembers digests for other processes; None remembers them for this process.

    Raises:
        OSError: The file cannot be read.
    """
    key, stat = str(path.resolve()), path.stat()
    mark = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    for known in (_remembered, _load(memory)):
        if known.get(key, [])[:-1] == mark:
            return str(known[key][-1])
    started = time.time()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if started - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS:
        _remembered[key] = [*mark, digest]
        if memory is not None:
            _save(memory, key, _remembered[key])
    return digest


def _load(memory: Path | None) -> dict[str, list[object]]:
    """What a memory holds; nothing where it is missing or damaged."""
    try:
        document = json.loads(memory.read_text()) if memory else {}
    except (OSError, ValueError):
        return {}
    return (
        {key: value for key, value in document.items() if isinstance(value, list)} if isinstance(document, dict) else {}
    )


def _save(memory: Path, key: str, entry: list[object]) -> None:
    """Add an entry; a memory that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{memory}.lock"):
            unfinished = memory.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(_load(memory) | {key: entry}))
            unfinished.replace(memory)
