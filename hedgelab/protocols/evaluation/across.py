"""Scores of many SAEs put side by side: what distinguishes them, a table, and a figure of each score against it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hedgelab.errors import UserError
from hedgelab.protocols.evaluation.suite import Title, suite_classes
from hedgelab.protocols.sweep import report
from hedgelab.protocols.sweep.report import Row
from hedgelab.tracking.listing import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SEED = re.compile(r"(^|[._])seed(_everything)?$")


class Axis(NamedTuple):
    """The parameter in which SAEs differ, its value for each by name, and the values of all others but seeds, as text."""

    key: str
    places: dict[str, float]
    lines: dict[str, str]

    @property
    def label(self) -> str:
        """Short name."""
        return self.key.rsplit(".", 1)[-1]


def find_axis(params: Mapping[str, Mapping[str, str]], key: str | None = None) -> Axis | None:
    """The numeric parameter in which runs differ (``key``, or the end of it), and what else they differ in but for seeds.

    Raises:
        UserError: The runs do not differ in ``key``, or it is no number.

    >>> axis = find_axis({"a": {"model.k": "8", "model.lr": "1"}, "b": {"model.k": "32", "model.lr": "2"}}, "lr")
    >>> axis.places, axis.lines
    ({'a': 1.0, 'b': 2.0}, {'a': '', 'b': ''})
    """
    names = sorted({name for own in params.values() for name in own if not _SEED.search(name)})
    differing = {name: [own.get(name) for own in params.values()] for name in names}
    differing = {name: values for name, values in differing.items() if len(set(values)) > 1}
    numeric: dict[str, list[float]] = {}
    for name, values in differing.items():
        with suppress(TypeError, ValueError):
            numeric[name] = [float(value) for value in values]  # type: ignore[arg-type]
    fitting = [name for name in numeric if key is None or name == key or name.endswith(f".{key}")]
    if key is not None and not fitting:
        raise UserError(f"--x: the SAEs do not differ in a number {key!r}; they do in {', '.join(numeric) or 'none'}")
    if not fitting:
        return None
    places = numeric[fitting[0]]
    lines = [""] * len(params)
    for name in sorted(set(differing) - {fitting[0]}, key=lambda name: (name in numeric, name)):
        short = f"{name.rsplit('.', 1)[-1]}=" if name in numeric else ""
        finer = [f"{line} {short}{value}".strip() for line, value in zip(lines, differing[name], strict=True)]
        if len(set(zip(places, finer, strict=True))) > len(set(zip(places, lines, strict=True))):
            lines = finer  # else it says nothing that is not said yet
    return Axis(fitting[0], dict(zip(params, places, strict=True)), dict(zip(params, lines, strict=True)))


def rows_of(axis: Axis, results: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """A row for each SAE, by line and place; where sweeps have the run's id, its name."""
    rows = [
        Row(axis.lines[name], {axis.label: axis.places[name]}, None, name, metrics) for name, metrics in results.items()
    ]
    return sorted(rows, key=lambda row: (row.line, row.values[axis.label], row.run_id))


def flat(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of a CSV file: all scores, an SAE a line."""
    return [
        {"sae": row["run"], **{key: value for key, value in row.items() if key not in ("run", "seed")}}
        for row in report.flat(rows)
    ]


def means(rows: Sequence[Row]) -> list[str]:
    """Means over seeds with their spread, as lines of text: scores down, places across."""
    columns = zip(*report.table(rows, shown_metrics(rows)), strict=True)
    return aligned([column for column in columns if any(column[1:])]).splitlines()


def shown_metrics(rows: Sequence[Row]) -> list[str]:
    """Scores worth showing that at least one SAE has, in a fixed order: those with a title, and all of suites without any."""
    known = {name for row in rows for name in row.metrics}
    titled = {name.partition("/")[0] for name in titles()}
    others = sorted(name for name in known if name.partition("/")[0] not in titled)
    return [*(name for name in titles() if name in known), *others]


def figure(axis: Axis, rows: Sequence[Row], title: str) -> Figure | None:
    """Each score that has a panel against the axis, whose places stand at equal distances: grids are rarely even."""
    known, shown = titles(), shown_metrics(rows)
    panels = {name: known.get(name, Title(name)) for name in shown}
    panels = {name: one for name, one in panels.items() if one.drawn} or panels
    names = {name: one.text + {"higher": " ↑", "lower": " ↓"}.get(one.better, "") for name, one in panels.items()}
    renamed = [
        replace(
            row,
            values={axis.label: f"{row.values[axis.label]:g}"},
            metrics={names[name]: value for name, value in row.metrics.items() if name in names},
        )
        for row in sorted(rows, key=lambda row: float(row.values[axis.label]))
    ]
    return report.figure(renamed, axis.label, list(names.values()), f"{title} (↑ higher is better, ↓ lower)")


def titles() -> dict[str, Title]:
    """Titles of the scores of all suites."""
    return {metric: title for cls in suite_classes().values() for metric, title in cls.titles.items()}
