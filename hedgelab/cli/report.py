"""``hedgelab report``: an experiment as one HTML file, kept in the experiment itself."""

from __future__ import annotations

from pathlib import Path

from hedgelab.cli.light import LightParser
from hedgelab.errors import UserError
from hedgelab.tracking.runs import REPORT_TAG, open_runs
from hedgelab.tracking.store import runs_dir, tracking_uri, without_credentials


def run(command: str, words: list[str]) -> int:
    """Build the report, write it, and log it to the experiment's run ``report``.

    Args:
        command: ``report``.
        words: Its options.

    Raises:
        UserError: There is no such experiment, or nothing in it, or the file to write is there already.
    """
    parser = LightParser(command, "Build one self-contained HTML file about an experiment.")
    parser.add_argument("--experiment", default="hedgelab", metavar="NAME", help="the experiment")
    parser.add_argument("--to", metavar="FILE", help="file to write; runs/reports/<experiment>.html by default")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="most runs, the newest")
    parser.add_argument("--ui", metavar="ADDRESS", help="where the MLflow UI answers, for links to runs")
    options = parser.parse(words)
    if options.limit < 1:
        raise UserError(f"--limit: must be at least 1, got {options.limit}")
    if options.to is not None and Path(options.to).exists():
        raise UserError(f"--to: {options.to} is there already and nothing is overwritten; give another file")
    uri = tracking_uri()
    address = options.ui or (without_credentials(uri) if uri.startswith("http") else "http://127.0.0.1:5000")

    from hedgelab.reports.report import build

    text = build(options.experiment, options.limit, address)
    name = f"{options.experiment.replace('/', '_')}.html"
    file = Path(options.to) if options.to else runs_dir(uri) / "reports" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    run_id = keep(options.experiment, file)
    print(f"report: {file} ({len(text) / 1e6:.1f} MB), and report.html in run {run_id}")
    return 0


def keep(experiment: str, file: Path) -> str:
    """Log a report to the experiment's one run of reports, which is made if missing; its id."""
    client, experiments = open_runs()
    (number,) = [key for key, name in experiments.items() if name == experiment]
    found = client.search_runs([number], filter_string=f"tags.`{REPORT_TAG}` = 'true'", max_results=1)
    note = "The report of this experiment: open the artifact report.html. Each `hedgelab report` renews it."
    tags = {REPORT_TAG: "true", "mlflow.note.content": note}
    run_id: str = found[0].info.run_id if found else client.create_run(number, run_name="report", tags=tags).info.run_id
    client.log_text(run_id, file.read_text(), "report.html")
    client.set_terminated(run_id)
    return run_id
