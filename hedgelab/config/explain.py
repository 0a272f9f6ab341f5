"""One line for everything that can be wrong with a config: refused, unresolvable, impossible."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from hedgelab.config.names import nearest
from hedgelab.config.tree import Tree
from hedgelab.config.walk import Walk
from hedgelab.errors import UserError, one_line


def explain_parsing(error: Exception, tree: Tree, walk: Walk) -> str:
    """Why a config was refused: the first mistake that the walk met, else the parser's own words."""
    if isinstance(error, OmegaConfBaseException):
        return _explain_interpolation(error, tree)
    return walk.first or one_line(str(error))


def explain_construction(error: BaseException, walk: Walk) -> str:
    """A mistake found by a class as it was made, with the full key of that class in front.

    Classes name their arguments as if they stood where they usually do (``model.d_sae``); inside another class the key
    is longer (``model.inner.d_sae``). What a class did not foresee is told in the words of whatever refused.
    """
    message = one_line(str(error))
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    makers = [type(frame["self"]) for frame in reversed(frames) if "self" in frame]
    cls = next((one for one in makers if one in walk.classes), None)
    places = walk.classes[cls] if cls is not None else []
    if not isinstance(error, UserError):
        place = places[0] if len(places) == 1 else "config"
        return f"{place}: cannot be made{f' into a {cls.__name__}' if cls else ''} ({type(error).__name__}: {message[-200:]})"
    named, colon, rest = message.partition(":")
    is_key = bool(colon) and re.fullmatch(r"[\w.\[\]]+", named) is not None
    if len(places) != 1 or not is_key or named.startswith(places[0]):
        return message
    return f"{_join(places[0], named)}:{rest}"


def resolve(tree: Tree) -> Tree:
    """The tree with its interpolations resolved; as it is where they cannot be."""
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException:
        return tree
    return {str(key): value for key, value in resolved.items()}


def _explain_interpolation(error: OmegaConfBaseException, tree: Tree) -> str:
    """A ``${...}`` that leads nowhere, with what was written and the nearest key there is."""
    full = re.sub(r"^(fit|validate|test)\.", "", str(error.full_key or "config"))
    keys = dict(_paths(tree))
    key, written = full.replace(".init_args", ""), keys.get(full)
    shown = f" '{written}'" if isinstance(written, str) else ""
    if not isinstance(error, InterpolationKeyError):
        return f"{key}: cannot resolve{shown}: {one_line(str(error).splitlines()[0])}"
    wanted = re.search(r"\$\{([\w.\[\]]+)\}", shown)
    near = nearest(wanted[1], keys) if wanted else None
    return f"{key}: cannot resolve{shown}: no such key; " + (
        f"did you mean '${{{near}}}'?" if near else "a key is written in full from the top, with init_args"
    )


def _join(place: str, named: str) -> str:
    """The key of a class and the key that it named, the part that both say said once.

    >>> _join("model.inner.init", "model.init.noise"), _join("model", "d_sae"), _join("model.inner", "model.k")
    ('model.inner.init.noise', 'model.d_sae', 'model.inner.k')
    """
    outer, inner = place.split("."), named.split(".")
    if inner[0] == outer[0]:
        inner = inner[1:]
    overlap = next((n for n in range(len(inner), 0, -1) if outer[-n:] == inner[:n]), 0)
    return ".".join(outer + inner[overlap:])


def _paths(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a tree in full, as OmegaConf writes it, with its value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        key = f"{prefix}[{name}]" if isinstance(tree, list) else f"{prefix}.{name}".lstrip(".")
        yield key, value
        yield from _paths(value, key)
