"""``hedgelab evaluate``: suites of scores for trained SAEs, put into their runs, and several SAEs side by side."""

import copy
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

import hedgelab.data.llm
import hedgelab.data.tensors  # noqa: F401
from hedgelab.config.signatures import Parameter, class_of
from hedgelab.config.tree import Tree, overlay
from hedgelab.config.walk import Walk, resolve
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.planting import PlantedActivations
from hedgelab.data.source import ActivationSource
from hedgelab.data.toy import ToyDataModule
from hedgelab.errors import UserError
from hedgelab.identity import deciding, stable_id
from hedgelab.interop.saelens import import_pretrained
from hedgelab.protocols.evaluation.across import side_by_side
from hedgelab.protocols.evaluation.oracle import Oracle
from hedgelab.protocols.evaluation.reader import Readings
from hedgelab.protocols.evaluation.suite import Scores, choose, class_path, make_suites, names_of, suite_classes
from hedgelab.protocols.recipe import Recipe
from hedgelab.protocols.study import Bench, Outcome, Study, as_csv
from hedgelab.saes import SAE, save_sae, weights_sha256
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.models import link_metrics
from hedgelab.tracking.params import flatten
from hedgelab.tracking.runs import (
    CONTROL_TAG,
    ORACLE_TAG,
    SAE_TAG,
    FoundSAE,
    RunSummary,
    artifact,
    children,
    resolve_run,
    resolve_sae,
    run_with,
)
from hedgelab.tracking.store import ensure_store, runs_dir, tracking_uri

TAG = "evaluated"


class Subject:
    """An SAE to be scored: that of a run, or one in a folder, which gets a run when there are scores to put into it.

    ``sae_class`` is the path of its class, where that is one of the user's own and no run says so.
    """

    experiment = "evaluation"  # of the run that it gets

    def __init__(self, name: str, folder: Path, run: RunSummary | None, sae_class: str | None = None) -> None:
        self.name, self.folder, self.run, self._sae_class = name, folder, run, sae_class
        self.source = ActivationSource.load(folder)  # what is known of its activations
        self.config: Tree = {}  # the resolved config of its run
        if run is not None:
            with suppress(UserError):  # a run of older days, or of another tool
                self.config = yaml.safe_load(artifact(run, "config.yaml").read_text()) or {}

    @cached_property
    def sae(self) -> SAE:
        """The SAE, ready to measure."""
        return FoundSAE(self.folder, self.run).load(self._sae_class)

    @property
    def identity(self) -> dict[str, str]:
        """The tag by which the run that it got is known again."""
        return {"measured_sae": weights_sha256(self.folder)}

    @cached_property
    def scored_before(self) -> RunSummary | None:
        """Its run, or the one that it got before."""
        return self.run or run_with(self.identity, self.experiment)

    @cached_property
    def run_id(self) -> str:
        """The run that gets its scores; for a folder one is opened now."""
        if self.scored_before is not None:
            return self.scored_before.run_id
        tags = {"sae_folder": str(self.folder), **({CONTROL_TAG: self.sae.control} if self.sae.control else {})}
        tracker = MLflowTracker(self.experiment, Path(self.name).resolve().name, {**self.identity, **tags})
        tracker.finalize("success")
        return str(tracker.run_id)

    def known_scores(self, suite: str, mark: str) -> dict[str, float] | None:
        """Its scores of a suite that was run on it before with the same mark; None where none was."""
        if self.scored_before is None or self.scored_before.tags.get(f"{TAG}.{suite}") != mark:
            return None
        return {name: value for name, value in self.scored_before.metrics.items() if name.startswith(f"{suite}/")}

    @property
    def params(self) -> dict[str, str]:
        """What decided its numbers, flat."""
        if not self.config:
            return {} if self.run is None else self.run.params
        facts = deciding(self.config)
        return flatten({key: value for key, value in facts.items() if key not in ("code", "inputs")})

    def data(self, said: Tree, truth: bool = False) -> Tree:
        """Its section ``data``: what its run's config says, or its own source, and what the user says over that.

        Of planted activations they are the natural ones, unless the planted ``truth`` is asked for.
        """
        tree: Tree = seeded(self.config.get("data") or {}, self.config.get("seed_everything"))
        source = self.source
        if tree and not truth and class_of(tree, ActivationDataModule) is PlantedActivations:
            tree = tree["init_args"]["base"]
        said_class = class_of(said, ActivationDataModule) if "class_path" in said else None
        arguments = {key: value for key, value in said.get("init_args", said).items() if key != "class_path"}
        if not tree and source is not None and (said_class is None or issubclass(said_class, LLMDataModule)):
            keys = ("model", "layer" if source.layer is not None else "hook", "context_length", "skip_first")
            known = {key: value for key in keys if (value := getattr(source, key)) is not None}
            tree = {"class_path": class_path(LLMDataModule), "init_args": known}
        if both := arguments.keys() & {"layer", "hook"}:
            if len(both) > 1:
                raise UserError("--data.layer and --data.hook: both say where in the model; give one")
            for key in ("layer", "hook"):
                tree.get("init_args", {}).pop(key, None)
        overlay(tree, {**({"class_path": class_path(said_class)} if said_class else {}), "init_args": arguments})
        if "class_path" not in tree:
            need = "set --data.class_path and --data.model or the like"
            raise UserError(f"{self.name}: nothing says what activations it reads; {need}")
        for key in ("model", "layer", "hook", "normalisation"):
            own = getattr(source, key, None)
            if key in arguments and own is not None and arguments[key] != own:
                say(f"{self.name}: was made for {key} {own}; measured with {arguments[key]}, as --data.{key} says")
        cls = class_of(tree, ActivationDataModule)
        if not self.config and cls is not None and issubclass(cls, LLMDataModule):
            # The defaults are the model and the layer of no SAE in particular.
            unknown = {} if source is None else source.unknown
            for key, options in (("model", ("model",)), ("layer", ("layer", "hook"))):
                if not any(option in tree["init_args"] for option in options):
                    reason = unknown.get(key, "nothing says what it is")
                    asked = " or ".join(f"--data.{option}" for option in options)
                    raise UserError(f"{self.name}: data.{key}: not known ({reason}); set {asked}")
        return tree


