"""Whether an earlier run is the experiment of today's command: its stored config with today's written keys laid over it.

``run.json`` holds a run's resolved config and the keys of it that the user wrote. A written key, then or now, whose value
differs makes another experiment, if it decides numbers (:mod:`hedgelab.identity`). A key that nobody wrote keeps the value of
the run, so a changed default stays what it was; keys that only one release knows, and those that decide nothing, are today's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hedgelab.identity import loaded, pruned
from hedgelab.training.checkpoints.folder import RunFolder

ABSENT: Any = object()
"""What a config has under a key that it does not have."""
_FILES = (".yaml", ".yml", ".json")
_MOST_SHOWN = 60
Key = tuple[str | int, ...]


@dataclass
class Match:
    """A run beside today's command.

    Attributes:
        conflicts: What makes them different experiments, in words.
        defaults: Values of then and now of keys that nobody wrote, by the full key.
        other_code: Class paths whose code was another.
        more_steps: Steps of then and now, where a fit is to go on to a later end; None otherwise.
    """

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
    inputs = then.get("inputs") or {}
    changed = [key for key, content in now["inputs"].items() if inputs.get(key, content) != content]
    match.conflicts += [f"the content of {key}" for key in changed]
    code = then.get("code") or {}
    match.other_code = [path for path, digest in now["code"].items() if not _same_code(code.get(path, digest), digest)]
    if match.finished:
        match.conflicts += [f"the code of {path}" for path in match.other_code]
    return match


def differences(then: Any, now: Any, key: Key = ()) -> Iterator[tuple[Key, Any, Any]]:
    """Every place where two configs differ, with both values; below another class, the class alone."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        path = "class_path"
        another = path in then and path in now and not _same(then[path], now[path])
        names = [path] if another else list({**then, **now})
        for name in names:
            yield from differences(then.get(name, ABSENT), now.get(name, ABSENT), (*key, name))
    elif _holds_mappings(then) and _holds_mappings(now) and len(then) == len(now):
        for number, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from differences(a, b, (*key, number))
    elif not _same(then, now):
        yield key, then, now


def written_keys(tree: Any, resolved: Any, key: Key = ()) -> list[str]:
    """The keys that a user wrote, dotted; the config that came of it tells the name of a class from other text."""
    if isinstance(tree, Mapping) and tree:
        arguments = resolved.get("init_args", {}) if isinstance(resolved, Mapping) else {}
        below = {**arguments, **resolved} if isinstance(resolved, Mapping) else {}
        parts = [written_keys(value, below.get(name), (*key, name)) for name, value in tree.items()]
    elif _holds_mappings(tree):
        items = resolved if isinstance(resolved, list) and len(resolved) == len(tree) else [None] * len(tree)
        parts = [written_keys(value, items[number], (*key, number)) for number, value in enumerate(tree)]
    elif isinstance(tree, str) and isinstance(resolved, Mapping) and not tree.endswith(_FILES):
        parts = [[dotted((*key, "class_path"))]]
    else:
        parts = [[dotted(key)]]
    return sorted(name for part in parts for name in part)


def as_option(key: Key, then: Any, now: Any) -> str | None:
    """The option that gives a key the value of then; None where that could name something else than a plain value.

    The record of a run may come from someone else, and text may name a class where none is expected today.
    """
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


def _holds_mappings(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def _same(then: Any, now: Any) -> bool:
    """Whether two values are equal; a class of hedgelab's may have moved to another of its modules."""
    if isinstance(then, bool) is not isinstance(now, bool):
        return False
    if isinstance(then, str) and isinstance(now, str) and then.startswith("hedgelab.") and now.startswith("hedgelab."):
        return then.rpartition(".")[2] == now.rpartition(".")[2]
    return bool(then == now)


def _same_code(then: Any, now: str) -> bool:
    """Whether code is the same, or hedgelab's own, of any release: runs go on across releases."""
    return then == now or (str(then).startswith("hedgelab ") and now.startswith("hedgelab "))
