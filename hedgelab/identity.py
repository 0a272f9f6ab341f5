"""What decides the numbers of a run, against what only says where and how it runs: one list, which everybody asks.

Whether a run has *finished*, which one ``--resume`` goes on with, which cells of a sweep, phases of a hedging degree and scores
of an evaluation are there already: :func:`deciding` decides.

Arguments of classes decide, seeds, the number of steps, limits that cut an epoch short; the *code* of classes (of hedgelab's
own its release, of others the source of their module and of the modules of the user's that it imports); the *content* of files
and folders that arguments name. Caches, devices, strategies, folders, chunks, loggers and intervals do not.

A class says so once, beside its signature, and its subclasses inherit it::

    class MyData(ActivationDataModule):
        where_and_how = frozenset({"scratch_dir"})       # these arguments change no number
        inputs = {"table": Path}                         # this argument names a file, whose content decides

``where_and_how = EVERYTHING`` says it of a whole class, such as a callback that only watches. ``max_time`` does not decide
because a run that it cuts is never taken as finished: it goes on.
"""

import hashlib
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import hedgelab.version
from hedgelab.digest import file_digest

EVERYTHING = frozenset({"*"})
"""Marks a class none of whose arguments decides a number, nor whether it is there at all."""
SCHEME = "2"
"""Which rules made an id; finished runs of other schemes are not recognised by their id."""
_HASHED = 16
_NOTHING: Any = object()
_SECTIONS = {"config", "name", "experiment", "ckpt_path", "resume", "retrain", "record", "progress", "checkpoint", "sweep"}
_OF_THE_TRAINER = frozenset({
    "accelerator", "strategy", "devices", "num_nodes", "plugins", "default_root_dir", "logger", "profiler", "max_time",
    "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "num_sanity_val_steps",
    "use_distributed_sampler", "benchmark", "inference_mode", "detect_anomaly", "enable_autolog_hparams", "model_registry",
    "barebones",
})  # fmt: skip
_READ_FROM = frozenset({"model", "data"})  # what paths elsewhere name may be written to
_ONLY_WATCH = frozenset({
    "Timer", "ModelCheckpoint", "OnExceptionCheckpoint", "LearningRateMonitor", "DeviceStatsMonitor", "ModelSummary",
    "RichModelSummary", "ThroughputMonitor", "ProgressBar", "TQDMProgressBar", "RichProgressBar",
})  # fmt: skip


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved config, or of one of its sections, decides numbers, as plain values; what is not set is left out.

    Under ``code`` stands a digest of the code of every class named, under ``inputs`` one of the content of every file named.

    >>> deciding({"seed_everything": 1, "name": "x", "trainer": {"max_steps": 9, "devices": 2}})["trainer"]
    {'max_steps': 9}
    """
    code: dict[str, str] = {}
    inputs: dict[str, str] = {}

    def plain(value: Any, key: tuple[str, ...], name_input: Callable[[Any], Any] | None = None) -> Any:
        if isinstance(value, list):
            return [plain(one, (*key, str(number)), name_input) for number, one in enumerate(value)]
        if isinstance(value, Mapping):
            path: Any = value.get("class_path")
            cls, arguments = (None, value) if path is None else (imported(path), value["init_args"])
            if cls is not None:
                code[path] = code_of(cls)
            named = getattr(cls, "inputs", None) or {}
            found = {str(name): plain(one, (*key, str(name)), named.get(name)) for name, one in arguments.items()}
            found = {name: one for name, one in found.items() if one is not None}
            if path is None:
                return found
            short = path.rpartition(".")[2] if path.startswith("hedgelab.") else path  # may move between modules
            return {"class_path": short, "init_args": found}
        is_text = key[0] in _READ_FROM and isinstance(value, str) and len(value) < 1000 and "\n" not in value
        if name_input is not None or (is_text and ("/" in value or "." in value)):  # perhaps a path
            read = value if name_input is None else name_input(value)
            if isinstance(read, (str, Path)) and os.path.exists(read):  # noqa: PTH110 (False for what can be no path)
                inputs[".".join(key)] = content_of(Path(read))
            elif name_input is not None and isinstance(read, str):
                inputs[".".join(key)] = read
        return value

    found = {key: plain(value, (key,)) for key, value in pruned(config).items()}
    kept = {key: value for key, value in found.items() if value is not None}
    return {**kept, "code": dict(sorted(code.items())), "inputs": dict(sorted(inputs.items()))}


def pruned(config: Mapping[str, Any], find: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """A resolved config without what does not decide numbers, its classes by their full names; ``find`` imports them."""
    kept = {key: value for key, value in config.items() if key not in _SECTIONS}
    if isinstance(trainer := kept.get("trainer"), Mapping):
        kept["trainer"] = {name: value for name, value in trainer.items() if name not in _OF_THE_TRAINER}
    kept = {key: _without_marked(value, find or imported) for key, value in kept.items()}
    if (kept.get("trainer") or {}).get("callbacks") == []:
        kept["trainer"]["callbacks"] = None
    return {key: value for key, value in kept.items() if value is not _NOTHING}


def _without_marked(value: Any, find: Callable[[str], Any]) -> Any:
    """A value without the arguments that its classes mark; :data:`_NOTHING` for a class that decides nothing."""
    if isinstance(value, (list, tuple)):
        return [kept for one in value if (kept := _without_marked(one, find)) is not _NOTHING]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        kept = {name: _without_marked(one, find) for name, one in value.items()}
        return {name: one for name, one in kept.items() if one is not _NOTHING}
    path = str(value["class_path"])
    cls = find(path)
    if (marked := where_and_how(cls)) == EVERYTHING:
        return _NOTHING
    path = f"{cls.__module__}.{cls.__qualname__}" if inspect.isclass(cls) else path
    arguments = {name: one for name, one in (value.get("init_args") or {}).items() if name not in marked}
    return {"class_path": path, "init_args": _without_marked(arguments, find)}


def stable_id(facts: Mapping[str, Any]) -> str:
    """Hash of plain values that, together, decide an outcome; of hedgelab's release too.

    >>> stable_id({"a": 1, "b": 2}) == stable_id({"b": 2, "a": 1})
    True
    """
    text = json.dumps({"hedgelab": hedgelab.version.__version__, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASHED]


def where_and_how(cls: Any) -> frozenset[str]:
    """The arguments of a class that change no number, those of its parents included."""
    marked: frozenset[str] = frozenset()
    for parent in getattr(cls, "__mro__", ()):
        marked |= frozenset(vars(parent).get("where_and_how", ()))
        if parent.__module__.startswith("lightning.") and parent.__name__ in _ONLY_WATCH:
            return EVERYTHING
    return marked


def code_of(item: Any) -> str:
    """A digest of the code behind a class or function: hedgelab's release, or the sources that it comes from."""
    if (module := sys.modules.get(getattr(item, "__module__", ""))) is None:
        return "unknown"
    if module.__name__.partition(".")[0] == "hedgelab":
        return f"hedgelab {hedgelab.version.__version__}"
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


