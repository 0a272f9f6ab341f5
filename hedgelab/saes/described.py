"""What an SAE, or a part of one, is: its class and arguments as plain JSON values."""

import inspect
from collections.abc import Collection
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import nn

from hedgelab.errors import UserError


def class_name(cls: type) -> str:
    """What files call a class: its name for those of hedgelab, its full path for others."""
    return cls.__name__ if cls.__module__.startswith("hedgelab.") else f"{cls.__module__}.{cls.__qualname__}"


def init_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """All ``__init__`` arguments of a class, those it passes on to its parents through ``**kwargs`` included, by name."""
    found: dict[str, inspect.Parameter] = {}
    for parent in cls.__mro__:
        if "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
        kept = (p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self")
        found = {p.name: p for p in kept} | found
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


def described(thing: Any, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Class name and arguments as plain JSON values; an empty list of modules is left out.

    By convention every argument of ``__init__`` is kept in an attribute of the same name.
    """
    names = sorted(init_arguments(type(thing)).keys() - set(left_out))
    if missing := [name for name in names if not hasattr(thing, name)]:
        raise UserError(f"{type(thing).__name__}: keeps its argument {missing[0]} in no attribute of that name")
    values = {name: getattr(thing, name) for name in names}
    written = {name: _plain(one) for name, one in values.items() if not isinstance(one, nn.ModuleList) or len(one)}
    return {"class": class_name(type(thing)), **written}


def _plain(value: Any) -> Any:
    """A JSON value for an argument."""
    if hasattr(value, "config"):
        return value.config()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return list(map(_plain, value)) if isinstance(value, (tuple, list, nn.ModuleList)) else value
