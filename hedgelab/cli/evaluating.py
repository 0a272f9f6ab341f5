"""The work of ``hedgelab evaluate``: find the SAEs and their data, run the suites, put several side by side."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

import hedgelab.data.llm
import hedgelab.data.tensors
import hedgelab.data.toy  # noqa: F401
from hedgelab.config.explain import resolve
from hedgelab.config.signatures import Parameter
from hedgelab.config.tree import Tree, compose, overlay
from hedgelab.config.walk import Walk
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError, one_line
from hedgelab.protocols.evaluation import EvaluationOptions, across
from hedgelab.protocols.evaluation.runner import Subject, check_widths, done_before, evaluate, make_suites
from hedgelab.saes import load_sae
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.runs import FoundSAE, RunSummary, artifact, children_with_sae, resolve_run, resolve_sae
from hedgelab.tracking.store import ensure_store

set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${…} across config files
_OWN = {"config", "suite", "x", *(field.name for field in dataclasses.fields(EvaluationOptions))}


@dataclasses.dataclass(frozen=True)
class _Found:
    """An SAE, its run, and what it reads.

    Attributes:
        name: Different from all others.
        sae: Where it is.
        run: The run that gets its scores.
        source: What is known of its activations; None for nothing.
        data: Its section ``data``; None where no config tells.
    """

    name: str
    sae: FoundSAE
    run: RunSummary
    source: ActivationSource | None
    data: Tree | None


def run_evaluate(words: list[str]) -> int:
    """Parse, find, evaluate, print."""
    named = list(takewhile(lambda word: not word.startswith("-"), words))
    options_words = words[len(named) :]
    if not named:
        raise UserError("evaluate: name a run, a folder with an SAE, or the config file of a sweep, before the options")
    own, others = _sorted_options(options_words)
    tree = compose(own)
    suite, x = tree.pop("suite", None), tree.pop("x", None)
    if suite is not None:
        tree["suites"] = str(suite).split(",")
    if tree.get("suites") == ["saebench"]:
        from hedgelab.interop.saebench import run_saebench

        return run_saebench([resolve_sae(word) for word in named], _say)
    options = parse_options(tree)
    overrides = compose([word for word in others if word.startswith("--data.")]).get("data", {})
    found: list[_Found] = []
    parent: RunSummary | None = None
    for word in named:
        if Path(word).suffix in (".yaml", ".yml"):
            word = _swept(word, others)
        saes, parent = _find(word)
        found += saes
    results = _evaluate_all(_distinct(found), options, overrides)
    print("\n".join(_side_by_side(results, found, x, parent if len(named) == 1 else None)))
    return 0


def parse_options(tree: Tree) -> EvaluationOptions:
    """The suites' options, checked.

    Raises:
        UserError: A wrong key or value.
    """
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    parser.add_class_arguments(EvaluationOptions, "evaluate")
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "evaluate.yaml"
            file.write_text(yaml.safe_dump({"evaluate": tree}))
            parsed = parser.instantiate_classes(parser.parse_path(str(file))).evaluate
    except UserError:
        raise
    except Exception as error:
        walk = Walk(resolve({"evaluate": tree}), {"evaluate": Parameter(EvaluationOptions)})
        text = walk.first or one_line(str(error.__cause__ if isinstance(error.__cause__, UserError) else error))
        raise UserError(text.replace("evaluate.", "", 1)) from error
    assert isinstance(parsed, EvaluationOptions)
    return parsed


def make_data(tree: Tree) -> ActivationDataModule:
    """A DataModule from its section.

    Raises:
        UserError: A wrong key or value.
    """
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    parser.add_subclass_arguments(ActivationDataModule, "data", required=True)
    try:
        data = parser.instantiate(parser.parse_object({"data": tree})).data
    except Exception as error:
        walk = Walk({"data": tree}, {"data": Parameter(ActivationDataModule)})
        raise UserError(walk.first or one_line(str(error))) from error
    assert isinstance(data, ActivationDataModule)
    return data


def _sorted_options(words: list[str]) -> tuple[list[str], list[str]]:
    """Options of the evaluation, and the others: of the data, and of a sweep."""
    own: list[str] = []
    others: list[str] = []
    into = own
    for word in words:
        if word.startswith("-"):
            into = own if word.lstrip("-").partition("=")[0].split(".")[0] in _OWN else others
        into.append(word)
    return own, others


def _swept(file: str, words: list[str]) -> str:
    """Train what a sweep's config lists; the name of its run."""
    from hedgelab.cli.sweep_config import read_sweep
    from hedgelab.cli.sweep_run import run_sweep

    sweep_words = ["--config", file, *words]
    if run_sweep(sweep_words):
        _say("some cells failed; evaluating the others")
    return read_sweep(sweep_words).name


def _find(word: str) -> tuple[list[_Found], RunSummary | None]:
    """The SAEs that a word means, and the run above them if there is one."""
    if Path(word).is_dir():
        sae = resolve_sae(word)
        return [_Found(word, sae, _run_for(sae.folder), ActivationSource.load(sae.folder), None)], None
    run = resolve_run(word)
    if "weights_sha256" in run.tags:
        return [_of_run(run)], None
    members = children_with_sae(run)
    if not members:
        raise UserError(
            f"run {run.run_id[:8]} ({run.name}): has no SAE, and none of its parts has; see `hedgelab runs`"
        )
    return [_of_run(member) for member in members], run