def imported(path: str) -> Any:
    """What a class path names; None where it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except (ImportError, ValueError):
        return None


def loaded(path: str) -> Any:
    """What a class path names, if its module is there already: nothing is imported that a stranger's record names."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _sources(module: ModuleType) -> dict[str, bytes]:
    """The source of a module, and of those modules of the user's that it takes names from, by name."""
    found: dict[str, bytes] = {}
    left = [module]
    while left:
        one = left.pop()
        if one.__name__ in found:
            continue
        found[one.__name__] = b""
        with suppress(OSError):
            found[one.__name__] = Path(getattr(one, "__file__", None) or "").read_bytes()
        for value in list(vars(one).values()):
            name = getattr(value, "__module__", None)
            other = value if isinstance(value, ModuleType) else sys.modules.get(name) if isinstance(name, str) else None
            if other is not None and not _is_installed(other):
                left.append(other)
    return found


def _is_installed(module: ModuleType) -> bool:
    """Whether a module belongs to hedgelab, to Python or to an installed package, rather than to the user."""
    place = Path(getattr(module, "__file__", None) or sysconfig.get_path("stdlib"))
    installed = module.__name__.partition(".")[0] == "hedgelab" or {"site-packages", "dist-packages"} & set(place.parts)
    return bool(installed) or place.is_relative_to(sysconfig.get_path("stdlib"))
