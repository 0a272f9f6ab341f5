"""Runs as text: listed in a table or as JSON, or side by side. Imports no torch.

Tables are aligned here, in four lines: pandas, which could, takes two seconds to import.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import NamedTuple

from hedgelab.glossary import KEY_METRICS, title, worth_showing
from hedgelab.tracking.runs import RunSummary
from hedgelab.tracking.store import ensure_store

# Neither what is compared nor what made the difference: the run's own name, and how it was watched.
_NOISE = re.compile(r"^(name|experiment|ckpt_path|config|record|progress|checkpoint|trainer\.logger)(\.|$)")


def as_json(runs: list[RunSummary]) -> str:
    """One JSON document: an array of runs. Numbers that JSON has no word for become ``null``."""
    finite = [{key: value if math.isfinite(value) else None for key, value in run.metrics.items()} for run in runs]
    documents = [{**asdict(run), "metrics": metrics} for run, metrics in zip(runs, finite, strict=True)]
    return json.dumps(documents, indent=2, allow_nan=False)


def format_table(runs: list[RunSummary]) -> str:
    """A table of the runs with their key numbers, for the terminal; columns that no run fills are left out."""
    rows = [_row(run) for run in runs]
    columns = [column for column in (rows[0] if rows else {}) if any(row[column] for row in rows)]
    return aligned([columns, *([row[column] for column in columns] for row in rows)]) if rows else "no runs yet"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text with columns of equal width; a row without cells is an empty line.

    Control characters, by which text from a store could do more to a terminal than be read, become question marks.

    >>> print(aligned([["run", "loss"], [], ["a", "0.5"]]))
    run  loss
    <BLANKLINE>
    a    0.5
    """
    rows = [["".join(one if one.isprintable() else "?" for one in cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*filter(None, rows), strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(run: RunSummary) -> dict[str, str]:
    row = {
        "run": run.name,
        "id": run.run_id[:8],
        "experiment": run.experiment,
        "status": run.status.lower(),
        "started": datetime.fromisoformat(run.start).astimezone().strftime("%Y-%m-%d %H:%M"),
        "took": "" if run.duration_seconds is None else duration(run.duration_seconds),
    }
    for metric in KEY_METRICS:
        names = (f"{stage}{metric}" for stage in ("test/", "val/", ""))
        row[title(metric)] = number(next((run.metrics[name] for name in names if name in run.metrics), None))
    return {**row, "samples/s": number(run.metrics.get("samples/s"))}


def number(value: float | None) -> str:
    """A number to three digits; empty for none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class Comparison(NamedTuple):
    """Runs, the values of each parameter in which they differ, and the last values of each metric (None for none)."""

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
    rows = [["", *labels(table.runs)], ["run id", *(run.run_id[:8] for run in table.runs)]]
    rows += [["status", *(run.status.lower() for run in table.runs)], []]
    rows += [[key, *values] for key, values in table.params.items()]
    rows += [[]] if table.params else []
    rows += [[f"{title(key)}  ({key})", *map(number, values)] for key, values in table.metrics.items()]
    return aligned(rows)


def labels(runs: Sequence[RunSummary]) -> list[str]:
    """Names of runs, told apart by their ids where several have one."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.name} {run.run_id[:4]}" for run in runs]


def curves(
    runs: Sequence[RunSummary], metrics: Sequence[str], most: int = 6
) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Steps and values over training, by metric and by the runs' labels, of the first metrics that are not all level."""
    client = ensure_store()
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for key in metrics:
        lines = {}
        for label, run in zip(labels(runs), runs, strict=True):
            history = client.get_metric_history(run.run_id, key) if key in run.metrics else []
            points = dict(sorted((point.step, point.value) for point in history))
            if len(points) > 1:
                lines[label] = (list(points), list(points.values()))
        if len({value for _, values in lines.values() for value in values}) > 1:
            found[key] = lines
        if len(found) == most:
            break
    return found


def curve_metrics(runs: Sequence[RunSummary]) -> list[str]:
    """The metrics whose curves may be drawn: the loss, then what tables show, then the loss's terms."""
    everything = {key: value for run in runs for key, value in run.metrics.items()}
    terms = [key for key in sorted(everything) if key.startswith("train/") and "/level" not in key]
    return sorted([*worth_showing(everything), *terms], key=lambda key: key != "train/loss")
