"""Reading signatures: what arguments a class takes, and which classes a type admits."""

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from hedgelab.identity import imported


class Parameter(NamedTuple):
    """One argument of a class."""

    annotation: Any
    required: bool = False


def parameters_of(cls: type) -> dict[str, Parameter]:
    """All arguments of a class, those that ``**kwargs`` passes on to its parents included, less what it gives them itself."""
    found: dict[str, Parameter] = {}
    count, given = 0, frozenset[str]()
    for init in (vars(parent).get("__init__") for parent in cls.__mro__):
        if not inspect.isfunction(init):
            continue
        try:
            hints = typing.get_type_hints(init)
        except (NameError, TypeError):  # names that only a type checker knows
            hints = {}
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for one in parameters[count:]:
            if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) and one.name not in given:
                found.setdefault(one.name, Parameter(hints.get(one.name, Any), one.default is one.empty))
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
        count, given = _given_to_parent(init)
    return found


@lru_cache
def _given_to_parent(init: Callable[..., None]) -> tuple[int, frozenset[str]]:
    """How many arguments an ``__init__`` gives its parent's by place, and which by name."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(init)))
    except (OSError, SyntaxError):  # made at run time
        return 0, frozenset()
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    call = next((one for one in calls if ast.unparse(one.func) == "super().__init__"), None)
    return (0, frozenset()) if call is None else (len(call.args), frozenset(k.arg for k in call.keywords if k.arg))


def class_of(item: Any, annotation: Any) -> type | None:
    """The class that a config item names: by its path, by its short name, or as the only one a type admits."""
    path = item.get("class_path") if isinstance(item, dict) else item
    admitted = bases(annotation)
    if path is None:
        return admitted[0] if admitted else None
    if not isinstance(path, str):
        return None
    known: dict[str, Any] = {cls.__name__: cls for base in admitted for cls in concrete(base)}
    named = known.get(path) or imported(path)
    return named if inspect.isclass(named) and any(issubclass(named, base) for base in admitted) else None


def bases(annotation: Any) -> list[type]:
    """The classes (not plain values) that a type admits objects of, inside unions, lists and as results of calls."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if inspect.isclass(annotation) and origin is None:
        return [] if annotation.__module__ == "builtins" or annotation is Any else [annotation]
    if origin in (typing.Literal, type):
        return []
    inner = arguments[-1:] if origin is Callable else arguments
    return [base for argument in inner for base in bases(argument)]


def concrete(base: type) -> Iterator[type]:
    """The public classes under a base that can be made, the base included."""
    if not inspect.isabstract(base) and not base.__name__.startswith("_"):
        yield base
    subclasses: list[type] = type.__subclasses__(base)
    for cls in subclasses:
        yield from concrete(cls)


def supplied_by_caller(annotation: Any) -> int:
    """How many leading arguments of a class its caller fills in, where the type is a factory."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is not Callable:
        return max(map(supplied_by_caller, arguments), default=0)
    return len(arguments[0]) if arguments and isinstance(arguments[0], list) else 0


def describe(annotation: Any) -> str:
    """A type in the words of a config file.

    >>> describe(int | list[float] | None), describe(typing.Literal["a", "b"])
    ('int | list[float] | null', "one of 'a', 'b'")
    """
    if typing.get_origin(annotation) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(annotation)))}"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(map(describe, typing.get_args(annotation)))
    text = re.sub(r"\b[A-Za-z_]\w*\.(?=\w)", "", inspect.formatannotation(annotation))
    return re.sub(r"\bNone(Type)?\b", "null", text)
