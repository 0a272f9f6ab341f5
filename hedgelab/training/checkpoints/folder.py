"""The folder of a run's checkpoints, and whether its run is the experiment of today's command, so that ``--resume`` finds it.

Its ``run.json`` holds the command and resolved config of the run, the keys of it that the user wrote, and whether it has
finished. A written key, then or now, whose value differs makes another experiment, if it decides numbers
(:mod:`hedgelab.identity`). A key that nobody wrote keeps the value of the run, so a changed default stays what it was; keys
that only one release knows, and those that decide nothing, are today's.
"""

import errno
import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hedgelab.errors import UserError
from hedgelab.identity import loaded, pruned
from hedgelab.training.checkpoints.files import write_atomically

ABSENT: Any = object()  # what a config has under a key that it does not have
Key = tuple[str | int, ...]
_ABOUT = "run.json"
_MOST_SHOWN = 60
_logger = logging.getLogger(__name__)


class RunFolder:
    """Checkpoints of one run, and what is known about it; the folder need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock")

    @property
    def about(self) -> dict[str, Any]:
        """What ``run.json`` says; nothing where it is missing or unreadable."""
        try:
            content = json.loads((self.path / _ABOUT).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None of an untracked one."""
        return self.about.get("run_id")

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end; releases up to 0.1.0 took one that ``max_time`` had cut for finished."""
        about = self.about
        max_time = ((about.get("config") or {}).get("trainer") or {}).get("max_time")
        return about.get("finished") is True and ("cut" in about or max_time is None)

    @property
    def members(self) -> dict[str, str | None]:
        """Runs of SAEs that are trained as one group, by name; None as the id of an untracked one."""
        return self.about.get("members") or {}

    def note(self, **facts: Any) -> None:
        """Add to what is known about the run."""
        outlook = "goes by what it said before" if self.about else "will not find this run"
        text = json.dumps({"created": time.time(), **self.about, **facts}, indent=2, default=str) + "\n"
        self.write(_ABOUT, text, f"--resume {outlook}")

    def write(self, name: str, text: str, otherwise: str) -> None:
        """Write a file of the folder; a disk that does not take it is named with what follows, and stops nothing."""
        try:
            write_atomically(self.path / name, lambda file: file.write(text.encode()))
        except OSError as error:
            _logger.warning("%s could not be written (%s); %s", self.path / name, error.strerror or error, otherwise)

    def claim(self, patience: float = 0.0) -> bool:
        """Keep other processes from this run while this one lives; whether one had to end first, in ``patience`` seconds."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a full disk costs checkpoints, not the run
                raise
            return False
        for seconds in (0.0, patience):
            try:
                self._lock.acquire(timeout=seconds)
                return seconds > 0
            except Timeout:
                if seconds < patience:
                    _logger.warning("another process still trains %s; waiting %.0f s for it", self.path, patience)
            except (OSError, NotImplementedError):  # a file system without locks, or without space
                return False
        run = f"{self.about.get('name') or self.path.name} ({self.path})"
        raise UserError(f"resume: another process is training run {run} right now; wait for it, or end it")

    def release(self) -> None:
        """Let others have the run."""
        self._lock.release(force=True)


def known_runs(root: Path) -> list[RunFolder]:
    """All runs that have left a record below ``runs/checkpoints``, or in one run's own folder, newest first."""
    folders = [RunFolder(path.parent) for path in (*root.glob(_ABOUT), *root.glob(f"*/{_ABOUT}"))]
    created = {folder: folder.about.get("created") for folder in folders}
    dated = {folder: when for folder, when in created.items() if isinstance(when, (int, float))}
    return sorted(dated, key=dated.__getitem__, reverse=True)


def named(root: Path, run_id: str) -> RunFolder:
    """The one run of an id, or of its first characters."""
    found = [path.parent for path in root.glob(f"*/{_ABOUT}") if path.parent.name.startswith(run_id)]
    if len(found) != 1:
        there = "no run" if not found else f"{len(found)} runs"
        raise UserError(f"resume: {there} '{run_id}' in {root}; expected an id that `hedgelab runs` lists, or nothing")
    return RunFolder(found[0])


