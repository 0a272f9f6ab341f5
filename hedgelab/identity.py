"""What decides the numbers of a run, against what only says where and how it runs: one list, which everybody asks.

Whether a run has *finished*, which run ``--resume`` goes on with, which cells of a sweep and which phases of a hedging
degree are there already, and which scores of an evaluation hold: all of it is decided by :func:`deciding`.

* What decides: arguments of classes, seeds, the number of steps, limits that cut an epoch short; the *code* of the classes
  (of hedgelab's own its release, of others the source of their module and of the modules of the user's that it imports);
  the *content* of files and folders that arguments name.
* What does not: caches, devices, strategies, folders, how steps are chunked, loggers, logging and checkpoint intervals.

A class says so once, beside its signature, and its subclasses inherit it::

    class MyData(ActivationDataModule):
        where_and_how = frozenset({"scratch_dir"})       # these arguments change no number
        inputs = {"table": Path}                         # this argument names a file, whose content decides

``where_and_how = EVERYTHING`` says it of a whole class, such as a callback that only watches. ``max_time`` is on the list of
what does not decide because a run that it cuts is never taken as finished: it goes on.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import hedgelab
from hedgelab.digest import file_digest

EVERYTHING = frozenset({"*"})
"""Marks a class none of whose arguments decides a number, nor whether it is there at all."""
SCHEME = "2"
"""Which rules made an id; finished runs of other schemes are not recognised by their id."""
_HASHED = 16
_SECTIONS = frozenset(
    {"config", "name", "experiment", "ckpt_path", "resume", "retrain", "record", "progress", "checkpoint", "sweep"}
)
_OF_THE_TRAINER = frozenset(
    {
        "accelerator", "strategy", "devices", "num_nodes", "plugins", "default_root_dir", "logger", "profiler", "max_time",
        "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "num_sanity_val_steps",
        "use_distributed_sampler", "benchmark", "inference_mode", "detect_anomaly", "enable_autolog_hparams",
        "model_registry", "barebones",
    }
)  # fmt: skip
_READ_FROM = frozenset({"model", "data"})  # what paths elsewhere name may be written to
_ONLY_WATCH = frozenset(
    {
        "Timer", "ModelCheckpoint", "OnExceptionCheckpoint", "LearningRateMonitor", "DeviceStatsMonitor", "ModelSummary",
        "RichModelSummary", "ThroughputMonitor", "ProgressBar", "TQDMProgressBar", "RichProgressBar",
    }
)  # fmt: skip


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved config decides numbers, as plain values.

    Args:
        config: A resolved config, or one of its sections; classes are named by ``class_path`` and ``init_args``.

    Returns:
        The deciding keys, and under ``code`` a digest of the code of every class named, under ``inputs`` one of the content
        of every file named.

    >>> deciding({"seed_everything": 1, "name": "x", "trainer": {"max_steps": 9, "devices": 2}})["trainer"]
    {'max_steps': 9}
    """
    walk = _Walk()
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in _SECTIONS:
            continue
        section = (
            {name: one for name, one in value.items() if name not in _OF_THE_TRAINER} if key == "trainer" else value
        )
        kept[key] = walk.plain(section, (key,))
    kept = {key: value for key, value in kept.items() if value is not None and value is not _NOTHING}
    return {**kept, "code": dict(sorted(walk.code.items())), "inputs": dict(sorted(walk.inputs.items()))}


def stable_id(facts: Mapping[str, Any]) -> str:
    """Hash of plain values that, together, decide an outcome; of hedgelab's release too.

    >>> stable_id({"a": 1, "b": 2}) == stable_id({"b": 2, "a": 1})
    True
    """
    text = json.dumps({"hedgelab": hedgelab.__version__, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASHED]


def where_and_how(cls: Any) -> frozenset[str]:
    """The arguments of a class that change no number, those of its parents included."""
    marked: frozenset[str] = frozenset()
    for parent in getattr(cls, "__mro__", ()):
        marked |= frozenset(vars(parent).get("where_and_how", ()))
        if parent.__module__.startswith("lightning.") and parent.__name__ in _ONLY_WATCH:
            return EVERYTHING
    return marked


def decides(config: Mapping[str, Any], key: Sequence[str | int]) -> bool:
    """Whether a key of a resolved config decides numbers.

    Args:
        config: The resolved config: its classes say what does not.
        key: The key, part by part, ``init_args`` among them.
    """
    if key[0] in _SECTIONS or (key[0] == "trainer" and len(key) > 1 and key[1] in _OF_THE_TRAINER):
        return False
    node: Any = config
    for part, following in zip(key, [*key[1:], None], strict=True):
        if _marks(node) == EVERYTHING or (part == "init_args" and following in _marks(node)):
            return False
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return True
    return _marks(node) != EVERYTHING


def _marks(node: Any) -> frozenset[str]:
    """What the class that a part of a config names says of its arguments."""
    named = isinstance(node, Mapping) and "class_path" in node
    return where_and_how(imported(str(node["class_path"]))) if named else frozenset()


def without_watchers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config without those of the trainer's callbacks that only watch. Imports nothing that a record names."""
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    if not isinstance(trainer, Mapping) or not isinstance(callbacks, list):
        return dict(config)
    loaded = [sys.modules.get(str(one.get("class_path")).rpartition(".")[0]) is not None for one in callbacks]
    kept = [one for one, there in zip(callbacks, loaded, strict=True) if not there or _marks(one) != EVERYTHING]
    return {**config, "trainer": {**trainer, "callbacks": kept or None}}


def code_of(item: Any) -> str:
    """A digest of the code behind a class or function: hedgelab's release, or the sources that it comes from."""
    module = sys.modules.get(getattr(item, "__module__", ""))
    if module is None:
        return "unknown"
    if _is_below(module, "hedgelab"):
        return f"hedgelab {hedgelab.__version__}"
    digest = hashlib.sha256()
    for name, source in sorted(_sources(module).items()):
        digest.update(f"{name} {hashlib.sha256(source).hexdigest()}\n".encode())
    return digest.hexdigest()[:_HASHED]


def content_of(path: Path) -> str:
    """A digest of all of a file, or of all files in a folder and their names; remembered as long as they do not change."""
    if path.is_file():
        return file_digest(path)[:_HASHED]
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path)} {content_of(file)}\n".encode())
    return digest.hexdigest()[:_HASHED]


