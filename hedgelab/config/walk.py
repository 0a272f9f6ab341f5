"""Where in a config the mistake is: the full dotted key, what was expected, and the nearest valid name.

jsonargparse knows what is wrong but, for classes inside classes, not where. So when it refuses a config, the same tree
is walked along the signatures of its classes until the offending key is met.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from hedgelab.config.names import suggest
from hedgelab.config.signatures import (
    Parameter,
    bases,
    class_of,
    concrete,
    describe,
    parameters_of,
    plain_kinds,
    supplied_by_caller,
)
from hedgelab.config.tree import Tree

_BEYOND = 2**63


class Walk:
    """One walk over a config tree along the signatures of the classes it names.

    Args:
        tree: Everything the user wrote over the defaults, interpolations resolved where possible.
        parameters: What may stand at the top of the tree.
        provided: Full keys that links fill in and nobody writes.

    Attributes:
        wrong: A line about each wrong key or value, in the order of the tree.
        missing: A line about each required argument that is not there.
        impossible: A line about each value that the parser takes and no class can use.
        classes: The keys under which each class was met.
    """

    def __init__(self, tree: Tree, parameters: dict[str, Parameter], provided: frozenset[str] = frozenset()) -> None:
        self.provided = provided
        self.wrong: list[str] = []
        self.missing: list[str] = []
        self.impossible: list[str] = []
        self.classes: dict[type, list[str]] = {}
        self._arguments(tree, "", parameters)

    @property
    def first(self) -> str | None:
        """The line to show; None where nothing wrong was met."""
        return next(iter(self.wrong + self.missing + self.impossible), None)

    def _arguments(self, tree: Tree, prefix: str, parameters: dict[str, Parameter]) -> None:
        """The arguments of one class."""
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if key in self.provided:
                self.wrong.append(f"{key}: is taken from the data and cannot be set; remove it")
            elif name not in parameters:
                self.wrong.append(f"{key}: unknown key; {suggest(str(name), parameters)}")
            else:
                self._value(value, key, parameters[name].annotation)
        for name, parameter in parameters.items():
            key = f"{prefix}{name}"
            if parameter.required and tree.get(name) is None and key not in self.provided:
                self.missing.append(f"{key}: is required, expected {describe(parameter.annotation)}")

    def _value(self, value: Any, key: str, annotation: Any) -> None:
        """One value, and the classes inside it."""
        if is_interpolated(value):
            return
        nested = [(at, item) for at, item in _items(key, value) if _names_class(item, annotation)]
        for at, item in nested:
            self._class(item, at, annotation)
        if value is None and not _admits_none(annotation):
            self.impossible.append(f"{key}: expected {describe(annotation)}, got null")
        elif isinstance(value, int) and abs(value) >= _BEYOND:
            self.impossible.append(f"{key}: expected a number of at most 64 bits, got {show(value)}")
        elif not nested and _is_wrong_number(annotation, value):
            # jsonargparse takes it unchecked where it equals the default: True for 1, False for 0, 2.0 for 2.
            self.impossible.append(f"{key}: expected {describe(annotation)}, got {show(value)}")
        elif not nested and not accepts(annotation, value):
            at, expected, got = _pinpoint(key, annotation, value)
            self.wrong.append(f"{at}: expected {describe(expected)}, got {show(got)}")

    def _class(self, item: str | Tree, key: str, annotation: Any) -> None:
        """A class named in the tree, with its arguments."""
        cls = class_of(item, annotation)
        if cls is None:
            path = item if isinstance(item, str) else item.get("class_path", item)
            names = sorted({known.__name__ for base in bases(annotation) for known in concrete(base)})
            self.wrong.append(f"{key}: unknown class {show(path)}; {suggest(str(path).rsplit('.', 1)[-1], names)}")
            return
        self.classes.setdefault(cls, []).append(key)
        tree = item if isinstance(item, dict) else {}
        parameters = dict(list(parameters_of(cls).items())[supplied_by_caller(annotation) :])
        if "class_path" not in tree and isinstance(item, dict):
            self._arguments(tree.get("init_args", tree), f"{key}.", parameters)
            return
        for name in sorted(tree.keys() - {"class_path", "init_args", "dict_kwargs"}):
            self.wrong.append(f"{key}.{name}: unknown key beside class_path; arguments of the class go under init_args")
        arguments = tree.get("init_args") or {}
        if isinstance(arguments, dict):
            self._arguments(arguments, f"{key}.", parameters)
        else:
            self.wrong.append(f"{key}.init_args: expected a mapping of arguments, got {show(arguments)}")


def accepts(annotation: Any, value: Any) -> bool:
    """Whether jsonargparse takes a value for a type."""
    if annotation in (Any, inspect.Parameter.empty):
        return True
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=annotation)
    except ValueError:  # a type that jsonargparse does not check either
        return True
    try:
        parser.parse_object({"value": value})
    except ArgumentError:
        return False
    return True


def _is_wrong_number(annotation: Any, value: Any) -> bool:
    """Whether a boolean stands where a number is meant, or a float where an integer is."""
    kinds = set(plain_kinds(annotation))
    if isinstance(value, bool):
        return bool not in kinds and bool(kinds & {int, float})
    return isinstance(value, float) and int in kinds and not kinds & {float, str}


def _admits_none(annotation: Any) -> bool:
    return annotation in (Any, inspect.Parameter.empty, None, type(None)) or any(
        map(_admits_none, typing.get_args(annotation))
    )


def show(value: Any) -> str:
    """A value as it goes into a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_interpolated(value: Any) -> bool:
    """Whether a value is an interpolation that could not be resolved here."""
    return isinstance(value, str) and "${" in value


def _items(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value, or each item of a list, with its key."""
    if isinstance(value, list):
        yield from ((f"{key}[{index}]", item) for index, item in enumerate(value))
    else:
        yield key, value


def _pinpoint(key: str, annotation: Any, value: Any) -> tuple[str, Any, Any]:
    """The item of a list that is not accepted, where the type is a list and nothing else; else the whole value."""
    if isinstance(value, list) and typing.get_origin(annotation) is list:
        (kind,) = typing.get_args(annotation)
        for at, item in _items(key, value):
            if not accepts(kind, item):
                return _pinpoint(at, kind, item)
    return key, annotation, value


def _names_class(item: Any, annotation: Any) -> bool:
    """Whether an item stands for an object: a mapping, or a name where nothing but an object is allowed."""
    if not bases(annotation):
        return False
    return isinstance(item, dict) or (isinstance(item, str) and not accepts(annotation, item))