@dataclass
class Match:
    """A run beside today's command: what makes them different experiments, and what of the run is kept."""

    folder: RunFolder
    conflicts: list[str] = field(default_factory=list)
    defaults: dict[Key, tuple[Any, Any]] = field(default_factory=dict)
    other_code: list[str] = field(default_factory=list)
    more_steps: tuple[int, int] | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing of it is left to be done."""
        return self.folder.finished and self.more_steps is None


def compare(folder: RunFolder, now: Mapping[str, Any]) -> Match:
    """Compare what a run's folder says of it, which must hold a config, with what it would say of today's command."""
    then, match = folder.about, Match(folder)
    steps = [one["config"].get("trainer", {}).get("max_steps") for one in (then, now)]
    if now["command"] == "fit" and all(isinstance(one, int) for one in steps) and 0 <= steps[0] < steps[1]:
        match.more_steps = steps[0], steps[1]
    written = [*then.get("written", []), *now["written"]]
    before, after = ({"name": one["config"].get("name"), **pruned(one["config"], loaded)} for one in (then, now))
    for key, was, today in differences(before, after):
        name = dotted(key)
        on_both_sides = was is not ABSENT and today is not ABSENT
        itself = any(f"{one}.".startswith(f"{name}.") for one in written)
        if itself or (on_both_sides and any(name.startswith(f"{one}.") for one in written)):
            if name != "trainer.max_steps" or match.more_steps is None:
                match.conflicts.append(f"{name} ({show(was)} there, {show(today)} here)")
        elif on_both_sides:
            match.defaults[key] = was, today
    inputs, code = then.get("inputs") or {}, then.get("code") or {}
    changed = [key for key, content in now["inputs"].items() if inputs.get(key, content) != content]
    match.conflicts += [f"the content of {key}" for key in changed]
    match.other_code = [path for path, digest in now["code"].items() if _is_other_code(code.get(path, digest), digest)]
    if match.finished:
        match.conflicts += [f"the code of {path}" for path in match.other_code]
    return match


def differences(then: Any, now: Any, key: Key = ()) -> Iterator[tuple[Key, Any, Any]]:
    """Every place where two configs differ, with both values; below another class, the class alone."""
    before, after, name = _parts(then), _parts(now), "class_path"
    mappings = isinstance(then, Mapping) and isinstance(now, Mapping)
    if mappings or (before and after and type(then) is type(now) and len(before) == len(after)):
        is_another_class = name in before and name in after and not _same(before[name], after[name])
        for part in [name] if is_another_class else {**before, **after}:
            yield from differences(before.get(part, ABSENT), after.get(part, ABSENT), (*key, part))
    elif not _same(then, now):
        yield key, then, now


def written_keys(tree: Any, resolved: Any, key: Key = ()) -> list[str]:
    """The keys that a user wrote, dotted; the config that came of it tells the name of a class from other text."""
    known = _parts(resolved)
    known = {**known.get("init_args", {}), **known}
    if parts := _parts(tree):
        lists = (written_keys(value, known.get(part), (*key, part)) for part, value in parts.items())
        return sorted(itertools.chain.from_iterable(lists))
    is_file = str(tree).endswith((".yaml", ".yml", ".json"))
    is_class = isinstance(tree, str) and isinstance(resolved, Mapping) and not is_file
    return [dotted((*key, "class_path") if is_class else key)]


def _parts(value: Any) -> dict[Any, Any]:
    """What stands below a key, by name, or in a list that holds mappings by number."""
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return dict(enumerate(value))
    return dict(value) if isinstance(value, Mapping) else {}


def as_option(key: Key, then: Any, now: Any) -> str | None:
    """The option that gives a key the value of then; None where that, which may be a stranger's, could name a class."""
    plain = then if isinstance(then, str) else json.dumps(then)
    kind = isinstance(now, str) if isinstance(then, str) else _is_number(then)
    named = key[-1] != "class_path" and all(isinstance(part, str) for part in key)
    return f"--{'.'.join(map(str, key))}={plain}" if named and kind else None


def dotted(key: Key) -> str:
    """A key as users write it."""
    return ".".join(str(part) for part in key if part != "init_args")


def show(value: Any) -> str:
    """A value, in a few words."""
    if value is ABSENT:
        return "absent"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 1]}…"


def _is_number(value: Any) -> bool:
    return all(map(_is_number, value)) if isinstance(value, list) else isinstance(value, (bool, int, float, type(None)))


def _same(then: Any, now: Any) -> bool:
    """Whether two values are equal; a class of hedgelab's may have moved to another of its modules."""
    if isinstance(then, str) and isinstance(now, str) and then.startswith("hedgelab.") and now.startswith("hedgelab."):
        return then.rpartition(".")[2] == now.rpartition(".")[2]
    return isinstance(then, bool) is isinstance(now, bool) and bool(then == now)


def _is_other_code(then: Any, now: str) -> bool:
    """Whether code differs; hedgelab's own may, for runs go on across releases."""
    return then != now and not (str(then).startswith("hedgelab ") and now.startswith("hedgelab "))
