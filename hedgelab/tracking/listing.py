"""Runs as text: the table and the JSON of ``hedgelab runs``. Imports no torch.

Tables are aligned here, in four lines: pandas, which could, takes two seconds to import.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from hedgelab.tracking.runs import RunSummary

_KEY_NUMBERS = {
    "explained_variance": "expl. var.",
    "l0": "L0",
    "dead_latents": "dead",
    "mcc": "MCC",
    "hedging/decoder_signed": "hedging dec",
    "hedging/encoder_signed": "hedging enc",
    "absorption": "absorption",
}
_STAGES = ("test", "val")


def as_json(runs: list[RunSummary]) -> str:
    """One JSON document: an array of runs. Numbers that JSON has no word for become ``null``."""
    documents = [asdict(run) for run in runs]
    for document in documents:
        document["metrics"] = {
            key: value if math.isfinite(value) else None for key, value in document["metrics"].items()
        }
    return json.dumps(documents, indent=2, allow_nan=False)


def format_table(runs: list[RunSummary]) -> str:
    """A table of the runs with their key numbers, for the terminal; columns that no run fills are left out."""
    rows = [{column: printable(value) for column, value in _row(run).items()} for run in runs]
    columns = [column for column in (rows[0] if rows else ()) if any(row[column] for row in rows)]
    if not rows:
        return "no runs yet"
    return aligned([columns, *([row[column] for column in columns] for row in rows)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text with columns of equal width; a row without cells is an empty line.

    >>> print(aligned([["run", "loss"], [], ["a", "0.5"]]))
    run  loss
    <BLANKLINE>
    a    0.5
    """
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
    for metric, title in _KEY_NUMBERS.items():
        values = (run.metrics.get(f"{stage}/{metric}") for stage in _STAGES)
        row[title] = number(next((value for value in values if value is not None), None))
    return {**row, "samples/s": number(run.metrics.get("samples/s"))}


def printable(text: str) -> str:
    """Text from a store as a terminal may show it: without control characters, by which it could do more than be read."""
    return "".join(character if character.isprintable() else "?" for character in text)


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
