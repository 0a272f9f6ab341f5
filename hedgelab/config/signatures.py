"""Reading signatures: what arguments a class takes, and which classes a type admits."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

_NONE = type(None)


class Parameter(NamedTuple):
    """One argument of a class."""

    annotation: Any
    required: bool = False


def parameters_of(cls: type) -> dict[str, Parameter]:
    """All arguments of a class, those that ``**kwargs`` passes on to its parents included."""
    found: dict[str, Parameter] = {}
    for parent in cls.__mro__:
        init = vars(parent).get("__init__")
        if not inspect.isfunction(init):
            continue
        hints = _hints(init)
        passes_on = False
        for parameter in list(inspect.signature(init).parameters.values())[1:]:
            if parameter.kind is parameter.VAR_KEYWORD:
                passes_on = True
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                annotation = hints.get(parameter.name, Any)
                found.setdefault(parameter.name, Parameter(annotation, parameter.default is parameter.empty))
        if not passes_on:
            break
    return found


def class_of(item: Any, annotation: Any) -> type | None:
    """The class that a config item names: by its path, by its short name, or as the only one a type admits."""
    path = item.get("class_path") if isinstance(item, dict) else item
    admitted = bases(annotation)
    if path is None:
        return admitted[0] if admitted else None
    if not isinstance(path, str):
        return None
    known: dict[str, Any] = {cls.__name__: cls for base in admitted for cls in concrete(base)}
    named = known.get(path) or _import(path)
    return named if inspect.isclass(named) and any(issubclass(named, base) for base in admitted) else None


def bases(annotation: Any) -> list[type]:
    """The classes (not plain values) that a type admits objects of, inside unions, lists and as results of calls."""
    if inspect.isclass(annotation) and typing.get_origin(annotation) is None:
        return [] if annotation.__module__ == "builtins" or annotation is _NONE else [annotation]
    if _is_call(annotation):
        return bases(typing.get_args(annotation)[-1]) if typing.get_args(annotation) else []
    if typing.get_origin(annotation) in (typing.Literal, type):
        return []
    return [base for argument in typing.get_args(annotation) for base in bases(argument)]


def plain_kinds(annotation: Any) -> Iterator[type]:
    """The classes of plain values that a type admits by themselves, not as items of a list or dict.

    >>> list(plain_kinds(int | list[float] | None))
    [<class 'int'>, <class 'NoneType'>]
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from plain_kinds(argument)
    elif origin is typing.Annotated:
        yield from plain_kinds(typing.get_args(annotation)[0])
    elif origin is typing.Literal:
        yield from map(type, typing.get_args(annotation))
    elif origin is None and inspect.isclass(annotation):
        yield annotation


def concrete(base: type) -> Iterator[type]:
    """The public classes under a base that can be made, the base included."""
    if not inspect.isabstract(base) and not base.__name__.startswith("_"):
        yield base
    subclasses: list[type] = type.__subclasses__(base)
    for cls in subclasses:
        yield from concrete(cls)


def supplied_by_caller(annotation: Any) -> int:
    """How many leading arguments of a class its caller fills in, where the type is a factory."""
    for kind in (annotation, *typing.get_args(annotation)):
        if _is_call(kind) and typing.get_args(kind):
            arguments = typing.get_args(kind)[0]
            return len(arguments) if isinstance(arguments, list) else 0
    return 0


def describe(annotation: Any) -> str:
    """A type in the words of a config file."""
    if annotation is _NONE or annotation is None:
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe(arguments[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, arguments)))
    if _is_call(annotation):
        return f"the class of a {describe(arguments[-1])}" if arguments else "a function"
    if origin is not None:
        inner = ", ".join("..." if argument is ... else describe(argument) for argument in arguments)
        return f"{origin.__name__.lower()}[{inner}]"
    return str(getattr(annotation, "__name__", annotation))


def _is_call(annotation: Any) -> bool:
    return typing.get_origin(annotation) is Callable or annotation in (Callable, typing.Callable)


def _hints(function: Any) -> dict[str, Any]:
    """Annotations, resolved; those that only a type checker can resolve are left out."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except (ImportError, ValueError):
        return None
