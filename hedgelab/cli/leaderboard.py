"""``hedgelab leaderboard``: the scores of a list of SAEs on one page."""

from functools import partial
from pathlib import Path

import yaml

from hedgelab.config.tree import compose, config_files, load, opening_comment, with_bare_flags
from hedgelab.errors import UserError

_HELP = """\
usage: hedgelab leaderboard --config FILE [--list] [--to FILE] [--KEY VALUE ...]

Score a list of SAEs, and rank them in a table and on one HTML page. FILE has what configs of `hedgelab evaluate` have, and:

  saes: [smollm2_saes.yaml]  # saelens:RELEASE/ID; runs and folders as for `evaluate`; configs of sweeps, beside this file
  title: My board
  sort: probing/f1_k5        # the score by which the page is sorted at first
  experiment: board          # of the board's run, and of those that SAEs without one get

SAEs with a frozen part are its controls. An SAE that was scored is not scored again, so a stopped board goes on where it was.
--list names the SAEs, and reads and trains nothing. The page goes to runs/reports or to --to, and into the board's run.
"""
_OWN = ("saes", "title", "sort", "experiment", "to", "list")


def run(command: str, words: list[str]) -> int:
    """Score the SAEs of a board, as far as they are not, and write its page."""
    if not words or {"-h", "--help"} & set(words):
        print(_HELP, end="")
        return 0
    if not (files := config_files(words)):
        raise UserError("--config: name the file of a board, such as configs/leaderboard/smollm2.yaml")
    words = with_bare_flags(words, ["list", "truth"])
    tree = compose(words)
    text = yaml.safe_dump(tree)
    saes, title, sort, experiment, to, lists = (tree.pop(key, None) for key in _OWN)
    if not isinstance(saes, list) or not saes or not all(isinstance(one, str) for one in saes):
        what = "saelens:RELEASE/ID, a run, a folder, or a sweep's config"
        raise UserError(f"saes: expected a list of SAEs ({what}), got {saes!r}; see `hedgelab leaderboard --help`")
    beside = [file.parent for file in files if "saes" in load(file)] or [Path()]
    named = [str(beside[-1] / one) if one.endswith(".yaml") else one for one in saes]
    if lists:
        from hedgelab.protocols.sweep.config import read_sweep

        for one in named:
            cells = read_sweep(["--config", one]).cells if one.endswith(".yaml") else []
            print("\n".join(f"{cell.name} ({one})" for cell, _ in cells) or one)
        return 0

    from hedgelab.cli.evaluate import evaluation_of
    from hedgelab.cli.studies import conduct
    from hedgelab.protocols.leaderboard import Leaderboard
    from hedgelab.protocols.study import Bench
    from hedgelab.tracking import MLflowTracker
    from hedgelab.tracking.store import runs_dir, tracking_uri

    name, about, experiment = files[0].stem, opening_comment(files[:1]) or "", experiment or "leaderboard"
    make = partial(Leaderboard, title=title or name, about=about, sort=sort, experiment=experiment)
    board = evaluation_of(named, words, tree, make, _OWN)
    tracker = MLflowTracker(experiment, name, description=about, system_metrics=False)
    print("\n".join(conduct(board, Bench(0, tracker), text)))
    file = Path(to or runs_dir(tracking_uri()) / "reports" / f"leaderboard_{name}.html")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(board.html)
    print(f"page: {file}, and leaderboard.html in the run")
    return 0
