"""Files that are whole or not there, and the two newest checkpoints of a run among them.

A checkpoint is a zip archive (PyTorch's own format) that holds a CRC-32 of every part: reading all parts tells a torn or
rotten file from a whole one, whoever wrote it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fsspec import get_filesystem_class
from fsspec.utils import get_protocol

LAST, PREVIOUS, NEXT = "last.ckpt", "previous.ckpt", ".next.ckpt"
_BLOCK = 1 << 20


def is_remote(path: object) -> bool:
    """Whether a path names another place than this machine's file system, such as ``s3://bucket/folder``."""
    return get_protocol(str(path)) not in ("file", "local")


def local_path(path: object) -> str:
    """A path of this machine's file system without the protocol that it may be written with (``file://``)."""
    return str(path) if "://" not in str(path) else str(get_filesystem_class("file")._strip_protocol(str(path)))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Make a file that appears under its name only when all of it is on the disk.

    Args:
        path: Where it is to be; its folder is made if missing.
        write: Writes the content.

    Raises:
        OSError: The disk is full, or nothing may be written there; an older file of that name stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name.lstrip('.')}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def promote(folder: Path) -> Path:
    """Make the checkpoint that was just written the last one, and the last one the one before it.

    At every moment ``last.ckpt`` is there and whole: the old one gets its second name before it loses the first.
    """
    last, previous, aside = folder / LAST, folder / PREVIOUS, folder / ".previous.partial"
    if last.exists():
        aside.unlink(missing_ok=True)
        try:
            os.link(last, aside)
        except OSError:  # a file system without hard links
            last.replace(previous)
        else:
            aside.replace(previous)
    (folder / NEXT).replace(last)
    _sync_folder(folder)
    return last


def fault(path: Path) -> str | None:
    """Why a checkpoint cannot be used; None for a whole one. Nothing in the file is executed.

    Every part is read, which costs about as long as loading it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.compress_type != zipfile.ZIP_STORED:
                    return f"{part.filename} is compressed, which PyTorch never does"
                with archive.open(part) as content:
                    while content.read(_BLOCK):
                        pass
    except FileNotFoundError:
        return "no such file"
    except Exception as error:  # a damaged archive can fail in any way
        return " ".join(str(error).split()) or type(error).__name__
    return None


def newest_whole(folder: Path, report: Callable[[str], None] = lambda line: None) -> Path | None:
    """The newest checkpoint of a run that can be used; None without one.

    Args:
        folder: Folder of the run's checkpoints.
        report: Told, in a line, of each one that had to be passed over.
    """
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        trouble = fault(path)
        if trouble is None:
            return path
        report(f"{path} is damaged ({trouble}) and passed over")
    return None


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the file system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
