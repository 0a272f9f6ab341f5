"""A report of an experiment: its runs side by side, their curves, and each run's figures and config.

It is one plain HTML page with everything inside it, no script, readable on light and dark screens and on paper: a few
functions of escaped text. A template of Jinja's would be as long, and a second language.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from hedgelab.errors import UserError
from hedgelab.glossary import bare, term, title
from hedgelab.tracking.listing import Comparison, compare, curve_metrics, curves, duration, labels, number
from hedgelab.tracking.runs import REPORT_TAG, RunSummary, artifact, list_runs, open_runs
from hedgelab.tracking.store import without_credentials

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_MOST_BYTES = 2_000_000  # of one figure; larger ones are left out
_MOST_COLUMNS = 6
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #626c77; --line: #d9dde2; --back: #ffffff; --soft: #f5f7f9;
  --link: #2159a6 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --muted: #9aa5b1; --line: #363d46; --back: #15191e;
  --soft: #1d232a; --link: #82b1f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.7rem; margin: 0 0 .2rem } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem }
h3 { font-size: 1.05rem; margin: 0 } p { margin: .4rem 0 } a { color: var(--link) }
.muted { color: var(--muted) } code, pre { font: 12.5px/1.45 ui-monospace, monospace }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13.5px }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap }
th { color: var(--muted); font-weight: 600 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td.wrap { white-space: normal } td.child { padding-left: 1.2rem }
article { border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem; margin: 1rem 0 }
figure { margin: .6rem 0; display: inline-block; background: #fff; border-radius: 6px; padding: .4rem; max-width: 100% }
figure img { display: block; max-width: 100%; height: auto } figcaption { color: #626c77; font-size: 12px }
details { margin: .5rem 0 } summary { cursor: pointer; color: var(--muted) }
pre { background: var(--soft); border-radius: 6px; padding: .8rem; overflow-x: auto; max-height: 32rem }
@media print { details { display: none } article { break-inside: avoid } }
"""


def build(experiment: str, limit: int = 100, address: str | None = None) -> str:
    """The report of an experiment's newest runs as one HTML document, with links to where the MLflow UI answers."""
    client, experiments = open_runs()
    runs = in_families([run for run in list_runs(experiment, limit=limit) if REPORT_TAG not in run.tags])
    if not runs:
        raise UserError(f"--experiment: '{experiment}' has no runs yet")
    experiment_id = next(key for key, name in experiments.items() if name == experiment)
    base = None if address is None else f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs/"
    finished = sum(run.status == "FINISHED" for run in runs)
    began, ended = min(run.start for run in runs)[:10], max(run.start for run in runs)[:10]
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    drawn = curves([run for run in runs if run.parent is None] or runs, curve_metrics(runs))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    parts = [
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(experiment)}: report</title>',
        f"<style>{_STYLE}</style></head>\n<body>",
        f"<h1>{escape(experiment)}</h1>",
        f'<p class="muted">{len(runs)} runs, {finished} finished, started {began} to {ended}; written by hedgelab {now}</p>',
        "<h2>Runs side by side</h2>",
        _side_by_side(compare(runs)),
    ]
    if drawn:
        from hedgelab.plots.training import overlaid_curves

        buffer = io.BytesIO()
        overlaid_curves(drawn, {key: title(key) for key in drawn}, "").savefig(buffer, format="png")
        parts += [
            "<h2>Over training</h2>",
            _image(buffer.getvalue(), "metrics over training steps, a line for each run"),
        ]
    parts += ["<h2>Each run</h2>", *(_article(client, run, base) for run in runs)]
    parts += ["<h2>What the numbers mean</h2>", _glossary(runs), "</body></html>\n"]
    return "\n".join(parts)


