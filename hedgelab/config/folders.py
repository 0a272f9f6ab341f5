"""Where a command may write: below the working folder and the store, and where the command line says, in so many words.

A config may come from someone else. Folders that it names elsewhere are refused, unless the user repeats them on the
command line, or lists the folder in the environment variable HEDGELAB_FOLDERS (separated by colons), as one does for a
cluster's scratch disk.

Whatever the trainer and its callbacks are told may be a place to write to, for they come from other libraries too: any
path in their sections counts, an absolute one or one with ``..`` in it, and any address of a local store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hedgelab.errors import UserError
from hedgelab.tracking.store import runs_dir, tracking_uri

ALLOWED = "HEDGELAB_FOLDERS"
_SECTIONS = {"trainer", "checkpoint"}
_TEXTS = {"class_path", "description", "run_name", "experiment", "tags"}
_WRITTEN_TO = {"dirpath", "default_root_dir", "cache_dir", "save_dir", "log_dir", "root_dir", "output_dir"}


def check_folders(config: Mapping[str, Any], said: Mapping[str, Any], also: frozenset[str] = frozenset()) -> None:
    """See that a config names no folder to write to outside those that are the user's choice.

    Args:
        config: The resolved config.
        said: What the command line itself says, as a tree.
        also: Full keys of other folders that this command writes to.

    Raises:
        UserError: It does.
    """
    own = set(_folders(said, also))
    for key, folder in _folders(config, also):
        if (key, folder) not in own and not _is_inside(folder):
            raise UserError(
                f"{key}: '{folder}' lies outside the working folder; a config may write there only if the command line says "
                f"so too (--{key}={folder}), or the environment variable {ALLOWED} lists a folder above it"
            )


def names_folder(key: str) -> bool:
    """Whether an option of this dotted key may name a folder that is written to."""
    return key.rsplit(".", 1)[-1] in _WRITTEN_TO | {"uri"}


def _folders(tree: Any, also: frozenset[str], key: str = "") -> Iterator[tuple[str, str]]:
    """Every folder that may be written to, with its key, init_args left out."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            at = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            if isinstance(value, str) and name not in _TEXTS:
                yield from ((at, place) for place in _places(value, at, name in _WRITTEN_TO or at in also))
            elif name not in _TEXTS:
                yield from _folders(value, also, at)
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _folders(value, also, f"{key}[{number}]")


def _places(value: str, key: str, is_folder: bool) -> Iterator[str]:
    """The place on this machine that a value names, if it is one to write to."""
    if store := re.match(r"(?:sqlite(?:\+\w+)?:///|file:(?://)?)([^?]*)", value):
        yield store[1]
        return
    leads_out = value.startswith(("/", "~")) or ".." in Path(value).parts
    if not re.match(r"\w+://", value) and (is_folder or (key.split(".")[0] in _SECTIONS and leads_out)):
        yield value


def _is_inside(folder: str) -> bool:
    """Whether a folder lies in one that may be written to, links followed."""
    listed = [Path(name) for name in os.environ.get(ALLOWED, "").split(":") if name]
    wanted = Path(folder).expanduser().resolve()
    return any(wanted.is_relative_to(root.resolve()) for root in (Path.cwd(), runs_dir(tracking_uri()), *listed))