class _Walk:
    """Goes through a config once, and collects the code and the inputs that it names."""

    def __init__(self) -> None:
        self.code: dict[str, str] = {}
        self.inputs: dict[str, str] = {}

    def plain(self, value: Any, key: tuple[str, ...], name_input: Callable[[Any], Any] | None = None) -> Any:
        """A value of the config without what does not decide."""
        if isinstance(value, Mapping):
            if "class_path" in value:
                return self._made(value, key)
            return self._kept(value, key)
        if isinstance(value, (list, tuple)):
            parts = [self.plain(one, (*key, str(number)), name_input) for number, one in enumerate(value)]
            return [part for part in parts if part is not _NOTHING]
        self._note_input(value, key, name_input)
        return value

    def _made(self, value: Mapping[str, Any], key: tuple[str, ...]) -> Any:
        path, cls = str(value["class_path"]), imported(str(value["class_path"]))
        marked = where_and_how(cls)
        if marked == EVERYTHING:
            return _NOTHING
        path = f"{cls.__module__}.{cls.__qualname__}" if inspect.isclass(cls) else path
        if cls is not None:
            self.code[path] = code_of(cls)
        named: Mapping[str, Callable[[Any], Any]] = getattr(cls, "inputs", None) or {}
        arguments = {name: one for name, one in (value.get("init_args") or {}).items() if name not in marked}
        own = path.rpartition(".")[2] if path.startswith("hedgelab.") else path  # hedgelab's may move between modules
        return {"class_path": own, "init_args": self._kept(arguments, key, named)}

    def _kept(
        self, values: Mapping[str, Any], key: tuple[str, ...], named: Mapping[str, Callable[[Any], Any]] | None = None
    ) -> dict[str, Any]:
        """Values by name; what is not set, and what does not decide, is left out."""
        inner = {
            str(name): self.plain(one, (*key, str(name)), (named or {}).get(str(name))) for name, one in values.items()
        }
        return {name: one for name, one in inner.items() if one is not _NOTHING and one is not None}

    def _note_input(self, value: Any, key: tuple[str, ...], name_input: Callable[[Any], Any] | None) -> None:
        """Remember the content of what a value names: told by the class, or seen by a path that is there."""
        found = value if name_input is None else name_input(value)
        seen = key[0] in _READ_FROM and isinstance(value, str) and _looks_like_a_path(value)
        if name_input is None and not seen:
            return
        if isinstance(found, (str, Path)) and _exists(found):
            self.inputs[".".join(key)] = content_of(Path(found))
        elif name_input is not None and isinstance(found, str):
            self.inputs[".".join(key)] = found


_NOTHING: Any = object()


def imported(path: str) -> Any:
    """What a class path names; None where it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except (ImportError, ValueError):
        return None


def _looks_like_a_path(value: str) -> bool:
    return len(value) < 1000 and "\n" not in value and ("/" in value or "." in value)


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _sources(module: ModuleType) -> dict[str, bytes]:
    """The source of a module, and of those modules of the user's that it takes names from, by name."""
    found: dict[str, bytes] = {}
    left = [module]
    while left:
        one = left.pop()
        if one.__name__ in found:
            continue
        found[one.__name__] = _source(one)
        left += [other for other in _imported_by(one) if not _is_installed(other)]
    return found


def _imported_by(module: ModuleType) -> Iterator[ModuleType]:
    for value in list(vars(module).values()):
        name = getattr(value, "__module__", None)
        other = value if isinstance(value, ModuleType) else sys.modules.get(name) if isinstance(name, str) else None
        if other is not None and other is not module:
            yield other


def _source(module: ModuleType) -> bytes:
    file = getattr(module, "__file__", None)
    try:
        return Path(file).read_bytes() if file else inspect.getsource(module).encode()
    except (OSError, TypeError):
        return b""


def _is_installed(module: ModuleType) -> bool:
    """Whether a module belongs to hedgelab, to Python or to an installed package, rather than to the user."""
    file = getattr(module, "__file__", None)
    if file is None or _is_below(module, "hedgelab"):
        return True
    place = Path(file)
    return "site-packages" in place.parts or "dist-packages" in place.parts or place.is_relative_to(_STDLIB)


def _is_below(module: ModuleType, package: str) -> bool:
    return module.__name__.partition(".")[0] == package


_STDLIB = Path(sysconfig.get_path("stdlib"))