def in_families(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """Newest first, each run followed by its parts, oldest first; parts whose run is not there stand alone."""
    ids = {run.run_id for run in runs}

    def family(head: RunSummary) -> list[RunSummary]:
        parts = sorted((run for run in runs if run.parent == head.run_id), key=lambda run: run.start)
        return [head, *(member for part in parts for member in family(part))]

    return [member for run in runs if run.parent not in ids for member in family(run)]


def _side_by_side(compared: Comparison) -> str:
    """One line a run: what was set differently, what came out."""
    ids = {run.run_id for run in compared.runs}
    params = dict(list(compared.params.items())[:_MOST_COLUMNS])
    head = ["run", "status", "took", *(escape(key.rpartition("init_args.")[2] or key) for key in params)]
    first_number = len(head)
    for key in compared.metrics:
        known = term(key)
        meaning = escape(f"{key}: {known.meaning}" if known else key, quote=True)
        head.append(f'<span title="{meaning}">{escape(title(key))}</span>')
    rows = []
    for index, (run, label) in enumerate(zip(compared.runs, labels(compared.runs), strict=True)):
        name = f'<a href="#{escape(run.run_id, quote=True)}">{escape(label)}</a>'
        cells = [f"&nbsp;&nbsp;↳ {name}" if run.parent in ids else name, run.status.lower()]
        cells += ["" if run.duration_seconds is None else duration(run.duration_seconds)]
        cells += [escape(values[index]) for values in params.values()]
        rows.append([*cells, *(number(values[index]) for values in compared.metrics.values())])
    left = escape(", ".join(list(compared.params)[_MOST_COLUMNS:]))
    return _table(head, rows, first_number) + (f'<p class="muted">Also different: {left}.</p>' if left else "")


def _article(client: MlflowClient, run: RunSummary, base: str | None) -> str:
    """One run: description, numbers, figures, config, provenance."""
    name = escape(f"run {run.run_id}")
    facts = [f'<a href="{escape(base + run.run_id, quote=True)}">{name}</a>' if base else name, run.status.lower()]
    facts.append(f"started {run.start[:16].replace('T', ' ')} UTC")
    if "git_commit" in run.tags:
        facts.append(f"commit {escape(run.tags['git_commit'][:10])}")
    parts = [f'<article id="{escape(run.run_id)}"><h3>{escape(run.name)}</h3>']
    parts.append(f'<p class="muted">{" · ".join(facts)}</p>')
    if run.description:
        parts.append(f"<p>{escape(run.description)}</p>")
    shown = compare([run]).metrics
    if shown:
        values = [number(value) for (value,) in shown.values()]
        parts.append(_table([escape(title(key)) for key in shown], [values], 0))
    figures, config = _artifacts(client, run)
    parts += [_image(content, Path(path).stem.replace("_", " ")) for path, content in figures.items()]
    parts += [_folded("config.yaml", without_credentials(text)) for text in config]
    parts.append(_folded("code, packages, machine", "\n".join(f"{key}: {value}" for key, value in run.tags.items())))
    return "\n".join([*parts, "</article>"])


def _artifacts(client: MlflowClient, run: RunSummary) -> tuple[dict[str, bytes], list[str]]:
    """The figures of a run by path, and its config; what cannot be had is left out."""
    from mlflow.exceptions import MlflowException

    figures: dict[str, bytes] = {}
    config: list[str] = []
    folders: list[str | None] = [None]
    with suppress(MlflowException, UserError, OSError):
        while folders:
            for entry in client.list_artifacts(run.run_id, folders.pop()):
                if entry.is_dir:
                    folders.append(entry.path)
                elif entry.path == "config.yaml":
                    config.append(artifact(run, entry.path).read_text(errors="replace"))
                elif entry.path.endswith(".png") and (entry.file_size or 0) <= _MOST_BYTES:
                    figures[entry.path] = artifact(run, entry.path).read_bytes()
    return dict(sorted(figures.items())), config


def _glossary(runs: Sequence[RunSummary]) -> str:
    """The metrics that these runs have, in words."""
    known = {name: found for name in map(bare, compare(runs).metrics) if (found := term(name))}
    rows = [[f"<code>{escape(name)}</code>", one.better, escape(one.meaning)] for name, one in known.items()]
    return _table(["metric", "better", "meaning"], rows, 3)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: int) -> str:
    """A table of ready-made HTML cells; columns from number ``numeric`` on are numbers."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="n"' if column >= numeric else "" for column in range(len(cells))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{line("th", head)}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _image(png: bytes, caption: str) -> str:
    data, text = base64.b64encode(png).decode(), escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _folded(summary: str, text: str) -> str:
    """Long text that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
