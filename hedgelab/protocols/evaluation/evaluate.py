"""``hedgelab evaluate``: suites of scores for trained SAEs, put into their runs, and several SAEs side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence

from jsonargparse import ArgumentParser

import hedgelab.data.llm
import hedgelab.data.tensors
import hedgelab.data.toy  # noqa: F401
from hedgelab.config.signatures import Parameter
from hedgelab.config.tree import Tree
from hedgelab.config.walk import Walk
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.errors import UserError, one_line
from hedgelab.protocols.evaluation import across
from hedgelab.protocols.evaluation.reader import Readings
from hedgelab.protocols.evaluation.subjects import TAG, Subject, distinct, find, say
from hedgelab.protocols.evaluation.suite import Scores, choose, make_suites, names_of, suite_classes
from hedgelab.protocols.study import Bench, Outcome, Study, as_csv
from hedgelab.tracking.listing import aligned
from hedgelab.tracking.runs import RunSummary
from hedgelab.tracking.store import ensure_store

Results = dict[str, dict[str, float]]  # metrics by SAE


class Evaluate(Study):
    """Score trained SAEs; scores, tables and figures go to the SAEs' own runs."""

    tracked = False

    def __init__(
        self,
        saes: Sequence[str],  # runs, runs whose parts have SAEs, and folders
        wanted: Sequence[str] = ("all",),  # suites, by name or class path; "all" are all that can be run
        options: Tree | None = None,  # of the suites, by key
        data: Tree | None = None,  # replaces parts of the SAEs' own section
        x: str
        | None = None,  # the parameter that several SAEs are drawn against; None is the first number that differs
        class_path: str | None = None,  # of SAEs in folders, where it is one of the user's own
    ) -> None:
        self.suites = make_suites(options or {}, suite_classes(wanted))
        names_of(self.suites, wanted)  # a name that is none shows before anything is read
        self.saes, self.wanted, self.data, self.x, self.class_path = saes, wanted, data or {}, x, class_path

    def run(self, bench: Bench) -> Outcome:
        """Find the SAEs, score them, and put several side by side."""
        found = [find(word, self.class_path) for word in self.saes]
        subjects = distinct([one for some, _ in found for one in some])
        groups: dict[str, tuple[Tree, list[Subject]]] = {}  # those that read the same activations
        for one in subjects:
            tree = one.data(self.data)
            known = None if one.source is None else [one.source.normalisation, one.source.scale, one.source.mean]
            key = json.dumps([tree, known], sort_keys=True, default=str)
            groups.setdefault(key, (tree, []))[1].append(one)
        scored: Results = {}
        for tree, members in groups.values():
            scored |= self._score(tree, members)
        results = {subject.name: scored.get(subject.name, {}) for subject in subjects}
        parent = found[0][1] if len(found) == 1 else None
        return Outcome(headline=side_by_side(results, subjects, self.x, parent))

    def _score(self, tree: Tree, subjects: Sequence[Subject]) -> Results:
        """The metrics of SAEs that read the same activations; each result is in the SAE's run as soon as it is there.

        A suite that was run on an SAE before, with the same options, texts and data, is not run again.
        """
        data = make_data(tree)
        suites, left_out = choose(self.suites, self.wanted, isinstance(data, LLMDataModule))
        for name, reason in left_out.items():
            say(f"{name}: left out; {reason}")
        for subject in subjects:
            if subject.sae.d_in != data.d_in:
                raise UserError(
                    f"{subject.name}: reads activations of width {subject.sae.d_in}, data gives {data.d_in}; set data"
                )
        own = "normalisation" in self.data.get("init_args", self.data)
        readings = Readings(data, None if own else subjects[0].source)
        results: Results = {}
        try:
            for suite in suites:
                mark, start = suite.mark(tree), time.monotonic()
                known = {one.name: one.known_scores(suite.name, mark) for one in subjects}
                missing = {one.name: one for one in subjects if known[one.name] is None}
                for name, metrics in known.items():
                    results.setdefault(name, {}).update(metrics or {})
                if not missing:
                    say(f"{suite.name}: was done before")
                    continue
                for name, scores in suite.score({name: one.sae for name, one in missing.items()}, readings):
                    record(missing[name].run_id, suite.name, mark, scores)
                    results[name] |= scores.metrics
                say(f"{suite.name}: {len(missing)} SAE{'s' * (len(missing) > 1)} in {time.monotonic() - start:.0f} s")
        finally:
            data.teardown("fit")
        return results


def record(run_id: str, suite: str, mark: str, scores: Scores) -> None:
    """Put a suite's scores into a run; the tag that says so comes last."""
    from mlflow.entities import Metric

    client, now = ensure_store(), int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in scores.metrics.items()])
    for file, table in scores.tables.items():
        client.log_text(run_id, table if isinstance(table, str) else as_csv(table), f"evaluation/{file}")
    for file, draw in scores.figures.items():
        client.log_figure(run_id, draw(), f"figures/{file}")
    client.set_tag(run_id, f"{TAG}.{suite}", mark)


def make_data(tree: Tree) -> ActivationDataModule:
    """A DataModule from its section."""
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    parser.add_subclass_arguments(ActivationDataModule, "data", required=True)
    try:
        data: ActivationDataModule = parser.instantiate(parser.parse_object({"data": tree})).data
    except Exception as error:
        walk = Walk({"data": tree}, {"data": Parameter(ActivationDataModule)})
        raise UserError(walk.first or one_line(str(error))) from error
    return data


def side_by_side(
    results: Mapping[str, Mapping[str, float]], subjects: Sequence[Subject], x: str | None, parent: RunSummary | None
) -> list[str]:
    """What to print; with an axis, table and figure also go to the run above."""
    if len(results) == 1:
        ((name, metrics),) = results.items()
        return [name, *aligned([[f"  {key}", f"{value:.4g}"] for key, value in metrics.items()]).splitlines()]
    axis = across.find_axis({one.name: one.params for one in subjects}, x)
    if axis is None:
        return [
            f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in sorted(metrics.items()))
            for name, metrics in results.items()
        ]
    rows = across.rows_of(axis, results)
    lines = across.means(rows)
    if parent is not None:
        client = ensure_store()
        client.log_text(parent.run_id, as_csv(across.flat(rows)), "evaluation.csv")
        if (drawn := across.figure(axis, rows, parent.name)) is not None:
            client.log_figure(parent.run_id, drawn, "figures/evaluation.png")
        lines.append(
            f"figure and table: run {parent.run_id[:8]} ({parent.name}), figures/evaluation.png, evaluation.csv"
        )
    return lines