def _of_run(run: RunSummary) -> _Found:
    folder = artifact(run, "sae")
    try:
        config = yaml.safe_load(artifact(run, "config.yaml").read_text())
    except UserError:
        config = {}
    return _Found(run.name, FoundSAE(folder, run), run, ActivationSource.load(folder), config.get("data"))


def _run_for(folder: Path) -> RunSummary:
    """A new run for an SAE that has none."""
    tracker = MLflowTracker("evaluation", folder.resolve().name, {"sae_folder": str(folder)})
    run_id = tracker.run_id or ""
    tracker.finalize("success")
    return resolve_run(run_id)


def _distinct(found: Sequence[_Found]) -> list[_Found]:
    """Each SAE once, under a name of its own."""
    once = {one.run.run_id: one for one in found}
    names = [one.name for one in once.values()]
    return [
        dataclasses.replace(one, name=f"{one.name} ({one.run.run_id[:8]})") if names.count(one.name) > 1 else one
        for one in once.values()
    ]


def _evaluate_all(found: Sequence[_Found], options: EvaluationOptions, overrides: Tree) -> dict[str, dict[str, float]]:
    """Evaluate SAEs that read the same activations together."""
    groups: dict[str, list[_Found]] = {}
    for one in found:
        tree = _data_tree(one, overrides)
        known = None if one.source is None else [one.source.normalisation, one.source.scale, one.source.mean]
        groups.setdefault(json.dumps([tree, known], sort_keys=True, default=str), []).append(one)
    results: dict[str, dict[str, float]] = {}
    for key, members in groups.items():
        data = make_data(json.loads(key)[0])
        names, left_out = options.chosen(isinstance(data, LLMDataModule))
        for name, reason in left_out.items():
            _say(f"{name}: left out; {reason}")
        subjects = [
            Subject(
                one.name, load_sae(one.sae.folder).eval(), one.run.run_id, done_before(one.run.tags), one.run.metrics
            )
            for one in members
        ]
        check_widths(subjects, data)
        try:
            suites = make_suites(names, options, data, members[0].source)
            results |= evaluate(subjects, suites, options, _say, _without_places(overrides))
        finally:
            data.teardown("fit")
    return results


def _without_places(overrides: Tree) -> Tree:
    """Overrides of data that can change a score: where files are kept and what computes them cannot."""
    plain = overrides.get("init_args", overrides)
    return {key: value for key, value in plain.items() if key not in ("cache_dir", "device", "contexts_at_once")}


def _data_tree(one: _Found, overrides: Tree) -> Tree:
    """The section ``data`` of an SAE, the user's overrides over it."""
    tree: Tree = {}
    if one.data is not None:
        tree = one.data
    elif one.source is not None and one.source.model is not None:
        arguments = {"model": one.source.model, "hook": one.source.hook, "skip_first": one.source.skip_first}
        if one.source.context_length is not None:
            arguments["context_length"] = one.source.context_length
        tree = {"class_path": "LLMDataModule", "init_args": arguments}
    elif not overrides:
        raise UserError(
            f"{one.name}: nothing says what activations it reads; set --data.class_path and --data.model or the like"
        )
    tree = json.loads(json.dumps(tree))
    if overrides:
        plain = dict(overrides)
        if "class_path" in tree and "class_path" not in plain:
            plain = {"init_args": plain.get("init_args", plain)}
        overlay(tree, plain)
    return tree


def _side_by_side(
    results: dict[str, dict[str, float]], found: Sequence[_Found], x: str | None, parent: RunSummary | None
) -> list[str]:
    """What to print; with an axis, table and figure also go to the run above."""
    if len(results) == 1:
        ((name, metrics),) = results.items()
        width = max((len(key) for key in metrics), default=0)
        return [name, *(f"  {key:<{width}}  {value:.4g}" for key, value in metrics.items())]
    params = {one.name: one.run.params for one in _distinct(found)}
    axis = across.find_axis(params, x)
    if axis is None:
        names = sorted({key for metrics in results.values() for key in metrics})
        return [f"{name}: " + ", ".join(f"{key} {metrics[key]:.3g}" for key in names if key in metrics)
                for name, metrics in results.items()]  # fmt: skip
    rows = across.rows_of(axis, results)
    lines = across.means(axis, rows)
    if parent is not None:
        client = ensure_store()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "figures").mkdir()
            (Path(folder) / "evaluation.csv").write_text(across.as_csv(axis, rows))
            across.figure(axis, rows, parent.name).savefig(Path(folder) / "figures" / "evaluation.png")
            client.log_artifacts(parent.run_id, folder)
        lines.append(
            f"figure and table: run {parent.run_id[:8]} ({parent.name}), figures/evaluation.png, evaluation.csv"
        )
    return lines


def _say(line: str) -> None:
    print(f"evaluate: {line}", flush=True)