def seeded(tree: Any, seed: Any) -> Any:
    """A copy of a config in which seeds that were left to the run are the run's own."""
    if isinstance(tree, list):
        return [seeded(part, seed) for part in tree]
    if not isinstance(tree, dict):
        return copy.deepcopy(tree)
    return {key: seed if key == "seed" and part is None else seeded(part, seed) for key, part in tree.items()}


class OracleSubject(Subject):
    """The perfect SAE of a toy, whose section ``data`` is ``tree``."""

    def __init__(self, name: str, data: ToyDataModule, tree: Tree, experiment: str) -> None:
        super().__init__(name, Path(), None)
        self.sae, self._tree, self.experiment = Oracle(data), tree, experiment

    @property
    def identity(self) -> dict[str, str]:
        """The toy."""
        return {ORACLE_TAG: stable_id(deciding({"data": self._tree}))}


def say(line: str) -> None:
    """Tell what happens, above any progress bar."""
    tqdm.write(f"evaluate: {line}")


def find(word: str, sae_class: str | None = None) -> tuple[list[Subject], RunSummary | None]:
    """The SAEs that a word means, and the run above them, if there is one.

    A run's, those of a run's parts, a folder's, or one that SAELens lists (``saelens:RELEASE/ID``), which is imported once.
    """
    if (pretrained := word.removeprefix("saelens:")) != word:
        folder = runs_dir(tracking_uri()) / "imported" / pretrained
        if not (folder / "sae.json").is_file():  # which comes last
            sae, source = import_pretrained(pretrained)
            source.save(folder)
            save_sae(sae, folder)
        return [Subject(pretrained, folder, None)], None
    if Path(word).is_dir():
        return [Subject(word, resolve_sae(word).folder, None, sae_class)], None
    run = resolve_run(word)
    alone = SAE_TAG in run.tags
    members = [run] if alone else parts_of(run)
    if not members:
        raise UserError(f"run {run.run_id[:8]} ({run.name}): neither it nor a part of it has an SAE; see `hedgelab runs`")
    return [Subject(one.name, artifact(one, "sae"), one) for one in members], None if alone else run


def parts_of(run: RunSummary) -> list[RunSummary]:
    """A run's parts that have an SAE; of a sweep, all that its report lists: an earlier sweep may have trained them."""
    if "sweep" not in run.tags or "cells" not in run.metrics:
        return children(run, with_sae=True)
    rows = json.loads(artifact(run, "sweep.json").read_text())["rows"]
    listed = (resolve_run(own) for own in dict.fromkeys(row["run"] for row in rows))
    return [one for one in listed if SAE_TAG in one.tags]


def control_siblings(subject: Subject) -> list[Subject]:
    """The controls of its own width that were trained in the same sweep."""
    if subject.run is None or subject.run.parent is None or subject.sae.control:
        return []
    members = [one for one in children(resolve_run(subject.run.parent), with_sae=True) if CONTROL_TAG in one.tags]
    found = [Subject(one.name, artifact(one, "sae"), one) for one in members]
    return [one for one in found if (one.sae.d_in, one.sae.d_sae) == (subject.sae.d_in, subject.sae.d_sae)]


def distinct(found: Sequence[Subject]) -> list[Subject]:
    """Each SAE once, under a name of its own."""
    once = list({one.run.run_id if one.run else str(one.folder.resolve()): one for one in found}.values())
    names = [one.name for one in once]
    for one in once:
        if names.count(one.name) > 1 and one.run is not None:
            one.name = f"{one.name} ({one.run.run_id[:8]})"
    return once


