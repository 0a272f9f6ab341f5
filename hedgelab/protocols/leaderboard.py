"""``hedgelab leaderboard``: the suites of ``evaluate`` on a list of SAEs, in one table and one page.

Scores are in the SAEs' own runs, so that whatever was scored is not scored again after a stop. Controls are SAEs of the list
with a frozen part; on toys the oracle is another. An SAE that cannot be had or measured is named with the reason.
"""

from collections.abc import Sequence
from typing import Any

from hedgelab.config.tree import Tree
from hedgelab.errors import UserError
from hedgelab.protocols.evaluation.evaluate import Evaluate, Subject, distinct, find, say
from hedgelab.protocols.evaluation.oracle import NAME as ORACLE
from hedgelab.protocols.evaluation.suite import suite_classes
from hedgelab.protocols.study import Bench, Outcome
from hedgelab.reports.leaderboard import Entry, page, ranked
from hedgelab.tracking.listing import aligned, number

EXPERIMENT = "leaderboard"


class Leaderboard(Evaluate):
    """Score a list of SAEs, and rank them beside their controls; the page is kept in ``html``.

    ``title`` and ``about`` are what it says of itself, ``sort`` is the score by which it is sorted.
    """

    html = ""

    def __init__(self, *evaluation: Any, title: str, about: str, sort: str | None, experiment: str) -> None:
        super().__init__(*evaluation)
        self.title, self.about, self.sort, self.experiment = title, about, sort, experiment
        self.missing: dict[str, str] = {}  # why SAEs are not on the board
        self._entries: list[Entry] = []

    def run(self, bench: Bench) -> Outcome:
        """Find and score all that can be had; table and page."""
        subjects: list[Subject] = []
        for word in self.saes:
            try:
                subjects += find(word, self.class_path)[0]
            except UserError as error:
                self._leave_out(word, error)
        for one in subjects:
            one.experiment = self.experiment
        self.scores(distinct(subjects))
        titles = {metric: text for cls in suite_classes(self.wanted).values() for metric, text in cls.titles.items()}
        titles = {key: text for key, text in titles.items() if any(key in one.metrics for one in self._entries)}
        sort = self.sort or next(iter(titles), "")
        if not self._entries:
            raise UserError(f"leaderboard: none of the SAEs could be scored; {'; '.join(self.missing.values())}")
        if sort not in titles:
            raise UserError(f"sort: expected one of the scores {', '.join(titles)}, got {sort!r}")
        entries = ranked(self._entries, sort, titles[sort])
        self.html = page(self.title, self.about, entries, titles, sort, self.missing)
        shown = [sort, *(key for key in titles if key != sort)][:5]
        table = [
            [one.name, one.control or one.kind, *(number(one.metrics.get(key)) for key in shown)] for one in entries
        ]
        lines = [f"{len(entries)} SAEs", *aligned([["SAE", "kind", *shown], *table]).splitlines()]
        rows = [{**one._asdict(), "metrics": "", **one.metrics} for one in entries]
        rows = [{key: value for key, value in row.items() if key != "metrics"} for row in rows]
        return Outcome({}, {"leaderboard.csv": rows}, headline=lines, texts={"leaderboard.html": self.html})

    def score_group(self, tree: Tree, subjects: Sequence[Subject], whose: str) -> dict[str, dict[str, float]]:
        """Scores of SAEs that read the same activations, put on the board; where they cannot be measured, why."""
        try:
            found = super().score_group(tree, subjects, whose)
        except UserError as error:
            for one in subjects:
                self._leave_out(one.name, error)
            return {}
        arguments, known = tree.get("init_args", {}), {one.name: one.sae for one in subjects}
        place = arguments.get("hook", arguments.get("layer", ""))
        reads = (
            f"{arguments['model']} {place}".strip() if "model" in arguments else tree["class_path"].rpartition(".")[2]
        )
        for name, metrics in found.items():
            sae = known.get(name)
            kind, control = (ORACLE, ORACLE) if sae is None else (type(sae).__name__.removesuffix("SAE"), sae.control)
            self._entries.append(Entry(name, kind, control, reads, sae.d_sae if sae else 0, metrics))
        return found

    def _leave_out(self, name: str, error: UserError) -> None:
        say(f"{name}: left out; {error}")
        self.missing[name] = str(error)
