"""Scores of many SAEs put side by side: a table, and a figure of each score against what distinguishes them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from hedgelab.errors import UserError
from hedgelab.plots.scores import Panel, scores_against
from hedgelab.protocols.evaluation.suite import Title, suite_classes, table

_SEED = re.compile(r"(^|[._])seed(_everything)?$")


class Row(NamedTuple):
    """One SAE.

    Attributes:
        name: Its name.
        place: Where it stands on the axis.
        line: The curve it belongs to.
        metrics: Its scores.
    """

    name: str
    place: float
    line: str
    metrics: Mapping[str, float]


class Axis(NamedTuple):
    """What distinguishes SAEs.

    Attributes:
        key: Parameter of their runs.
        places: Its value for each, by name.
        lines: Values of all other parameters but seeds that distinguish them, by name.
    """

    key: str
    places: dict[str, float]
    lines: dict[str, str]

    @property
    def label(self) -> str:
        """Short name."""
        return self.key.rsplit(".", 1)[-1]


def find_axis(params: Mapping[str, Mapping[str, str]], key: str | None = None) -> Axis | None:
    """The numeric parameter in which runs differ, and what else they differ in but for seeds; None without one.

    Args:
        params: What decides the numbers of the runs, flat, by name.
        key: The parameter, or the end of its name; None takes the first by name that differs.

    Raises:
        UserError: The runs do not differ in ``key``, or it is no number.

    >>> axis = find_axis({"a": {"model.k": "8", "model.lr": "1"}, "b": {"model.k": "32", "model.lr": "2"}}, "lr")
    >>> axis.places, axis.lines
    ({'a': 1.0, 'b': 2.0}, {'a': '', 'b': ''})
    """
    keys = sorted({name for own in params.values() for name in own if not _SEED.search(name)})
    differing = [name for name in keys if len({own.get(name) for own in params.values()}) > 1]
    numeric = [name for name in differing if all(_number(own.get(name)) is not None for own in params.values())]
    at_hand = [name for name in numeric if key is None or name == key or name.endswith(f".{key}")]
    if key is not None and not at_hand:
        raise UserError(f"--x: the SAEs do not differ in a number {key!r}; they do in {', '.join(numeric) or 'none'}")
    if not at_hand:
        return None
    chosen = at_hand[0]
    places = {name: float(own[chosen]) for name, own in params.items()}
    lines = dict.fromkeys(params, "")
    for other in sorted(set(differing) - {chosen}, key=lambda name: (name in numeric, name)):
        short = f"{other.rsplit('.', 1)[-1]}=" if other in numeric else ""
        finer = {name: f"{lines[name]} {short}{own.get(other)}".strip() for name, own in params.items()}
        if len(_groups(places, finer)) > len(_groups(places, lines)):  # else it says nothing that is not said yet
            lines = finer
    return Axis(chosen, places, lines)


def _groups(places: Mapping[str, float], lines: Mapping[str, str]) -> set[tuple[float, str]]:
    return {(places[name], lines[name]) for name in places}


def rows_of(axis: Axis, results: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """The SAEs in order of their places."""
    rows = [Row(name, axis.places[name], axis.lines[name], metrics) for name, metrics in results.items()]
    return sorted(rows, key=lambda row: (row.line, row.place, row.name))


def as_csv(axis: Axis, rows: Sequence[Row]) -> str:
    """All scores, an SAE a line."""
    metrics = sorted({name for row in rows for name in row.metrics})
    lines = [[row.name, row.line, row.place, *(row.metrics.get(name, "") for name in metrics)] for row in rows]
    return table(["sae", "line", axis.label, *metrics], lines)


def means(axis: Axis, rows: Sequence[Row]) -> list[str]:
    """Means over seeds with their spread, as lines of text: scores down, places across."""
    places = sorted({(row.line, row.place) for row in rows})
    header = [axis.label, *(f"{line} {place:g}".strip() for line, place in places)]
    lines = [header]
    for metric in shown_metrics(rows):
        cells = []
        for line, place in places:
            values = [r.metrics[metric] for r in rows if (r.line, r.place) == (line, place) and metric in r.metrics]
            spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "")
        lines.append([metric, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def shown_metrics(rows: Sequence[Row]) -> list[str]:
    """Scores worth showing that at least one SAE has, in a fixed order: those with a title, and all of suites without any."""
    known = {name for row in rows for name in row.metrics}
    titled = {name.partition("/")[0] for name in titles()}
    return [
        *(name for name in titles() if name in known),
        *sorted(n for n in known if n.partition("/")[0] not in titled),
    ]


def figure(axis: Axis, rows: Sequence[Row], title: str) -> Figure:
    """Each score that has a panel against the axis."""
    panels = []
    known, shown = titles(), shown_metrics(rows)
    for metric in [name for name in shown if known.get(name, Title(name)).drawn] or shown:
        curves: dict[str, dict[float, list[float]]] = {}
        for row in rows:
            if metric in row.metrics:
                curves.setdefault(row.line, {}).setdefault(row.place, []).append(row.metrics[metric])
        text, better, _ = known.get(metric, Title(metric))
        panels.append(Panel(text, better, curves))
    return scores_against(axis.label, panels, title)


def titles() -> dict[str, Title]:
    """Titles of the scores of all suites."""
    return {metric: title for cls in suite_classes().values() for metric, title in cls.titles.items()}


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
