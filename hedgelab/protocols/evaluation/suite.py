"""What a suite of scores is, how suites are found by name, and how their options are read.

A suite is a class: the arguments of its ``__init__`` are keys of the config of ``hedgelab evaluate``, its ``score`` gives
the numbers. A module of this package that defines one is all that it takes; a suite of another package is named by its class
path (``--suite my_package.MySuite``), or registered as an entry point of the group ``hedgelab.suites``.
"""

import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from hedgelab.config.signatures import parameters_of
from hedgelab.config.tree import Tree
from hedgelab.config.walk import Walk, explain_parsing, resolve
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.errors import UserError
from hedgelab.identity import deciding, imported, stable_id
from hedgelab.kernels.codes import Codes
from hedgelab.protocols.evaluation.reader import Readings
from hedgelab.saes import SAE

GROUP = "hedgelab.suites"
NOISE = "_noise"
"""Ends the name of a score's standard error: how far it lies from what the same measurement anew would give."""
WITHDRAWN = {
    "tpp": "targeted probe perturbation falls as training goes on",
    "scr": "spurious correlation removal goes against the truth on synthetic SAEs",
}
"""Measures that hedgelab had until the field withdrew them, and why (Chanin, *Are SAE Benchmarks Reliable?*, 2605.18229)."""
_ROWS_AT_ONCE = 4096
_PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Scores:
    """Results of one suite on one SAE; tables and figures by file name."""

    metrics: dict[str, float]  # named <suite>/...
    tables: Mapping[str, Sequence[Mapping[str, Any]] | str] = field(default_factory=dict)  # rows, or CSV text
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)  # made when asked for


class Suite(ABC):
    """Scores SAEs that read the same activations.

    Arguments of ``__init__`` are kept in attributes of the same name. What does not depend on an SAE (activations, labels,
    dense probes) is made once, when the first is scored.
    """

    name: ClassVar[str]  # its scores are called <name>/...
    titles: ClassVar[Mapping[str, str]] = {}  # the scores that are drawn side by side, and how; empty draws all
    reads_language_model: ClassVar[bool] = True  # whether it needs activations of a language model
    reconstructs: ClassVar[bool] = True  # whether it compares with what was read, which transcoders do not reconstruct
    needs: ClassVar[str] = ""  # the argument that names its labelled text, without which it cannot run

    @abstractmethod
    def score(self, saes: Mapping[str, SAE], readings: Readings) -> Iterator[tuple[str, Scores]]:
        """Scores of each SAE, by its name, as they come."""

    def lacks(self, data: ActivationDataModule) -> str | None:
        """What it needs before it can run on this data; None for nothing."""
        if self.reads_language_model and not isinstance(data, LLMDataModule):
            return "needs activations of a language model"
        if self.needs and getattr(self, self.needs) is None:
            return f"needs labelled text; set {self.needs} (see configs/llm/evaluate_brown.yaml)"
        return None

    def mark(self, data: Tree) -> str:
        """Changes with all that its scores depend on beside the SAE: code, options and texts, and the data's section."""
        given = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        plain = {name: asdict(value) if is_dataclass(value) else value for name, value in given.items()}  # type: ignore[arg-type]
        own = {"class_path": class_path(type(self)), "init_args": plain}
        return stable_id(deciding({"suite": own, "data": data}))


def suite_classes(names: Sequence[str] = ()) -> dict[str, type[Suite]]:
    """All suites by name: those of this package, registered ones, and those that ``names`` give by class path."""
    for module in pkgutil.iter_modules(import_module(_PACKAGE).__path__, f"{_PACKAGE}."):
        import_module(module.name)
    found = [cls for cls in Suite.__subclasses__() if cls.__module__.startswith(f"{_PACKAGE}.")]
    found += [point.load() for point in entry_points(group=GROUP)]
    for path in (name for name in names if "." in name):
        cls = imported(path)
        if not (inspect.isclass(cls) and issubclass(cls, Suite) and not inspect.isabstract(cls) and hasattr(cls, "name")):
            raise UserError(f"--suite: {path}: expected a class path that leads to a subclass of {_PACKAGE}.Suite")
        found.append(cls)
    return {cls.name: cls for cls in found}


