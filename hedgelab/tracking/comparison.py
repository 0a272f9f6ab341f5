"""Several runs side by side: the parameters that differ, and the metrics. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from hedgelab.tracking.glossary import title, worth_showing
from hedgelab.tracking.listing import aligned, number, printable
from hedgelab.tracking.runs import RunSummary
from hedgelab.tracking.store import ensure_store

# Neither what is compared nor what made the difference: the run's own name, and how it was watched.
_NOISE = re.compile(r"^(name|experiment|ckpt_path|config|record|progress|checkpoint|trainer\.logger)(\.|$)")


class Comparison(NamedTuple):
    """A table of runs."""

    runs: Sequence[RunSummary]
    params: dict[str, list[str]]
    metrics: dict[str, list[float | None]]


def compare(runs: Sequence[RunSummary], metrics: Sequence[str] | None = None) -> Comparison:
    """Set runs side by side."""
    keys = sorted({key for run in runs for key in run.params if not _NOISE.match(key)})
    params = {key: [short_value(run.params.get(key)) for run in runs] for key in keys}
    params = {key: values for key, values in params.items() if len(set(values)) > 1}
    everything = {key: value for run in runs for key, value in run.metrics.items()}
    shown = worth_showing(everything) if metrics is None else list(metrics)
    return Comparison(runs, params, {key: [run.metrics.get(key) for run in runs] for key in shown})


def short_value(value: str | None) -> str:
    """A parameter as tables show it: classes without their module, long lists cut.

    >>> short_value("hedgelab.saes.topk.TopKSAE"), short_value("0.001"), short_value(None)
    ('TopKSAE', '0.001', '-')
    """
    if value is None:
        return "-"
    if re.fullmatch(r"[a-zA-Z_]\w*(\.\w+)+\.[A-Z]\w*", value):
        return value.rpartition(".")[2]
    return value if len(value) <= 40 else f"{value[:37]}..."


def as_text(table: Comparison) -> str:
    """The table for a terminal: a column for each run."""
    head = [["", *labels(table.runs)], ["run id", *(run.run_id[:8] for run in table.runs)]]
    head += [["status", *(run.status.lower() for run in table.runs)]]
    params = [[key, *values] for key, values in table.params.items()]
    metrics = [[f"{title(key)}  ({key})", *map(number, values)] for key, values in table.metrics.items()]
    rows = [*head, [], *params, [], *metrics] if params else [*head, [], *metrics]
    return aligned([[printable(cell) for cell in row] for row in rows])


def labels(runs: Sequence[RunSummary]) -> list[str]:
    """Names of runs, told apart by their ids where several have one."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.name} {run.run_id[:4]}" for run in runs]


def curves(
    runs: Sequence[RunSummary], metrics: Sequence[str], uri: str | None = None, most: int = 6
) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Steps and values over training, by metric and by the runs' labels; the first ``most`` with two points or more."""
    client = ensure_store(uri)
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for key in metrics:
        if len(found) == most:
            break
        for label, run in zip(labels(runs), runs, strict=True):
            if key not in run.metrics:
                continue
            points = {point.step: point.value for point in client.get_metric_history(run.run_id, key)}
            if len(points) > 1:
                steps = sorted(points)
                found.setdefault(key, {})[label] = (steps, [points[step] for step in steps])
        if len({value for _, values in found.get(key, {}).values() for value in values}) == 1:
            del found[key]  # a level line shows nothing that the table does not
    return found


def curve_metrics(runs: Sequence[RunSummary]) -> list[str]:
    """The metrics whose curves may be drawn: the loss, then what tables show, then the loss's terms."""
    everything = {key: value for run in runs for key, value in run.metrics.items()}
    terms = [
        key for key in sorted(everything) if key.startswith("train/") and "/level" not in key and key != "train/loss"
    ]
    first = ["train/loss"] if "train/loss" in everything else []
    return [*first, *worth_showing(everything), *terms]