class Evaluate(Study):
    """Score trained SAEs; scores, tables and figures go to the SAEs' own runs."""

    tracked = False

    def __init__(
        self,
        saes: Sequence[str],  # runs, runs whose parts have SAEs, and folders
        wanted: Sequence[str] = ("all",),  # suites, by name or class path; "all" are all that can be run
        options: Tree | None = None,  # of the suites, by key
        data: Tree | None = None,  # replaces parts of the SAEs' own section
        x: str | None = None,  # what several SAEs are drawn against; None is the first number in which they differ
        class_path: str | None = None,  # of SAEs in folders, where it is one of the user's own
        truth: bool = False,  # planted features stay in the activations
        controls: Sequence[str] = (),  # SAEs whose scores stand beside, besides those that are found
    ) -> None:
        self.suites = make_suites(options or {}, suite_classes(wanted))
        names_of(self.suites, wanted)  # a name that is none shows before anything is read
        self.saes, self.wanted, self.data, self.x = saes, wanted, data or {}, x
        self.class_path, self.truth, self.controls = class_path, truth, controls

    def run(self, bench: Bench) -> Outcome:
        """Find the SAEs, score them, and put several side by side, with controls: nothing is trained for that."""
        found = [find(word, self.class_path) for word in self.saes]
        named = distinct([one for some, _ in found for one in some])
        others = [one for word in self.controls for one in find(word, self.class_path)[0]]
        subjects = distinct([*named, *others, *(one for subject in named for one in control_siblings(subject))])
        beside = self.scores(subjects)
        results = {one.name: beside.pop(one.name) for one in named}
        kinds = {one.name: one.sae.control for one in subjects}
        beside = {f"{name} ({kinds[name]})" if kinds.get(name) else name: one for name, one in beside.items()}
        parent = found[0][1] if len(found) == 1 else None
        params = {one.name: one.params for one in named}
        return Outcome(headline=side_by_side(results, params, self.x, parent, kinds, beside))

    def scores(self, subjects: Sequence[Subject]) -> dict[str, dict[str, float]]:
        """The metrics of SAEs by name, and of the oracles of the toys that they read."""
        groups: dict[str, tuple[Tree, list[Subject]]] = {}  # those that read the same activations
        for one in subjects:
            tree = one.data(self.data, self.truth)
            known = None if one.source is None else [one.source.normalisation, one.source.scale, one.source.mean]
            key = json.dumps([tree, known], sort_keys=True, default=str)
            groups.setdefault(key, (tree, []))[1].append(one)
        scored: dict[str, dict[str, float]] = {}
        for tree, members in groups.values():
            scored |= self.score_group(tree, members, "" if len(groups) == 1 else f" of {members[0].name}")
        return {one.name: scored.pop(one.name) for one in subjects if one.name in scored} | scored

    def score_group(self, tree: Tree, subjects: list[Subject], whose: str) -> dict[str, dict[str, float]]:
        """The metrics of SAEs that read the same activations; each result is in the SAE's run as soon as it is there.

        A suite that was run on an SAE before, with the same options, texts and data, is not run again.
        """
        try:
            data: ActivationDataModule = Recipe(ActivationDataModule, resolve(tree), "data")()
        except UserError as error:
            walk = Walk({"data": tree}, {"data": Parameter(ActivationDataModule)})
            raise UserError(walk.first or str(error)) from error
        reconstruct = all(one.sae.reconstructs for one in subjects)
        suites, left_out = choose(self.suites, self.wanted, data, reconstruct)
        for name, reason in left_out.items():
            say(f"{name}: left out; {reason}")
        for subject in subjects:
            if subject.sae.d_in != data.d_in:
                raise UserError(
                    f"{subject.name}: reads activations of width {subject.sae.d_in}, data gives {data.d_in}; set data"
                )
        own = "normalisation" in self.data.get("init_args", self.data)
        readings = Readings(data, None if own else subjects[0].source)
        if isinstance(data, ToyDataModule):
            run = subjects[0].run
            experiment = subjects[0].experiment if run is None else run.experiment
            subjects.append(OracleSubject(f"oracle{whose}", data, tree, experiment))
        results: dict[str, dict[str, float]] = {one.name: {} for one in subjects}
        try:
            for suite in suites:
                mark, start = suite.mark(tree), time.monotonic()
                missing: dict[str, Subject] = {}
                for one in subjects:
                    if (known := one.known_scores(suite.name, mark)) is None:
                        missing[one.name] = one
                    results[one.name] |= known or {}
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
    client = ensure_store()
    for key, value in scores.metrics.items():
        client.log_metric(run_id, key, value)
    link_metrics(client, run_id)
    for file, table in scores.tables.items():
        client.log_text(run_id, table if isinstance(table, str) else as_csv(table), f"evaluation/{file}")
    for file, draw in scores.figures.items():
        client.log_figure(run_id, draw(), f"figures/{file}")
    client.set_tag(run_id, f"{TAG}.{suite}", mark)
