"""Where a command may write: below the working folder and the store, and where the command line says, in so many words.

A config may come from someone else. Folders of this machine that it names elsewhere are refused, unless the user repeats them
on the command line, or lists a folder above them in the environment variable HEDGELAB_FOLDERS (separated by colons). In the
sections of the trainer and its callbacks any path counts that is absolute or has ``..`` in it; anywhere any address of a local
file or database. Remote addresses (``s3://``) are not checked, nor is what the code of a class does that a config names.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hedgelab.config.tree import compose, options_of
from hedgelab.errors import UserError
from hedgelab.tracking.store import runs_dir, tracking_uri

ALLOWED = "HEDGELAB_FOLDERS"
_TEXTS = {"class_path", "description", "run_name", "experiment", "tags"}
_LOCAL = re.compile(r"(?i:file|local):(?://)?(?P<path>.*)", flags=re.DOTALL)
_DATABASE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]*)")
_WRITTEN_TO = {"dirpath", "default_root_dir", "cache_dir", "save_dir", "log_dir", "root_dir", "output_dir"}


def check_folders(config: Mapping[str, Any], words: Sequence[str], also: frozenset[str] = frozenset()) -> None:
    """See that a resolved config names no folder to write to but where the user has it, or the words name it themselves.

    ``also`` are full keys of other folders that this command writes to.
    """
    said = [f"--{key}={text}" for key, text in options_of([*words]) if key not in ("config", "c") and text is not None]
    listed = [Path(name) for name in os.environ.get(ALLOWED, "").split(":") if name]
    roots = [root.resolve() for root in (Path.cwd(), runs_dir(tracking_uri()), *listed)]
    own = set(_folders(compose(said), also))
    for key, folder in _folders(config, also):
        if (key, folder) not in own and not any(folder.resolve().is_relative_to(root) for root in roots):
            outside = f"'{folder}' lies outside the working folder; a config may write there only if the command line"
            above = f"the environment variable {ALLOWED} lists a folder above it"
            raise UserError(f"{key}: {outside} says so too (--{key}={folder}), or {above}")


def names_folder(key: str) -> bool:
    """Whether an option of this dotted key may name a folder that is written to."""
    return key.rsplit(".", 1)[-1] in _WRITTEN_TO | {"uri"}


def _folders(tree: Any, also: frozenset[str], key: str = "") -> Iterator[tuple[str, Path]]:
    """Every folder that may be written to, with its key, init_args left out."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            at = key if name == "init_args" else f"{key}.{name}".lstrip(".")
            if name not in _TEXTS:
                yield from _folders(value, also, at)
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            if not isinstance(value, str):
                yield from _folders(value, also, f"{key}[{number}]")
    elif isinstance(tree, str):
        yield from ((key, place) for place in _places(tree, key, key.rsplit(".", 1)[-1] in _WRITTEN_TO or key in also))


def _places(value: str, key: str, is_folder: bool) -> Iterator[Path]:
    """The places on this machine that a value may lead to, if it is one to write to."""
    if found := list(local_paths(value)):
        yield from found
    elif "://" not in value:
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
    for part in address.split("::"):  # fsspec's chains, such as simplecache::file:///x
        if found := _LOCAL.fullmatch(part):
            host_or_path = found["path"]
            readings = [host_or_path, host_or_path[max(0, host_or_path.find("/")) :]]
        elif found := _DATABASE.match(part):
            readings = [found["path"]]
        else:
            readings = [part] if "::" in address and "/" in part and ":" not in part else []
        for text in readings:
            yield from (Path(text).expanduser(), Path(unquote(text)))
