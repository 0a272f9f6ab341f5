"""A section of a config that names a class and its arguments, made into an object as often as needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast

from jsonargparse import ArgumentParser, Namespace

from hedgelab.errors import UserError, one_line

T = TypeVar("T")


class Recipe(Generic[T]):
    """A class and its arguments; calling it makes an object, with some arguments replaced.

    Args:
        base: The class whose subclasses the section may name.
        section: ``class_path`` and ``init_args``: as parsed, or plain values, which are then parsed when an object is made.
        key: Key of the section in the config, for messages.

    >>> from hedgelab.saes import SAE
    >>> recipe = Recipe(SAE, {"class_path": "TopKSAE", "init_args": {"d_sae": 4, "k": 2}}, "model")
    >>> recipe(d_in=3).k, recipe(d_in=3, k=1).k, recipe.at({"init_args.k": 3})(d_in=3).k
    (2, 1, 3)
    """

    def __init__(self, base: Callable[..., T], section: Mapping[str, Any] | Namespace, key: str) -> None:
        self.base, self.section, self.key = base, section, key
        self._parser = ArgumentParser(exit_on_error=False)
        self._parser.add_subclass_arguments(cast(type[T], base), "made", required=False)

    def __call__(self, **arguments: Any) -> T:
        """Make an object.

        Raises:
            UserError: The class is unknown, or refuses its arguments.
        """
        section = _copy(self.section)
        for name, value in arguments.items():
            _arguments(section)[name] = value
        try:
            if not isinstance(section, Namespace):
                section = self._parser.parse_object({"made": section})["made"]
            made: T = self._parser.instantiate(Namespace(made=section)).made  # type: ignore[no-untyped-call]
        except UserError:
            raise
        except Exception as error:
            cause: BaseException = error.__cause__ if isinstance(error.__cause__, UserError) else error
            raise UserError(f"{self.key}: {one_line(str(cause))}") from error
        return made

    def at(self, values: Mapping[str, Any]) -> Recipe[T]:
        """The recipe with other values at dotted keys, written in full (with ``init_args``), list items by number.

        Raises:
            UserError: The parsed section has no such key.
        """
        made = copy.copy(self)
        made.section = _copy(self.section)
        for path, value in values.items():
            node: Any = made.section
            *parents, last = path.split(".")
            for part in parents:
                if isinstance(node, dict):
                    node.setdefault(part, {})
                node = node[self._place(node, part, path)]
            node[last if isinstance(node, dict) else self._place(node, last, path)] = value
        return made

    def with_weights_seed(self, seed: int) -> Recipe[T]:
        """The recipe of an SAE with another seed of its weights, which is that of the SAE inside it, if there is one."""
        inner = "inner.init_args." if "inner" in _arguments(_copy(self.section)) else ""
        return self.at({f"init_args.{inner}init.seed": seed})

    @property
    def starts_at_data(self) -> bool:
        """Whether the weights of an SAE that this makes depend on activations: its decoder bias starts at their centre."""
        arguments = _arguments(_copy(self.section))
        flat = arguments["inner"]["init_args"] if "inner" in arguments else arguments
        return bool(flat["init"]["b_dec"] != "zeros")

    @property
    def class_name(self) -> str:
        """Name of the class, without its module."""
        return str(self.section["class_path"]).rpartition(".")[2]

    def plain(self) -> dict[str, Any]:
        """A copy of the section as plain values."""
        section = _copy(self.section)
        plain: dict[str, Any] = section.as_dict() if isinstance(section, Namespace) else section
        return plain

    def _place(self, node: Any, part: str, path: str) -> Any:
        """Where a part of a key is in a node: by number in a list, by name elsewhere."""
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            return int(part)
        if isinstance(node, (dict, Namespace)) and part in node:
            return part
        raise UserError(
            f"{self.key}.{path}: the config has no '{part}' there; keys are written in full, with init_args"
        )


def _copy(section: Any) -> Any:
    return section.clone() if isinstance(section, Namespace) else copy.deepcopy(dict(section))


def _arguments(section: Any) -> Any:
    if "init_args" not in section:
        section["init_args"] = {}
    return section["init_args"]
