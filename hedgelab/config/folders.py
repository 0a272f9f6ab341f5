"""Where a command may write: below the working folder and the store, and where the command line says, in so many words.

A config may come from someone else. Folders of this machine that it names elsewhere are refused, unless the user repeats them
on the command line, or lists a folder above them in the environment variable HEDGELAB_FOLDERS (separated by colons), as one
does for a cluster's scratch disk.

In the sections of the trainer and its callbacks, which come from other libraries too, any path counts that is absolute or has
``..`` in it; anywhere any address of a local file or database, in every spelling that a library may read. Remote addresses
(``s3://``) are not checked, nor is what the code of a class does that a config names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hedgelab.errors import UserError
from hedgelab.tracking.store import runs_dir, tracking_uri

ALLOWED = "HEDGELAB_FOLDERS"
_TEXTS = {"class_path", "description", "run_name", "experiment", "tags"}
_DATABASE = re.compile(r"sqlite(?:\+\w+)?:///([^?]*)")
_WRITTEN_TO = {"dirpath", "default_root_dir", "cache_dir", "save_dir", "log_dir", "root_dir", "output_dir"}


def check_folders(config: Mapping[str, Any], said: Mapping[str, Any], also: frozenset[str] = frozenset()) -> None:
    """See that a resolved config names no folder to write to but where the user, or what the command line said, has it.

    ``also`` are full keys of other folders that this command writes to.
    """
    listed = [Path(name) for name in os.environ.get(ALLOWED, "").split(":") if name]
    roots = [root.resolve() for root in (Path.cwd(), runs_dir(tracking_uri()), *listed)]
    own = set(_folders(said, also))
    for key, folder in _folders(config, also):
        if (key, folder) not in own and not any(folder.resolve().is_relative_to(root) for root in roots):
            raise UserError(
                f"{key}: '{folder}' lies outside the working folder; a config may write there only if the command line says "
                f"so too (--{key}={folder}), or the environment variable {ALLOWED} lists a folder above it"
            )


def names_folder(key: str) -> bool:
    """Whether an option of this dotted key may name a folder that is written to."""
    return key.rsplit(".", 1)[-1] in _WRITTEN_TO | {"uri"}


def _folders(tree: Any, also: frozenset[str], key: str = "") -> Iterator[tuple[str, Path]]:
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


def _places(value: str, key: str, is_folder: bool) -> Iterator[Path]:
    """The places on this machine that a value may lead to, if it is one to write to."""
    if found := list(local_paths(value)):
        yield from found
    elif "://" not in value and not _DATABASE.match(value):
        leads_out = value.startswith(("/", "~")) or ".." in Path(value).parts
        if is_folder or (key.split(".")[0] in ("trainer", "checkpoint") and leads_out):
            yield Path(value).expanduser()


def local_paths(address: str) -> Iterator[Path]:
    """The local paths that an address may lead to, by every way of reading it; none for a plain or a remote path.

    Libraries differ in whether the first part is a host or a folder, and in whether ``%2e`` is a dot.

    >>> [str(path) for path in local_paths("file://localhost/a/%2e%2e/b")]
    ['localhost/a/%2e%2e/b', 'localhost/a/../b', '/a/%2e%2e/b', '/a/../b']
    >>> [str(path) for path in local_paths("s3://bucket/a")]
    []
    """
    if database := _DATABASE.match(address):
        yield from (Path(database[1]), Path(unquote(database[1])))
        return
    for part in address.split("::"):  # fsspec's chains, such as simplecache::file:///x
        scheme, colon, rest = part.partition(":")
        if colon and scheme.lower() in ("file", "local"):
            body = rest.removeprefix("//")
            for text in (body, body[body.find("/") :] if "/" in body else body):
                yield from (Path(text), Path(unquote(text)))
        elif not colon and "::" in address and "/" in part:
            yield Path(part).expanduser()
