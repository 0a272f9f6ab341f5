"""``hedgelab compare``: runs side by side, in the terminal and as curves."""

from __future__ import annotations

from pathlib import Path

from hedgelab.cli.light import LightParser
from hedgelab.errors import UserError
from hedgelab.tracking.comparison import as_text, compare, curve_metrics, curves
from hedgelab.tracking.glossary import title
from hedgelab.tracking.runs import resolve_run
from hedgelab.tracking.store import runs_dir, tracking_uri


def run(command: str, words: list[str]) -> int:
    """Print a table of the parameters that differ and of the metrics, and draw the curves.

    Args:
        command: ``compare``.
        words: Its options.

    Raises:
        UserError: There is no such run or metric, or the file to write is there already.
    """
    parser = LightParser(command, "Set runs side by side: parameters that differ, metrics, curves.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's id, its name, or 'last'")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="metrics to show; the best known by default")
    parser.add_argument("--to", metavar="FILE", help="figure to write; runs/comparisons/<ids>.png by default")
    options = parser.parse(words)
    if options.to is not None and Path(options.to).exists():
        raise UserError(f"--to: {options.to} is there already and nothing is overwritten; give another file")
    runs = list({one.run_id: one for one in map(resolve_run, options.runs)}.values())
    known = {key for one in runs for key in one.metrics}
    for name in options.metrics or []:
        if name not in known:
            raise UserError(f"--metrics: none of the runs has '{name}'; they have {', '.join(sorted(known)[:12])} ...")
    table = compare(runs, options.metrics)
    print(as_text(table))
    drawn = curves(runs, options.metrics or curve_metrics(runs))
    if drawn:
        from hedgelab.plots.training import overlaid_curves

        ids = "-".join(one.run_id[:8] for one in runs[:6])
        file = Path(options.to) if options.to else runs_dir(tracking_uri()) / "comparisons" / f"{ids}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        overlaid_curves(drawn, {key: title(key) for key in drawn}, f"{len(runs)} runs over training").savefig(file)
        print(f"\ncurves: {file}")
    return 0
