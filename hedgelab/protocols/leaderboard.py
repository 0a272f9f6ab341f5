"""``hedgelab leaderboard``: the suites of ``evaluate`` on a list of SAEs, in one table and one page.

Scores are in the SAEs' own runs, so that whatever was scored is not scored again after a stop. Controls are SAEs of the list
with a frozen part; on toys the oracle is another. An SAE that cannot be had or measured is named with the reason.
"""

from typing import Any

from hedgelab.config.tree import Tree
from hedgelab.errors import UserError
from hedgelab.protocols.evaluation.evaluate import Evaluate, Subject, distinct, find, say
from hedgelab.protocols.evaluation.suite import suite_classes
from hedgelab.protocols.study import Bench, Outcome
from hedgelab.reports.leaderboard import Entry, page, ranked
from hedgelab.tracking.listing import aligned, number


class Leaderboard(Evaluate):
    """Score a list of SAEs, and rank them beside their controls; the page is kept in ``html``.

    ``title`` and ``about`` are what it says of itself, ``sort`` is the score by which it is sorted.
    """

    html = ""

    def __init__(self, *evaluation: Any, title: str, about: str, sort: str | None, experiment: str) -> None:
        super().__init__(*evaluation)
        self.title, self.about, self.sort, self.experiment = title, about, sort, experiment
        self._missing: dict[str, str] = {}  # why SAEs are not on the board
        self._entries: list[Entry] = []

    def run(self, bench: Bench) -> Outcome:
        """Find and score all that can be had; table and page."""
        subjects: list[Subject] = []
        for word in self.saes:
            try:
                found = find(word, self.class_path)[0]
                for one in found:
                    one.data(self.data, self.truth)  # whether it is known what it reads
                subjects += found
            except UserError as error:
                self._leave_out(word, error)
        for one in subjects:
            one.experiment = self.experiment
        self.scores(distinct(subjects))
        if not self._entries:
            raise UserError(f"leaderboard: none of the SAEs could be scored; {'; '.join(self._missing.values())}")
        titles = {metric: text for cls in suite_classes(self.wanted).values() for metric, text in cls.titles.items()}
        titles = {key: text for key, text in titles.items() if any(key in one.metrics for one in self._entries)}
        if (sort := self.sort or next(iter(titles), "")) not in titles:
            raise UserError(f"sort: expected one of the scores {', '.join(titles)}, got {sort!r}")
        entries = ranked(self._entries, sort, titles[sort])
        self.html = page(self.title, self.about, entries, titles, sort, self._missing)
        shown = [sort, *(key for key in titles if key != sort)][:5]
        table = [[one.name, one.control, *(number(one.metrics.get(key)) for key in shown)] for one in entries]
        lines = [f"{len(entries)} SAEs", *aligned([["SAE", "control", *shown], *table]).splitlines()]
        rows = [{**one._asdict(), **one.metrics} for one in entries]
        for row in rows:
            del row["metrics"]
        return Outcome({}, {"leaderboard.csv": rows}, headline=lines, texts={"leaderboard.html": self.html})

    def score_group(self, tree: Tree, subjects: list[Subject], whose: str) -> dict[str, dict[str, float]]:
        """Scores of SAEs that read the same activations, put on the board; where they cannot be measured, why."""
        try:
            found = super().score_group(tree, subjects, whose)
        except UserError as error:
            for one in subjects:
                self._leave_out(one.name, error)
            return {}
        given = tree.get("init_args", {})
        said = [given[key] for key in ("model", "layer", "hook") if given.get(key) is not None]
        reads = " ".join(map(str, said or [tree["class_path"].rpartition(".")[2]]))
        for one in subjects:  # the oracle among them
            kind = type(one.sae).__name__.removesuffix("SAE")
            self._entries.append(Entry(one.name, kind, one.sae.control, reads, one.sae.d_sae, found[one.name]))
        return found

    def _leave_out(self, name: str, error: UserError) -> None:
        say(f"{name}: left out; {error}")
        self._missing[name] = str(error)
