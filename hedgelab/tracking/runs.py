"""Runs read back from the store: what ``hedgelab runs`` prints. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hedgelab.errors import UserError
from hedgelab.tracking.store import ensure_store, sqlite_file, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

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


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        name: Name of the run.
        run_id: MLflow's id.
        experiment: Name of the experiment.
        status: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
        start: When it began, ISO 8601, UTC.
        duration_seconds: How long it took; None while it runs.
        params: Flat parameters.
        tags: Tags, MLflow's own (``mlflow.…``) left out.
        metrics: Last value of each metric.
        artifact_uri: Where its artifacts are.
    """

    name: str
    run_id: str
    experiment: str
    status: str
    start: str
    duration_seconds: float | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    artifact_uri: str


def list_runs(
    experiment: str | None = None, last: bool = False, limit: int = 20, uri: str | None = None
) -> list[RunSummary]:
    """The latest runs, newest first.

    Args:
        experiment: Name of the experiment; None for all.
        last: Only the newest one that is not part of another.
        limit: Most runs listed.
        uri: Tracking URI; None takes ``MLFLOW_TRACKING_URI``, or ``runs/mlflow.db``.

    Raises:
        UserError: There is no store, it cannot be reached, or it has no such experiment.
    """
    uri = uri or tracking_uri()
    database = sqlite_file(uri)
    if database is not None and not database.exists():
        raise UserError(f"MLFLOW_TRACKING_URI: no store at {database}; start a run with `hedgelab fit`, or set it")
    client = ensure_store(uri)
    names = {found.experiment_id: found.name for found in client.search_experiments()}
    if experiment is not None:
        if experiment not in names.values():
            raise UserError(f"--experiment: no '{experiment}' in the store; it has {', '.join(sorted(names.values()))}")
        names = {key: name for key, name in names.items() if name == experiment}
    if last:
        return [_summary(run, names) for run in _newest_of_its_own(client, list(names))]
    found = client.search_runs(list(names), max_results=limit, order_by=["attributes.start_time DESC"])
    return [_summary(run, names) for run in found]


def _newest_of_its_own(client: MlflowClient, experiments: list[str]) -> list[Run]:
    """The newest run that stands below no other, as a list of one; empty where there is none."""
    token = None
    while True:
        page = client.search_runs(
            experiments, order_by=["attributes.start_time DESC"], max_results=100, page_token=token
        )
        for run in page:
            if "mlflow.parentRunId" not in run.data.tags:
                return [run]
        token = page.token
        if not token:
            return []


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
    rows = [_row(run) for run in runs]
    columns = [column for column in (rows[0] if rows else ()) if any(row[column] for row in rows)]
    if not rows:
        return "no runs yet"
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    lines = [{column: column for column in columns}, *rows]
    return "\n".join("  ".join(line[column].ljust(widths[column]) for column in columns).rstrip() for line in lines)


def _row(run: RunSummary) -> dict[str, str]:
    row = {
        "run": run.name,
        "id": run.run_id[:8],
        "experiment": run.experiment,
        "status": run.status.lower(),
        "started": datetime.fromisoformat(run.start).astimezone().strftime("%Y-%m-%d %H:%M"),
        "took": "" if run.duration_seconds is None else _duration(run.duration_seconds),
    }
    for metric, title in _KEY_NUMBERS.items():
        values = (run.metrics.get(f"{stage}/{metric}") for stage in _STAGES)
        row[title] = _number(next((value for value in values if value is not None), None))
    return {**row, "samples/s": _number(run.metrics.get("samples/s"))}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _summary(run: Run, experiments: dict[str, str]) -> RunSummary:
    info, data = run.info, run.data
    metrics: dict[str, Any] = data.metrics
    return RunSummary(
        name=info.run_name,
        run_id=info.run_id,
        experiment=experiments[info.experiment_id],
        status=info.status,
        start=datetime.fromtimestamp(info.start_time / 1000, UTC).isoformat(),
        duration_seconds=None if info.end_time is None else (info.end_time - info.start_time) / 1000,
        params=dict(sorted(data.params.items())),
        tags={key: value for key, value in sorted(data.tags.items()) if not key.startswith("mlflow.")},
        metrics=dict(sorted(metrics.items())),
        artifact_uri=info.artifact_uri,
    )
