"""What the metrics of a run are called and mean, as their own docstrings declare it; imports neither them nor torch.

Logged as:
    loss: loss (lower): what training minimises: the sum of the terms below it, mean since the last report
    samples/s: samples/s [1/s] (higher): examples a second in training, validation passes left out
    data/tokens_per_s: tokens/s [1/s] (higher): tokens a second of the language model beside training
    b_dec_norm: ‖b_dec‖: norm of the decoder bias
    tpp/n*: TPP: targeted probe perturbation, of earlier releases; withdrawn: falls as training goes on (arXiv 2605.18229)
    scr/n*: SCR: spurious correlation removal, of earlier releases; withdrawn: goes against the truth (arXiv 2605.18229)
"""

import ast
import re
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

GROUP = "hedgelab.metrics"
_MARK = "\nLogged as:\n"
_LINE = re.compile(
    r"(?P<name>\S+): (?P<title>[^:[(]+?)(?: \[(?P<unit>.+?)\])?(?: \((?P<better>higher|lower)\))?: (?P<meaning>.+)"
)


class Term(NamedTuple):
    """One metric in words."""

    title: str
    unit: str
    better: str
    meaning: str


class Entry(NamedTuple):
    """A declaration: where it stands, its docstring without it, and the metrics that it declares."""

    file: Path
    name: str
    text: str
    terms: dict[str, Term]


@cache
def declarations() -> list[Entry]:
    """Every ``Logged as:`` section of a docstring of hedgelab, then those of metrics that entry points bring.

    Source is read, not imported. A section holds lines of ``name: title [unit] (higher or lower): meaning``, of which unit and
    direction may be missing; a number at the end of a name is declared as ``*``.
    """
    files = [Path(__file__), *sorted(Path(__file__).parent.glob("metrics/**/*.py"))]
    specs = [find_spec(point.module) for point in entry_points(group=GROUP)]
    files += [Path(spec.origin) for spec in specs if spec is not None and spec.origin]
    found = []
    for file in files:
        source = file.read_text()
        for node in ast.walk(ast.parse(source)) if _MARK.strip() in source else ():
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text, mark, section = (ast.get_docstring(node) or "").partition(_MARK)
            if mark:
                lines = (line.strip() for line in re.sub(r"\n {8,}", " ", section).splitlines())
                matches = takewhile(bool, map(_LINE.fullmatch, lines))
                terms = {match["name"]: Term(*(one or "" for one in match.groups()[1:])) for match in matches if match}
                name = file.stem if isinstance(node, ast.Module) else node.name
                found.append(Entry(file, name, text.rstrip(), terms))
    return found


GLOSSARY = {name: term for entry in declarations() for name, term in entry.terms.items()}
KEY_METRICS = (
    "explained_variance", "l0", "dead_latents", "nearest_f1", "mcc", "hedging/degree", "hedging/decoder_signed",
    "hedging/encoder_signed", "absorption",
)  # fmt: skip
_CLUTTER = re.compile(r"^(system/|data/norm/|latent\d+/|train/)|/level\d+$|^hedging/seed\d+/|_seed_std$")


def bare(metric: str) -> str:
    """A metric's name without the stage that it was measured in.

    >>> bare("val/l0"), bare("hedging/seed3/degree"), bare("hedging/degree_seed_std")
    ('l0', 'hedging/degree', 'hedging/degree')
    """
    name = re.sub(r"^(val|test|train|control)/", "", metric)
    return re.sub(r"_seed_std$", "", re.sub(r"/seed\d+/", "/", name))


def term(metric: str) -> Term | None:
    """What a logged metric means; None where the glossary does not say."""
    name = bare(metric)
    return GLOSSARY.get(name) or GLOSSARY.get(re.sub(r"\d+$", "*", name))


def title(metric: str) -> str:
    """A short name of a logged metric, its unit included.

    >>> title("val/explained_variance"), title("probing/f1_k5"), title("unheard/of")
    ('expl. var.', 'probing F1, 5', 'unheard/of')
    """
    if (known := term(metric)) is None:
        return metric
    number = re.search(r"\d+$", bare(metric)) if bare(metric) not in GLOSSARY else None
    return known.title + (f", {number[0]}" if number else "")


def worth_showing(metrics: dict[str, float], most: int = 12) -> list[str]:
    """The metrics that tables show: best known first, one stage each, without losses, single latents and the machine."""
    found: dict[str, str] = {}
    for name in sorted(metrics, key=lambda one: (not one.startswith(("test", "val")), one)):
        if not _CLUTTER.search(name):
            found.setdefault(bare(name), name)
    order = {name: place for place, name in enumerate(dict.fromkeys([*KEY_METRICS, *GLOSSARY]))}
    return sorted(found.values(), key=lambda one: (order.get(bare(one), len(order)), one))[:most]
