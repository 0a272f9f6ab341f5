"""What a suite of scores is, how suites are found by name, and how their options are read.

A suite is a class: the arguments of its ``__init__`` are keys of the config of ``hedgelab evaluate``, its ``score`` gives
the numbers. A module of this package that defines one is all that it takes; a suite of another package is named by its class
path (``--suite my_package.MySuite``), or registered as an entry point of the group ``hedgelab.suites``.
"""

from __future__ import annotations

import csv
import inspect
import io
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from hedgelab.config.tree import Tree
from hedgelab.errors import UserError, one_line
from hedgelab.identity import deciding, imported, stable_id
from hedgelab.kernels.codes import Codes
from hedgelab.protocols.evaluation.reader import Readings
from hedgelab.saes import SAE

GROUP = "hedgelab.suites"
NEEDS_TEXT = "needs labelled text; set {} (see configs/llm/evaluate_brown.yaml)"
_ROWS_AT_ONCE = 4096
_PACKAGE = __name__.rpartition(".")[0]


class Title(NamedTuple):
    """How a score is shown where several SAEs stand side by side.

    Attributes:
        text: What it is.
        better: ``higher`` or ``lower``; empty where neither is.
        drawn: Whether it has a panel in the figure; the table has every score.
    """

    text: str
    better: str = ""
    drawn: bool = True


@dataclass(frozen=True)
class Scores:
    """Results of one suite on one SAE.

    Attributes:
        metrics: Numbers, named ``<suite>/...``.
        tables: Details as CSV, by file name.
        figures: Figures, made when asked for, by file name.
    """

    metrics: dict[str, float]
    tables: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Callable[[], Figure]] = field(default_factory=dict)


class Suite(ABC):
    """Scores SAEs that read the same activations.

    Arguments of ``__init__`` are kept in attributes of the same name. What does not depend on an SAE (activations, labels,
    dense probes) is made once, when the first is scored.

    Attributes:
        name: Its name; its scores are called ``<name>/...``.
        titles: The scores that are shown side by side; empty shows all.
        reads_language_model: Whether it needs activations of a language model.
    """

    name: ClassVar[str]
    titles: ClassVar[Mapping[str, Title]] = {}
    reads_language_model: ClassVar[bool] = True

    @abstractmethod
    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE, by its name, as they come.

        Args:
            saes: The SAEs.
            readings: What they read.
        """

    def lacks(self) -> str | None:
        """What must be set before it can run; None for nothing."""
        return None

    def options(self) -> dict[str, Any]:
        """Its arguments, as plain values."""
        found = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {name: asdict(value) if is_dataclass(value) else value for name, value in found.items()}  # type: ignore[arg-type]

    def mark(self, data: Tree) -> str:
        """Changes with all that its scores depend on beside the SAE: code, options and texts, and the data's section."""
        own = {"class_path": _path(type(self)), "init_args": self.options()}
        return stable_id(deciding({"suite": own, "data": data}))


def suite_classes(names: Sequence[str] = ()) -> dict[str, type[Suite]]:
    """All suites by name: those of this package, registered ones, and those that ``names`` give by class path.

    Raises:
        UserError: A class path leads to no suite.
    """
    own = [
        import_module(f"{_PACKAGE}.{module.name}") for module in pkgutil.iter_modules(import_module(_PACKAGE).__path__)
    ]
    found = [value for module in own for value in vars(module).values() if _is_suite(value, module.__name__)]
    found += [point.load() for point in entry_points(group=GROUP)]
    for path in (name for name in names if "." in name):
        if not _is_suite(cls := imported(path)):
            raise UserError(f"--suite: {path}: expected a class path that leads to a subclass of {_PACKAGE}.Suite")
        found.append(cls)
    return {cls.name: cls for cls in found}


def _is_suite(value: Any, module: str | None = None) -> bool:
    is_one = inspect.isclass(value) and issubclass(value, Suite) and not inspect.isabstract(value)
    return is_one and hasattr(value, "name") and module in (None, value.__module__)