def option_parser(classes: Mapping[str, type[Suite]]) -> tuple[ArgumentParser, dict[str, Any]]:
    """A parser with the arguments of all suites, those of one name once, and every key with its type."""
    parser = ArgumentParser(prog="hedgelab evaluate", exit_on_error=False, parser_mode="omegaconf+", usage="")
    parameters: dict[str, Any] = {}
    for cls in classes.values():
        parser.add_class_arguments(cls, skip=parameters.keys() & parameters_of(cls).keys())
        parameters = parameters_of(cls) | parameters
    return parser, parameters


def make_suites(tree: Tree, classes: Mapping[str, type[Suite]]) -> list[Suite]:
    """All suites, with the options that a config has, by key."""
    parser, parameters = option_parser(classes)
    tree = resolve(tree)
    try:
        values = vars(parser.instantiate(parser.parse_object(tree)))
        return [cls(**{name: values[name] for name in inspect.signature(cls).parameters}) for cls in classes.values()]
    except Exception as error:
        mistake = error if isinstance(error, UserError) else error.__cause__
        known = isinstance(mistake, UserError)
        raise UserError(str(mistake) if known else explain_parsing(error, tree, Walk(tree, parameters))) from error


def names_of(suites: Sequence[Suite], wanted: Sequence[str]) -> list[str]:
    """Names of suites that were given by name or class path; ``all`` stays."""
    known = {"all": "all"} | {word: one.name for one in suites for word in (one.name, class_path(type(one)))}
    for word in wanted:
        if why := WITHDRAWN.get(word):
            raise UserError(f"--suite {word}: withdrawn by the field, {why} (arXiv 2605.18229); leave it out")
        if word not in known:
            raise UserError(f"--suite: expected some of {', '.join(one.name for one in suites)}, or all, got {word!r}")
    return [known[word] for word in wanted]


def choose(
    suites: Sequence[Suite], wanted: Sequence[str], data: ActivationDataModule, reconstruct: bool = True
) -> tuple[list[Suite], dict[str, str]]:
    """The suites to run, and why others of ``all`` are left out, which cannot be run.

    SAEs that do not ``reconstruct`` what they read are transcoders.
    """
    names = names_of(suites, wanted)
    chosen, left_out = [], {}
    for suite in suites:
        reason = suite.lacks(data)
        if suite.reconstructs and not reconstruct:
            reason = "a transcoder reconstructs what another hook gives, and not what it reads"
        if suite.name in names:
            if reason is not None:
                raise UserError(f"--suite {suite.name}: {reason}")
            chosen.append(suite)
        elif "all" in names and reason is not None:
            left_out[suite.name] = reason
        elif "all" in names:
            chosen.append(suite)
    return chosen, left_out


def class_path(cls: type) -> str:
    """Where a class is found."""
    return f"{cls.__module__}.{cls.__qualname__}"


@torch.no_grad()
def encode_rows(sae: SAE, x: Tensor) -> Codes:
    """Latents of activations ``x [rows, d_in]``, in units of these, in sparse form, on the CPU."""
    found = (sae.encode(rows.to(sae.W_dec.device)).on_raw() for rows in torch.split(x, _ROWS_AT_ONCE))
    parts = [[part.cpu() for part in codes.csr()] for codes in found]
    crows, latents, values = zip(*parts, strict=True)
    crow = pad(torch.cat([crow.diff() for crow in crows]).cumsum(0), (1, 0))
    return Codes.from_csr(crow, torch.cat(latents), torch.cat(values), sae.d_sae)


def rows_of(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a table, from its columns: sequences or tensors of equal length."""
    plain = [column.tolist() if isinstance(column, Tensor) else column for column in columns.values()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*plain, strict=True)]


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The values as numbers, those that are NaN left out."""
    return {key: number for key, value in values.items() if (number := float(value)) == number}


def whole_numbers(key: str, values: Sequence[Any]) -> list[int]:
    """The values, if they are whole numbers of at least 1, and at least one of them."""
    if not values or any(isinstance(value, bool) or not isinstance(value, int) or value < 1 for value in values):
        raise UserError(f"{key}: expected whole numbers of at least 1, got {list(values)}")
    return list(values)
