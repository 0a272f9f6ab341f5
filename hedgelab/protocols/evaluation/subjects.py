"""The SAEs of an evaluation: found by what the user calls them, with what they read and the run that gets their scores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import yaml
from tqdm import tqdm

from hedgelab.config.signatures import class_of
from hedgelab.config.tree import Tree, overlay
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.identity import deciding
from hedgelab.protocols.evaluation.suite import class_path
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.params import flatten
from hedgelab.tracking.runs import FoundSAE, RunSummary, artifact, children_with_sae, resolve_run, resolve_sae

TAG = "evaluated"


class Subject:
    """An SAE to be scored: that of a run, or one in a folder, which gets a run when there are scores to put into it.

    ``sae_class`` is the path of its class, where that is one of the user's own and no run says so.
    """

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

    @cached_property
    def run_id(self) -> str:
        """The run that gets its scores; for a folder one is opened now."""
        if self.run is not None:
            return self.run.run_id
        tracker = MLflowTracker("evaluation", self.folder.resolve().name, {"sae_folder": str(self.folder)})
        tracker.finalize("success")
        return str(tracker.run_id)

    def known_scores(self, suite: str, mark: str) -> dict[str, float] | None:
        """Its scores of a suite that was run on it before with the same mark; None where none was."""
        if self.run is None or self.run.tags.get(f"{TAG}.{suite}") != mark:
            return None
        return {name: value for name, value in self.run.metrics.items() if name.startswith(f"{suite}/")}

    @property
    def params(self) -> dict[str, str]:
        """What decided its numbers, flat."""
        if not self.config:
            return {} if self.run is None else self.run.params
        facts = deciding(self.config)
        return flatten({key: value for key, value in facts.items() if key not in ("code", "inputs")})

    def data(self, said: Tree) -> Tree:
        """Its section ``data``: what its run's config says, or its own source, and what the user says over that."""
        tree, source = copy.deepcopy(self.config.get("data") or {}), self.source
        said_class = class_of(said, ActivationDataModule) if "class_path" in said else None
        arguments = {key: value for key, value in said.get("init_args", said).items() if key != "class_path"}
        if not tree and source is not None and (said_class is None or issubclass(said_class, LLMDataModule)):
            keys = ("model", "layer" if source.layer is not None else "hook", "context_length", "skip_first")
            known = {key: getattr(source, key) for key in keys if getattr(source, key) is not None}
            tree = {"class_path": class_path(LLMDataModule), "init_args": known}
        if "layer" in arguments and "hook" in arguments:
            raise UserError("--data.layer and --data.hook: both say where in the model; give one")
        if "layer" in arguments or "hook" in arguments:
            for key in ("layer", "hook"):
                tree.get("init_args", {}).pop(key, None)
        overlay(tree, {**({"class_path": class_path(said_class)} if said_class else {}), "init_args": arguments})
        if "class_path" not in tree:
            raise UserError(
                f"{self.name}: nothing says what activations it reads; set --data.class_path and --data.model or the like"
            )
        for key in ("model", "layer", "hook", "normalisation"):
            own = getattr(source, key, None)
            if key in arguments and own is not None and arguments[key] != own:
                say(f"{self.name}: was made for {key} {own}; measured with {arguments[key]}, as --data.{key} says")
        cls = class_of(tree, ActivationDataModule)
        if not self.config and cls is not None and issubclass(cls, LLMDataModule):
            # The defaults are the model and the layer of no SAE in particular.
            given, unknown = tree["init_args"], {} if source is None else source.unknown
            for key, option, there in (
                ("model", "--data.model", "model" in given),
                ("layer", "--data.layer or --data.hook", "layer" in given or "hook" in given),
            ):
                if not there:
                    reason = unknown.get(key, "nothing says what it is")
                    raise UserError(f"{self.name}: data.{key}: not known ({reason}); set {option}")
        return tree


def say(line: str) -> None:
    """Tell what happens, above any progress bar."""
    tqdm.write(f"evaluate: {line}")


def find(word: str, sae_class: str | None = None) -> tuple[list[Subject], RunSummary | None]:
    """The SAEs that a word means: a run's, those of a run's parts, or a folder's; and the run above them, if there is one."""
    if Path(word).is_dir():
        return [Subject(word, resolve_sae(word).folder, None, sae_class)], None
    run = resolve_run(word)
    if "weights_sha256" in run.tags:
        return [Subject(run.name, artifact(run, "sae"), run)], None
    members = children_with_sae(run)
    if not members:
        raise UserError(
            f"run {run.run_id[:8]} ({run.name}): has no SAE, and none of its parts has; see `hedgelab runs`"
        )
    return [Subject(member.name, artifact(member, "sae"), member) for member in members], run


def distinct(found: Sequence[Subject]) -> list[Subject]:
    """Each SAE once, under a name of its own."""
    once = list({one.run.run_id if one.run else str(one.folder.resolve()): one for one in found}.values())
    names = [one.name for one in once]
    for one in once:
        if names.count(one.name) > 1 and one.run is not None:
            one.name = f"{one.name} ({one.run.run_id[:8]})"
    return once
