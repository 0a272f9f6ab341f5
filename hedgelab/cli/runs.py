"""``hedgelab runs``: tracked runs with their key numbers, in the terminal."""

from __future__ import annotations

from hedgelab.cli.light import LightParser
from hedgelab.errors import UserError
from hedgelab.tracking.listing import as_json, format_table
from hedgelab.tracking.runs import list_runs


def run(command: str, words: list[str]) -> int:
    """List runs, newest first, as a table or as one JSON document.

    Args:
        command: ``runs``.
        words: Its options.

    Raises:
        UserError: There is no store or no such experiment, or an option makes no sense.
    """
    parser = LightParser(command, "List tracked runs with their key numbers, newest first.")
    parser.add_argument("--last", action="store_true", help="only the newest run")
    parser.add_argument("--json", action="store_true", help="a JSON array: name, status, params, tags, final metrics")
    parser.add_argument("--experiment", metavar="NAME", help="only runs of this experiment")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="most runs listed")
    options = parser.parse(words)
    if options.limit < 1:
        raise UserError(f"--limit: must be at least 1, got {options.limit}")
    found = list_runs(experiment=options.experiment, last=options.last, limit=options.limit)
    print(as_json(found) if options.json else format_table(found))
    return 0
