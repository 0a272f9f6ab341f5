"""A report of an experiment: its runs side by side, their curves, and each run's figures and config.

It is one plain HTML page with everything inside it, no script, readable on light and dark screens and on paper.
"""

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
from hedgelab.tracking.runs import CONTROL_TAG, REPORT_TAG, RunSummary, artifact, list_runs, open_runs
from hedgelab.tracking.store import without_credentials

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_MOST_BYTES = 2_000_000  # of one figure; larger ones are left out
_MOST_COLUMNS = 6
STYLE = """
:root { color-scheme: light dark }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; font: 15px/1.5 system-ui, sans-serif }
h1, h2, h3, p { margin: 1.2rem 0 .4rem } .muted, summary { opacity: .7 } code, pre { font: 12.5px/1.45 monospace }
.scroll, pre { overflow: auto; max-height: 32rem } table { border-collapse: collapse; font-size: 13.5px }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid #8884; vertical-align: top;
  white-space: nowrap }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td:last-child { white-space: normal }
article { border: 1px solid #8886; border-radius: 8px; padding: 0 1.2rem 1rem; margin: 1rem 0; break-inside: avoid }
figure { margin: .6rem 0; display: inline-block; background: #fff; color: #555; border-radius: 6px; padding: .4rem }
img { display: block; max-width: 100%; height: auto } figcaption { font-size: 12px }
@media print { details { display: none } }
"""


def build(experiment: str, limit: int = 100, address: str | None = None) -> str:
    """The report of an experiment's newest runs as one HTML document, with links to where the MLflow UI answers."""
    client, experiments = open_runs()
    runs = in_families([run for run in list_runs(experiment, limit=limit) if REPORT_TAG not in run.tags])
    if not runs:
        raise UserError(f"--experiment: '{experiment}' has no runs yet")
    experiment_id = next(key for key, name in experiments.items() if name == experiment)
    base = None if address is None else f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs/"
    finished, starts = sum(run.status == "FINISHED" for run in runs), sorted(run.start[:10] for run in runs)
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    drawn = curves([run for run in runs if run.parent is None] or runs, curve_metrics(runs))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    parts = [
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(experiment)}: report</title>',
        f"<style>{STYLE}</style></head>\n<body>",
        f"<h1>{escape(experiment)}</h1>",
        f'<p class="muted">{len(runs)} runs, {finished} finished, started {starts[0]} to {starts[-1]}; written by hedgelab '
        f"{now}</p>",
        "<h2>Runs side by side</h2>",
        _side_by_side(compare(runs)),
    ]
    if drawn:
        from hedgelab.plots.training import overlaid_curves

        buffer = io.BytesIO()
        overlaid_curves(drawn, {key: title(key) for key in drawn}, "").savefig(buffer, format="png")
        image = _image(buffer.getvalue(), "metrics over training steps, a line for each run")
        parts += ["<h2>Over training</h2>", image]
    meanings = {name: known for name in map(bare, compare(runs).metrics) if (known := term(name))}
    rows = [[f"<code>{escape(name)}</code>", one.better, escape(one.meaning)] for name, one in meanings.items()]
    parts += ["<h2>Each run</h2>", *(_article(client, run, base) for run in runs)]
    parts += ["<h2>What the numbers mean</h2>", table_of(["metric", "better", "meaning"], rows, 3), "</body></html>\n"]
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
        name = f'<a href="#{escape(run.run_id, quote=True)}">{escape(label)}</a>{_control(run)}'
        cells = [f"&nbsp;&nbsp;↳ {name}" if run.parent in ids else name, run.status.lower()]
        cells += ["" if run.duration_seconds is None else duration(run.duration_seconds)]
        cells += [escape(values[index]) for values in params.values()]
        rows.append([*cells, *(number(values[index]) for values in compared.metrics.values())])
    left = escape(", ".join(list(compared.params)[_MOST_COLUMNS:]))
    return table_of(head, rows, first_number) + (f'<p class="muted">Also different: {left}.</p>' if left else "")


def _control(run: RunSummary) -> str:
    """What a run's SAE is a control for, to stand behind its name."""
    return f' <span class="muted">(control: {escape(run.tags[CONTROL_TAG])})</span>' if CONTROL_TAG in run.tags else ""


def _article(client: "MlflowClient", run: RunSummary, base: str | None) -> str:
    """One run: description, numbers, figures, config, provenance."""
    name = escape(f"run {run.run_id}")
    facts = [f'<a href="{escape(base + run.run_id, quote=True)}">{name}</a>' if base else name, run.status.lower()]
    facts.append(f"started {run.start[:16].replace('T', ' ')} UTC")
    if "git_commit" in run.tags:
        facts.append(f"commit {escape(run.tags['git_commit'][:10])}")
    parts = [f'<article id="{escape(run.run_id)}"><h3>{escape(run.name)}{_control(run)}</h3>']
    parts += [f'<p class="muted">{" · ".join(facts)}</p>', f"<p>{escape(run.description or '')}</p>"]
    if shown := compare([run]).metrics:
        values = [number(value) for (value,) in shown.values()]
        parts.append(table_of([escape(title(key)) for key in shown], [values], 0))
    texts = {}
    for path, content in _artifacts(client, run):
        if path == "config.yaml":
            texts[path] = without_credentials(content.decode(errors="replace"))
        else:
            parts.append(_image(content, Path(path).stem.replace("_", " ")))
    texts["code, packages, machine"] = "\n".join(f"{key}: {value}" for key, value in run.tags.items())
    parts += [f"<details><summary>{key}</summary><pre>{escape(text)}</pre></details>" for key, text in texts.items()]
    return "\n".join([*parts, "</article>"])


def _artifacts(client: "MlflowClient", run: RunSummary) -> list[tuple[str, bytes]]:
    """The figures of a run and its config, by path; what cannot be had is left out."""
    from mlflow.exceptions import MlflowException

    found: dict[str, bytes] = {}
    with suppress(MlflowException, UserError, OSError):
        for entry in [*client.list_artifacts(run.run_id), *client.list_artifacts(run.run_id, "figures")]:
            small = not entry.is_dir and (entry.file_size or 0) <= _MOST_BYTES
            if small and (entry.path == "config.yaml" or entry.path.endswith(".png")):
                found[entry.path] = artifact(run, entry.path).read_bytes()
    return sorted(found.items())


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: int, fixed: Iterable[Sequence[str]] = ()) -> str:
    """A table of ready-made HTML cells; columns from number ``numeric`` on are numbers, ``fixed`` rows belong to the head."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = [' class="n"' if column >= numeric else "" for column in range(len(cells))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    top = f"<tr>{line('th', head)}</tr>" + "".join(f'<tr class="fixed">{line("td", row)}</tr>' for row in fixed)
    return f'<div class="scroll"><table><thead>{top}</thead><tbody>\n{body}</tbody></table></div>'


def _image(png: bytes, caption: str) -> str:
    data, text = base64.b64encode(png).decode(), escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
