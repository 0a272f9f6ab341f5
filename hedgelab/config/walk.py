"""Where in a config the mistake is: the full dotted key, what was expected, and the nearest valid name, in one line.

jsonargparse knows what is wrong but, for classes inside classes, not where. So when it refuses a config, the same tree
is walked along the signatures of its classes until the offending key is met.
"""

import re
import traceback
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from hedgelab.config.names import nearest, suggest
from hedgelab.config.signatures import Parameter, bases, class_of, concrete, describe, parameters_of, supplied_by_caller
from hedgelab.config.tree import Tree
from hedgelab.errors import UserError, one_line


class Walk:
    """One walk over a config tree, along the signatures of the classes it names; a line is kept about each mistake.

    ``parameters`` may stand at the top of the tree; ``provided`` are full keys that links fill in and nobody writes.
    """

    def __init__(self, tree: Tree, parameters: dict[str, Parameter], provided: frozenset[str] = frozenset()) -> None:
        self.provided = provided
        self.wrong: list[str] = []  # unknown keys and classes
        self.missing: list[str] = []
        self.impossible: list[str] = []  # values, even where the parser takes them
        self.classes: dict[type, list[str]] = {}  # under which keys each was met
        self._arguments(resolve(tree), "", parameters)

    @property
    def first(self) -> str | None:
        """The line to show; None where nothing wrong was met."""
        return next(iter(self.wrong + self.missing + self.impossible), None)

    def _arguments(
        self, tree: Tree, prefix: str, parameters: dict[str, Parameter], former: Mapping[str, str] | None = None
    ) -> None:
        """The arguments of one class; of ``former`` ones it is said what took their place."""
        for name, value in tree.items():
            key = f"{prefix}{name}"
            if key in self.provided:
                self.impossible.append(f"{key}: is taken from the data and cannot be set; remove it")
            elif former is not None and name in former:
                self.wrong.append(f"{key}: is no argument any more; write {former[name]}")
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
        named = {at: item for at, item in items.items() if _names_class(item, annotation)}
        for at, item in named.items():
            self._class(item, at, annotation)
        if isinstance(value, int) and abs(value) >= 2**63:
            self.impossible.append(f"{key}: expected a number of at most 64 bits, got {show(value)}")
        elif not named and not accepts(annotation, value):
            if isinstance(value, list) and typing.get_origin(annotation) is list:
                (annotation,) = typing.get_args(annotation)
                key, value = next((at, item) for at, item in items.items() if not accepts(annotation, item))
            self.impossible.append(f"{key}: expected {describe(annotation)}, got {show(value)}")

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
                self.wrong.append(f"{key}.{name}: unknown key beside class_path; arguments go under init_args")
        if not isinstance(arguments, dict):
            self.wrong.append(f"{key}.init_args: expected a mapping of arguments, got {show(arguments)}")
            return
        parameters = dict(list(parameters_of(cls).items())[supplied_by_caller(annotation) :])
        self._arguments(arguments, f"{key}.", parameters, getattr(cls, "former_arguments", None))


def accepts(annotation: Any, value: Any) -> bool:
    """Whether jsonargparse takes a value for a type, as an item of a list: alone, it takes nothing, and what equals a default.

    >>> accepts(int, 2), accepts(int, True), accepts(int, 2.0), accepts(int, None), accepts(int | None, None)
    (True, False, False, False, True)
    """
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--values", type=list[annotation])
    except ValueError:  # a type that jsonargparse does not check either
        return True
    try:
        parser.parse_object({"values": [value]})
    except ArgumentError:
        return False
    return True


def show(value: Any) -> str:
    """A value as it goes into a message."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def explain_parsing(error: Exception, tree: Tree, walk: Walk) -> str:
    """Why a config was refused: the first mistake that the walk met, else the parser's own words.

    A ``${...}`` that leads nowhere is told with what was written and the nearest key there is.
    """
    if not isinstance(error, OmegaConfBaseException):
        return walk.first or one_line(str(error))
    full = re.sub(r"^(fit|validate|test)\.", "", str(error.full_key or "config"))
    keys = dict(_paths(tree))
    key, written = full.replace(".init_args", ""), keys.get(full)
    shown = f" '{written}'" if isinstance(written, str) else ""
    if not isinstance(error, InterpolationKeyError):
        return f"{key}: cannot resolve{shown}: {one_line(str(error).splitlines()[0])}"
    wanted = re.search(r"\$\{([\w.\[\]]+)\}", shown)
    near = nearest(wanted[1], keys) if wanted else None
    advice = f"did you mean '${{{near}}}'?" if near else "a key is written in full from the top, with init_args"
    return f"{key}: cannot resolve{shown}: no such key; {advice}"


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


def _names_class(item: Any, annotation: Any) -> bool:
    """Whether an item stands for an object: a mapping, or a name where nothing but an object is allowed."""
    named = isinstance(item, dict) or (isinstance(item, str) and not accepts(annotation, item))
    return named and bool(bases(annotation))


def _join(place: str, named: str) -> str:
    """The key of a class and the key that it named, the part that both say said once.

    >>> _join("model.inner.init", "model.init.noise"), _join("model", "d_sae"), _join("model.inner", "model.k")
    ('model.inner.init.noise', 'model.d_sae', 'model.inner.k')
    >>> _join("model.mitigations[1]", "model.mitigations.eta")
    'model.mitigations[1].eta'
    """
    outer, inner = place.split("."), named.split(".")
    if inner[0] == outer[0]:
        inner = inner[1:]
    unnumbered = [re.sub(r"\[\d+\]$", "", part) for part in outer]
    overlap = next((n for n in range(len(inner), 0, -1) if unnumbered[-n:] == inner[:n]), 0)
    return ".".join(outer + inner[overlap:])


def _paths(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a tree in full, as OmegaConf writes it, with its value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        key = f"{prefix}[{name}]" if isinstance(tree, list) else f"{prefix}.{name}".lstrip(".")
        yield key, value
        yield from _paths(value, key)