def option_parser(classes: Mapping[str, type[Suite]]) -> tuple[Any, dict[str, Any]]:
    """A parser with the arguments of all suites, those of one name once, and every key with its type."""
    from jsonargparse import ArgumentParser

    from hedgelab.config.signatures import parameters_of

    parser = ArgumentParser(prog="hedgelab evaluate", exit_on_error=False, parser_mode="omegaconf+", usage="")
    parameters: dict[str, Any] = {}
    for cls in classes.values():
        own = parameters_of(cls)
        parser.add_class_arguments(cls, skip=set(parameters) & set(own))
        parameters = {**own, **parameters}
    return parser, parameters


def make_suites(tree: Tree, classes: Mapping[str, type[Suite]]) -> list[Suite]:
    """All suites, with what a config says.

    Args:
        tree: Options of the suites, by key.
        classes: The suites.

    Raises:
        UserError: A wrong key or value.
    """
    from hedgelab.config.explain import explain_parsing, resolve
    from hedgelab.config.walk import Walk

    parser, parameters = option_parser(classes)
    tree = resolve(tree)
    walk = Walk(tree, parameters)
    try:
        values = vars(parser.instantiate(parser.parse_object(tree)))
        return [cls(**{name: values[name] for name in inspect.signature(cls).parameters}) for cls in classes.values()]
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__
        raise UserError(
            one_line(str(cause)) if isinstance(cause, UserError) else explain_parsing(error, tree, walk)
        ) from error


def choose(suites: Sequence[Suite], wanted: Sequence[str], language_model: bool) -> tuple[list[Suite], dict[str, str]]:
    """The suites to be run, and why others are left out.

    Args:
        suites: All of them.
        wanted: Names or class paths; ``all`` are all that can be run.
        language_model: Whether activations come from a language model.

    Raises:
        UserError: There is no such suite, or one that was asked for by name cannot be run.
    """
    by_name = {suite.name: suite for suite in suites}
    names = names_of(suites, wanted)
    reasons = {suite.name: reason for suite in suites if (reason := _reason(suite, language_model))}
    for name in names:
        if name in reasons:
            raise UserError(f"--suite {name}: {reasons[name]}")
    asked = list(by_name) if "all" in names else list(dict.fromkeys(names))
    left_out = {name: reason for name, reason in reasons.items() if name in asked}
    return [by_name[name] for name in asked if name not in reasons], left_out


def names_of(suites: Sequence[Suite], wanted: Sequence[str]) -> list[str]:
    """Names of suites that were given by name or class path; ``all`` stays.

    Raises:
        UserError: There is no such suite.
    """
    known = {name: suite.name for suite in suites for name in (suite.name, _path(type(suite)))} | {"all": "all"}
    for word in wanted:
        if word not in known:
            raise UserError(f"--suite: expected some of {', '.join(one.name for one in suites)}, or all, got {word!r}")
    return [known[word] for word in wanted]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _reason(suite: Suite, language_model: bool) -> str | None:
    if suite.reads_language_model and not language_model:
        return "needs activations of a language model"
    return suite.lacks()


@torch.no_grad()
def encode_rows(sae: SAE, x: Tensor) -> Codes:
    """Latents of activations ``x [rows, d_in]`` as the SAE reads them, in sparse form, on the CPU."""
    device = sae.W_dec.device
    rows, latents, values = [], [], []
    for part in torch.split(x, _ROWS_AT_ONCE):
        crow, columns, active = sae.encode(part.to(device)).csr()
        rows.append(crow.diff().cpu())
        latents.append(columns.cpu())
        values.append(active.cpu())
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(rows).cumsum(0)])
    return Codes.from_csr(crow, torch.cat(latents), torch.cat(values), sae.d_sae)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """CSV text; numbers with six digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
    return text.getvalue()


def whole_numbers(key: str, values: Sequence[Any]) -> list[int]:
    """The values, if they are whole numbers of at least 1, and at least one of them.

    Raises:
        UserError: They are not.
    """
    if not values or any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
        raise UserError(f"{key}: expected whole numbers of at least 1, got {list(values)}")
    return list(values)
