"""Where in a config the mistake is: the full dotted key, what was expected, and the nearest valid name.

jsonargparse knows what is wrong but, for classes inside classes, not where. So when it refuses a config, the same tree
is walked along the signatures of its classes until the offending key is met.
"""

from __future__ import annotations

import typing
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from hedgelab.config.names import suggest
from hedgelab.config.signatures import (
    Parameter,
    alternatives,
    bases,
    class_of,
    concrete,
    describe,
    parameters_of,
    supplied_by_caller,
)
from hedgelab.config.tree import Tree


class Walk:
    """One walk over a config tree, interpolations resolved where possible, along the signatures of the classes it names.

    ``parameters`` may stand at the top of the tree; ``provided`` are full keys that links fill in and nobody writes. A line is
    kept about each ``wrong`` key or value, each ``missing`` one, and each value that is ``impossible``, though the parser takes
    it; and under which keys each of the ``classes`` was met.
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
                self.impossible.append(f"{key}: is taken from the data and cannot be set; remove it")
            elif name not in parameters:
                self.wrong.append(f"{key}: unknown key; {suggest(str(name), parameters)}")
            elif not (isinstance(value, str) and "${" in value):  # an interpolation that could not be resolved here
                self._value(value, key, parameters[name].annotation)
        for name, parameter in parameters.items():
            key = f"{prefix}{name}"
            if parameter.required and tree.get(name) is None and key not in self.provided:
                self.missing.append(f"{key}: is required, expected {describe(parameter.annotation)}")

    def _value(self, value: Any, key: str, annotation: Any) -> None:
        """One value, and the classes inside it."""
        items = {f"{key}[{n}]": item for n, item in enumerate(value)} if isinstance(value, list) else {key: value}
        nested = {at: item for at, item in items.items() if _names_class(item, annotation)}
        for at, item in nested.items():
            self._class(item, at, annotation)
        if value is None and not any(one in (Any, None, type(None)) for one in alternatives(annotation)):
            self.impossible.append(f"{key}: expected {describe(annotation)}, got null")
        elif isinstance(value, int) and abs(value) >= 2**63:
            self.impossible.append(f"{key}: expected a number of at most 64 bits, got {show(value)}")
        elif not nested and _is_wrong_number(annotation, value):
            # jsonargparse takes it unchecked where it equals the default: True for 1, False for 0, 2.0 for 2.
            self.impossible.append(f"{key}: expected {describe(annotation)}, got {show(value)}")
        elif not nested and not accepts(annotation, value):
            if isinstance(value, list) and typing.get_origin(annotation) is list:
                (kind,) = typing.get_args(annotation)
                for at, item in items.items():
                    if not accepts(kind, item):
                        self._value(item, at, kind)
                        return
            self.wrong.append(f"{key}: expected {describe(annotation)}, got {show(value)}")

    def _class(self, item: str | Tree, key: str, annotation: Any) -> None:
        """A class named in the tree, with its arguments."""
        cls = class_of(item, annotation)
        if cls is None:
            path = item if isinstance(item, str) else item.get("class_path", item)
            names = {known.__name__ for base in bases(annotation) for known in concrete(base)}
            self.wrong.append(f"{key}: unknown class {show(path)}; {suggest(str(path).rsplit('.', 1)[-1], names)}")
            return
        self.classes.setdefault(cls, []).append(key)
        tree = item if isinstance(item, dict) else {}
        arguments = tree.get("init_args") or {}
        if tree and "class_path" not in tree:
            arguments = tree.get("init_args", tree)
        else:
            for name in sorted(tree.keys() - {"class_path", "init_args", "dict_kwargs"}):
                self.wrong.append(
                    f"{key}.{name}: unknown key beside class_path; arguments of the class go under init_args"
                )
        if not isinstance(arguments, dict):
            self.wrong.append(f"{key}.init_args: expected a mapping of arguments, got {show(arguments)}")
            return
        self._arguments(arguments, f"{key}.", dict(list(parameters_of(cls).items())[supplied_by_caller(annotation) :]))


def accepts(annotation: Any, value: Any) -> bool:
    """Whether jsonargparse takes a value for a type."""
    if annotation is Any:
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


def show(value: Any) -> str:
    """A value as it goes into a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_wrong_number(annotation: Any, value: Any) -> bool:
    """Whether a boolean stands where a number is meant, or a float where an integer is."""
    kinds: set[Any] = set()
    for one in alternatives(annotation):
        kinds |= set(map(type, typing.get_args(one))) if typing.get_origin(one) is typing.Literal else {one}
    if isinstance(value, bool):
        return bool not in kinds and bool(kinds & {int, float})
    return isinstance(value, float) and int in kinds and not kinds & {float, str}


def _names_class(item: Any, annotation: Any) -> bool:
    """Whether an item stands for an object: a mapping, or a name where nothing but an object is allowed."""
    named = isinstance(item, dict) or (isinstance(item, str) and not accepts(annotation, item))
    return named and bool(bases(annotation))
