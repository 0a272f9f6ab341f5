"""A section of a config that names a class and its arguments, made into an object as often as needed."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Generic, Self, TypeVar, cast

from jsonargparse import ArgumentParser, Namespace

from hedgelab.errors import UserError, one_line

T = TypeVar("T")


class Recipe(Generic[T]):
    """A class and its arguments; calling it makes an object, with some arguments replaced.

    Args:
        base: The class whose subclasses the section may name.
        section: ``class_path`` and ``init_args``: as parsed, or plain values, which are then parsed when an object is made.
        key: Key of the section in the config.

    >>> from hedgelab.saes import SAE
    >>> recipe = Recipe(SAE, {"class_path": "TopKSAE", "init_args": {"d_sae": 4, "k": 2}}, "model")
    >>> recipe(d_in=3).k, recipe(d_in=3, k=1).k, recipe.at({"model.init_args.k": 3})(d_in=3).k
    (2, 1, 3)
    """

    def __init__(self, base: Callable[..., T], section: Mapping[str, Any] | Namespace, key: str) -> None:
        self.section: Any = section if isinstance(section, Namespace) else dict(section)
        self.key = key
        if "init_args" not in self.section:
            self.section["init_args"] = {}
        self._parser = ArgumentParser(exit_on_error=False)
        self._parser.add_subclass_arguments(cast(type[T], base), "made", required=False)

    def __call__(self, **arguments: Any) -> T:
        """Make an object; a :class:`~hedgelab.errors.UserError` says why its class refuses to."""
        section = self.copy().section
        for name, value in arguments.items():
            section["init_args"][name] = value
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

    def copy(self) -> Self:
        """A recipe whose section may be changed."""
        made = copy.copy(self)
        made.section = self.section.clone() if isinstance(self.section, Namespace) else copy.deepcopy(self.section)
        return made

    def at(self, values: Mapping[str, Any]) -> Self:
        """The recipe with other values at those of the config's keys that are its own, list items by number."""
        made = self.copy()
        for key, value in values.items():
            if key.startswith(f"{self.key}."):
                node = made.section
                *parents, last = key.removeprefix(f"{self.key}.").split(".")
                try:
                    for part in parents:
                        node = node.setdefault(part, {}) if isinstance(node, dict) else node[_place(node, part)]
                    part = last
                    node[part if isinstance(node, dict) else _place(node, part)] = value
                except (AttributeError, LookupError, TypeError, ValueError):
                    advice = "keys are written in full, with init_args"
                    raise UserError(f"{key}: the config has no '{part}' there; {advice}") from None
        return made

    def with_weights_seed(self, seed: int) -> Self:
        """The recipe of an SAE with another seed of its weights."""
        inner = ".inner.init_args" if "inner" in self.section["init_args"] else ""
        return self.at({f"{self.key}.init_args{inner}.init.seed": seed})

    @property
    def flat_arguments(self) -> Any:
        """The arguments of the SAE that holds the weights: of the one inside an SAE, if there is one."""
        arguments = self.section["init_args"]
        return arguments["inner"]["init_args"] if "inner" in arguments else arguments

    @property
    def plain(self) -> Any:
        """The section as plain values."""
        return self.section.as_dict() if isinstance(self.section, Namespace) else self.section

    @property
    def class_name(self) -> str:
        """Name of the class, without its module."""
        return str(self.section["class_path"]).rpartition(".")[2]


def _place(node: Any, part: str) -> Any:
    """Where a part of a key is in a list or a namespace, which must have it."""
    place = int(part) if isinstance(node, list) else part
    node[place]
    return place
