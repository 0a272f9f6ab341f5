"""What a report says of an experiment: its runs side by side, their curves, and each run's figures and config."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hedgelab.errors import UserError
from hedgelab.reports import page
from hedgelab.tracking.comparison import Comparison, compare, curve_metrics, curves, labels
from hedgelab.tracking.glossary import bare, term, title
from hedgelab.tracking.listing import duration, number
from hedgelab.tracking.runs import REPORT_TAG, RunSummary, artifact, list_runs, open_runs
from hedgelab.tracking.store import without_credentials

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_MOST_BYTES = 2_000_000  # of one figure; larger ones are only linked
_MOST_COLUMNS = 6


def build(experiment: str, limit: int = 100, address: str | None = None, uri: str | None = None) -> str:
    """The report of an experiment as one HTML document."""
    client, experiments = open_runs(uri)
    runs = [run for run in list_runs(experiment, limit=limit, uri=uri) if REPORT_TAG not in run.tags]
    if not runs:
        raise UserError(f"--experiment: '{experiment}' has no runs yet")
    runs = in_families(runs)
    number_of = {name: key for key, name in experiments.items()}[experiment]
    links = {run.run_id: run_address(address, number_of, run.run_id) for run in runs}
    finished = sum(run.status == "FINISHED" for run in runs)
    began, ended = min(run.start for run in runs), max(run.start for run in runs)
    body = [
        f"<h1>{escape(experiment)}</h1>",
        f'<p class="muted">{len(runs)} runs, {finished} finished, started {began[:10]} to {ended[:10]}; written by hedgelab '
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p>",
        "<h2>Runs side by side</h2>",
        side_by_side(compare(runs), links),
    ]
    drawn = curves([run for run in runs if run.parent is None] or runs, curve_metrics(runs), uri)
    if drawn:
        body += [
            "<h2>Over training</h2>",
            page.image(curves_png(drawn), "metrics over training steps, a line for each run"),
        ]
    body += ["<h2>Each run</h2>", *(article(client, run, links[run.run_id], uri) for run in runs)]
    body += ["<h2>What the numbers mean</h2>", glossary(runs)]
    return page.document(f"{experiment}: report", body)


def in_families(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """Newest first, each run followed by its parts, oldest first; parts whose run is not there stand alone."""
    ids = {run.run_id for run in runs}
    heads = [run for run in runs if run.parent is None or run.parent not in ids]

    def family(head: RunSummary) -> list[RunSummary]:
        parts = sorted((run for run in runs if run.parent == head.run_id), key=lambda run: run.start)
        return [head, *(member for part in parts for member in family(part))]

    return [member for head in heads for member in family(head)]


def side_by_side(table: Comparison, links: dict[str, str | None]) -> str:
    """One line a run: what was set differently, what came out."""
    params = dict(list(table.params.items())[:_MOST_COLUMNS])
    head = ["run", "status", "took", *(escape(key.rpartition("init_args.")[2] or key) for key in params)]
    first_number = len(head)
    head += [f'<span title="{escape(meaning(key), quote=True)}">{escape(title(key))}</span>' for key in table.metrics]
    rows = []
    for index, (run, label) in enumerate(zip(table.runs, labels(table.runs), strict=True)):
        name = page.link(f"#{run.run_id}", label)
        indented = f"&nbsp;&nbsp;↳ {name}" if run.parent in links else name
        took = "" if run.duration_seconds is None else duration(run.duration_seconds)
        values = [escape(values[index]) for values in params.values()]
        rows.append(
            [indented, run.status.lower(), took, *values, *(number(one[index]) for one in table.metrics.values())]
        )
    note = ""
    if len(table.params) > len(params):
        left = ", ".join(key for key in table.params if key not in params)
        note = f'<p class="muted">Also different: {escape(left)}.</p>'
    return page.table(head, rows, first_number) + note


def meaning(metric: str) -> str:
    """A metric in a sentence, its logged name first."""
    known = term(metric)
    return metric if known is None else f"{metric}: {known.meaning}"


def article(client: MlflowClient, run: RunSummary, address: str | None, uri: str | None) -> str:
    """One run: description, numbers, figures, config, provenance."""
    parts = [f'<article id="{escape(run.run_id)}"><h3>{escape(run.name)}</h3>']
    commit = run.tags.get("git_commit", "")[:10]
    facts = [
        run.status.lower(),
        f"started {run.start[:16].replace('T', ' ')} UTC",
        *([f"commit {commit}"] if commit else []),
    ]
    parts.append(f'<p class="muted">{page.link(address, "run " + run.run_id)} · {escape(" · ".join(facts))}</p>')
    if run.description:
        parts.append(f"<p>{escape(run.description)}</p>")
    shown = compare([run]).metrics
    if shown:
        parts.append(
            page.table([escape(title(key)) for key in shown], [[number(values[0]) for values in shown.values()]], 0)
        )
    for path, content in artifacts(client, run, uri):
        if path.endswith(".png"):
            parts.append(page.image(content, Path(path).stem.replace("_", " ")))
        else:
            parts.append(page.folded(path, without_credentials(content.decode(errors="replace"))))
    tags = "\n".join(f"{key}: {value}" for key, value in run.tags.items())
    parts.append(page.folded("code, packages, machine", tags))
    return "\n".join([*parts, "</article>"])


def artifacts(client: MlflowClient, run: RunSummary, uri: str | None) -> list[tuple[str, bytes]]:
    """The figures and the config of a run, by path; those that cannot be had are left out."""
    from mlflow.exceptions import MlflowException

    found: list[tuple[str, bytes]] = []
    with suppress(MlflowException, UserError, OSError):
        for path, size in _listed(client, run.run_id, None):
            if (path.endswith(".png") and size <= _MOST_BYTES) or path == "config.yaml":
                found.append((path, artifact(run, path, uri).read_bytes()))
    return sorted(found, key=lambda one: (not one[0].endswith(".png"), one[0]))


def _listed(client: MlflowClient, run_id: str, folder: str | None) -> list[tuple[str, int]]:
    files: list[tuple[str, int]] = []
    for entry in client.list_artifacts(run_id, folder):
        files += _listed(client, run_id, entry.path) if entry.is_dir else [(entry.path, entry.file_size or 0)]
    return files


def curves_png(drawn: dict[str, Any]) -> bytes:
    """The overlaid curves as a PNG."""
    from hedgelab.plots.training import overlaid_curves

    buffer = io.BytesIO()
    overlaid_curves(drawn, {key: title(key) for key in drawn}, "").savefig(buffer, format="png")
    return buffer.getvalue()


def glossary(runs: Sequence[RunSummary]) -> str:
    """The metrics that these runs have, in words."""
    names = dict.fromkeys(bare(key) for key in compare(runs).metrics)
    known = [(name, found) for name in names if (found := term(name))]
    rows = [[f"<code>{escape(name)}</code>", escape(one.better), escape(one.meaning)] for name, one in known]
    return page.table(["metric", "better", "meaning"], rows, 3)


def run_address(address: str | None, experiment_id: str, run_id: str) -> str | None:
    """A run's page in the MLflow UI."""
    return None if address is None else f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
