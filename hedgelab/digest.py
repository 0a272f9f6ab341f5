"""Digests of input files: all of a file's bytes, read once and remembered while the file stays as it is."""

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

    A digest is remembered with the file's size, inode and times of change (the inode's own tells of edits that set the other
    back), and computed anew when one differs. ``memory`` is a JSON file that remembers digests for other processes.
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
        with contextlib.suppress(OSError):  # a memory that cannot be written is no reason to stop
            if memory is not None:
                memory.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{memory}.lock"):
                    unfinished = memory.with_suffix(f".{os.getpid()}")
                    unfinished.write_text(json.dumps(_load(memory) | {key: _remembered[key]}))
                    unfinished.replace(memory)
    return digest


def _load(memory: Path | None) -> dict[str, list[object]]:
    """What a memory holds; nothing where it is missing or damaged."""
    try:
        document = json.loads(memory.read_text()) if memory else {}
    except (OSError, ValueError):
        return {}
    entries = document.items() if isinstance(document, dict) else ()
    return {key: value for key, value in entries if isinstance(value, list)}
