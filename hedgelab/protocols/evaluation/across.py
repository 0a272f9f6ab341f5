"""Scores of many SAEs put side by side: what distinguishes them, a table, and a figure of each score against it."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from statistics import fmean
from types import MappingProxyType
from typing import Any

from matplotlib.figure import Figure

from hedgelab.errors import UserError
from hedgelab.protocols.evaluation.suite import NOISE, suite_classes
from hedgelab.protocols.study import as_csv
from hedgelab.protocols.sweep import report
from hedgelab.protocols.sweep.config import FigureOptions
from hedgelab.protocols.sweep.report import Row
from hedgelab.tracking.listing import aligned
from hedgelab.tracking.runs import RunSummary
from hedgelab.tracking.store import ensure_store

_SEED = re.compile(r"(^|[._])seed(_everything)?$")
Results = Mapping[str, Mapping[str, float]]  # metrics by SAE


def side_by_side(
    results: Results,
    params: Mapping[str, Mapping[str, str]],
    x: str | None,
    parent: RunSummary | None,
    kinds: Mapping[str, str],
    beside: Results,
) -> list[str]:
    """What to print of SAEs with these parameters; where a number distinguishes them, table and figure go to ``parent`` too.

    ``kinds`` says of controls which they are; what stands ``beside`` are controls, of whatever parameters.
    """
    rows = [] if len(results) == 1 else rows_of(results, params, x)
    if not rows:
        shown = {**results, **beside}
        names = dict.fromkeys(name for metrics in shown.values() for name in metrics)
        cells = [[f"{own[name]:.4g}" if name in own else "" for own in shown.values()] for name in names]
        table = [[f"  {name}", *row] for name, row in zip(names, cells, strict=True)]
        return aligned([["", *shown], *table]).splitlines()
    rows = [replace(row, line=kinds.get(row.run_id) or row.line) for row in rows]
    lines = means(rows, beside)
    if parent is not None:
        client = ensure_store()
        client.log_text(parent.run_id, as_csv(flat(rows)), "evaluation.csv")
        if (drawn := figure(rows, parent.name)) is not None:
            client.log_figure(parent.run_id, drawn, "figures/evaluation.png")
        lines.append(f"figure and table: run {parent.run_id[:8]} ({parent.name}), figures/evaluation.png, evaluation.csv")
    return lines


def rows_of(results: Results, params: Mapping[str, Mapping[str, str]], key: str | None = None) -> list[Row]:
    """A row for each SAE, with its name for a run: placed by the numeric parameter in which the SAEs differ.

    That is ``key`` (or what ends in it), else the first; none where they differ in no number. A row's line is what else they
    differ in, but for seeds.

    Raises:
        UserError: The SAEs do not differ in ``key``, or it is no number.

    >>> params = {"a": {"model.k": "8", "model.lr": "1"}, "b": {"model.k": "32", "model.lr": "2"}}
    >>> [(row.run_id, row.values, row.line) for row in rows_of({"a": {}, "b": {}}, params, "lr")]
    [('a', {'lr': 1.0}, ''), ('b', {'lr': 2.0}, '')]
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
        return []
    places, label = numeric[fitting[0]], fitting[0].rsplit(".", 1)[-1]
    lines = [""] * len(params)
    for name in sorted(set(differing) - {fitting[0]}, key=lambda name: (name in numeric, name)):
        short = f"{name.rsplit('.', 1)[-1]}=" if name in numeric else ""
        finer = [f"{line} {short}{value}".strip() for line, value in zip(lines, differing[name], strict=True)]
        if len(set(zip(places, finer, strict=True))) > len(set(zip(places, lines, strict=True))):
            lines = finer  # else it says nothing that is not said yet
    ordered = sorted(zip(lines, places, params, strict=True))
    return [Row(line, {label: place}, None, name, results[name]) for line, place, name in ordered]


def flat(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of a CSV file: all scores, an SAE a line."""
    names = report.columns(rows, "metrics")
    own = [{name: row.metrics.get(name, "") for name in names} for row in rows]
    return [{"sae": row.run_id, "line": row.line, **row.values, **scores} for row, scores in zip(rows, own, strict=True)]


def means(rows: Sequence[Row], beside: Results = MappingProxyType({})) -> list[str]:
    """Means over seeds with their spread, as lines of text: scores down, places across, then what stands ``beside``.

    The last column is the least difference of two SAEs to believe, ``1.96 · √2`` times a score's noise, of those that have one.
    """
    names = [name for name in report.columns(rows, "metrics") if not name.endswith(NOISE)]
    table = report.table(rows, names)
    reliable = {name: reliable_difference([row.metrics.get(f"{name}{NOISE}", math.nan) for row in rows]) for name in names}
    axes = [""] * (len(table[0]) - len(names) - 1)
    for label, metrics in beside.items():
        table.append([label, *axes, *(f"{metrics[name]:.4g}" if name in metrics else "" for name in names)])
    if any(reliable.values()):
        table.append(["reliable from", *axes, *reliable.values()])
    return aligned([column for column in zip(*table, strict=True) if any(column[1:])]).splitlines()


def reliable_difference(noises: Sequence[float]) -> str:
    """The least difference of two scores with such standard errors that is no noise at 95 %, as text; empty of none.

    >>> reliable_difference([0.01, 0.01, math.nan])
    '0.028'
    """
    known = [noise for noise in noises if math.isfinite(noise)]
    return f"{1.96 * math.sqrt(2 * fmean(noise**2 for noise in known)):.2g}" if known else ""


def figure(rows: Sequence[Row], title: str) -> Figure | None:
    """Each score that is drawn against the places, which stand at equal distances: grids are rarely even."""
    titles = {metric: text for cls in suite_classes().values() for metric, text in cls.titles.items()}
    titled = {name.partition("/")[0] for name in titles}
    names = report.columns(rows, "metrics")
    panels = {name: titles.get(name, name) for name in names if name in titles or name.partition("/")[0] not in titled}
    panels = {name: text for name, text in panels.items() if not name.endswith(NOISE)}
    (label,) = rows[0].values
    ordered = sorted(rows, key=lambda row: float(row.values[label]))
    named = [replace(row, values={label: f"{row.values[label]:g}"}) for row in ordered]
    heading = f"{title} (↑ higher is better, ↓ lower)"
    return report.figure(named, panels or {name: name for name in names}, heading, FigureOptions(label))
