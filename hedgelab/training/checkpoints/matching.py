"""Whether two resolved configs are one experiment, though a release between them added, dropped or changed defaults."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_ARGUMENTS, _CLASS = "init_args", "class_path"
_FILES = (".yaml", ".yml", ".json")
_MOST_SHOWN = 60
Key = tuple[str | int, ...]


class _Absent:
    """What a config has under a key that it does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


class Difference(NamedTuple):
    """Where two configs differ.

    Attributes:
        key: The key, as it stands in a resolved config.
        then: Its value when the run was begun; :data:`ABSENT` for a key that was not known.
        now: Its value now; :data:`ABSENT` likewise.
    """

    key: Key
    then: Any
    now: Any

    @property
    def name(self) -> str:
        """The key as users write it."""
        return dotted(self.key)

    @property
    def shown(self) -> str:
        """Both values, in a few words."""
        return f"{self.name} ({show(self.then)} there, {show(self.now)} here)"


class Comparison(NamedTuple):
    """What separates two configs.

    Attributes:
        conflicts: What makes them different experiments.
        changed: Keys that nobody wrote, whose default was another when the run was begun.
        other_code: Class paths whose code was another.
    """

    conflicts: list[Difference]
    changed: list[Difference]
    other_code: Sequence[str] = ()


def compare(
    then: Mapping[str, Any],
    written_then: Sequence[str],
    now: Mapping[str, Any],
    written_now: Sequence[str],
    is_default: Callable[[Key], bool],
    counts: Callable[[Key], bool] = lambda key: True,
) -> Comparison:
    """Compare the config of a run with one of today.

    A key that only one side has does not count as long as it has its default there; neither does one that both have
    with different values, as long as nobody wrote it.

    Args:
        then: The resolved config that the run was begun with.
        written_then: What of it the user wrote (:func:`written_keys`).
        now: Today's.
        written_now: What of it the user wrote.
        is_default: Whether a key that the user wrote today has its default value.
        counts: Whether a key decides numbers; others may differ.
    """
    conflicts: list[Difference] = []
    changed: list[Difference] = []
    to_ask: list[Difference] = []
    for found in (one for one in differences(then, now) if counts(one.key)):
        wrote_then, wrote_now = _covers(written_then, found.name), _covers(written_now, found.name)
        if found.then is ABSENT:
            if wrote_now:
                to_ask.append(found)
        elif found.now is ABSENT:
            if wrote_then:
                conflicts.append(found)
        else:
            (conflicts if wrote_then or wrote_now else changed).append(found)
    if not conflicts:
        conflicts = [found for found in to_ask if not is_default(found.key)]
    return Comparison(conflicts, changed)


def differences(then: Any, now: Any, key: Key = ()) -> Iterator[Difference]:
    """Every place where two configs differ; below another class, the class alone."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        if _CLASS in then and _CLASS in now and not _same(then[_CLASS], now[_CLASS]):
            yield Difference((*key, _CLASS), then[_CLASS], now[_CLASS])
            return
        for name in {**then, **now}:
            if name in then and name in now:
                yield from differences(then[name], now[name], (*key, name))
            else:
                yield Difference((*key, name), then.get(name, ABSENT), now.get(name, ABSENT))
    elif _holds_mappings(then) and _holds_mappings(now) and len(then) == len(now):
        for number, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from differences(a, b, (*key, number))
    elif not _same(then, now):
        yield Difference(key, then, now)


def written_keys(tree: Any, resolved: Any) -> list[str]:
    """The keys that a user wrote, dotted, ``init_args`` left out.

    Args:
        tree: What was written.
        resolved: The config that came of it: tells the name of a class from other text.
    """
    return sorted(dotted(key) for key in _leaves(tree, resolved, ()))


def dotted(key: Key) -> str:
    """A key as users write it."""
    return ".".join(str(part) for part in key if part != _ARGUMENTS)


def show(value: Any) -> str:
    """A value, in a few words."""
    text = repr(value) if isinstance(value, (str, _Absent)) else json.dumps(value, default=str)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 1]}…"


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON gives it back."""
    read: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return read


def replaced(config: Mapping[str, Any], changes: Sequence[Difference]) -> dict[str, Any]:
    """The top-level sections of a config that changes concern, with the values of then."""
    sections = plain({str(change.key[0]): config[str(change.key[0])] for change in changes})
    for change in changes:
        *above, last = change.key
        node: Any = sections
        for part in above:
            node = node[part]
        node[last] = change.then
    return sections


def without(config: Mapping[str, Any], key: Key) -> dict[str, Any]:
    """A config without one of its keys."""
    left = plain(config)
    node: Any = left
    for part in key[:-1]:
        node = node[part]
    del node[key[-1]]
    return left


def at(config: Any, key: Key) -> Any:
    """What a config has under a key."""
    for part in key:
        try:
            config = config[part]
        except (KeyError, IndexError, TypeError):
            return ABSENT
    return config


def can_be_taken_over(change: Difference) -> bool:
    """Whether the value of then may be put in place of today's default: plain values, which name nothing to be executed.

    The record of a run may come from someone else; text can name a class where something else than text stands today.
    """
    if change.key[-1] == _CLASS:
        return False
    return _is_number(change.then) or (isinstance(change.then, str) and isinstance(change.now, str))


def _is_number(value: Any) -> bool:
    return all(map(_is_number, value)) if isinstance(value, list) else isinstance(value, (bool, int, float, type(None)))


def _leaves(tree: Any, resolved: Any, key: Key) -> Iterator[Key]:
    if isinstance(tree, Mapping) and tree:
        for name, value in tree.items():
            below = at(resolved, (name,))
            if below is ABSENT and isinstance(resolved, Mapping):
                below = at(resolved, (_ARGUMENTS, name))
            yield from _leaves(value, below, (*key, name))
    elif _holds_mappings(tree):
        for number, value in enumerate(tree):
            yield from _leaves(value, at(resolved, (number,)), (*key, number))
    elif isinstance(tree, str) and isinstance(resolved, Mapping) and not tree.endswith(_FILES):
        yield (*key, _CLASS)
    else:
        yield key


def _covers(written: Sequence[str], name: str) -> bool:
    """Whether a key, something above it or something below it was written."""
    return any(one == name or name.startswith(f"{one}.") or one.startswith(f"{name}.") for one in written)


def _holds_mappings(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def _same(then: Any, now: Any) -> bool:
    """Whether two values are equal; a class of hedgelab's may have moved to another of its modules."""
    if isinstance(then, bool) is not isinstance(now, bool):
        return False
    if isinstance(then, str) and isinstance(now, str) and then.startswith("hedgelab.") and now.startswith("hedgelab."):
        return then.rpartition(".")[2] == now.rpartition(".")[2]
    return bool(then == now)
