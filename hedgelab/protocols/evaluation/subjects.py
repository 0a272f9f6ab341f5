"""The SAEs of an evaluation: found by what the user calls them, with what they read and the run that gets their scores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from hedgelab.config.signatures import class_of
from hedgelab.config.tree import Tree, overlay
from hedgelab.data.datamodule import ActivationDataModule
from hedgelab.data.llm import LLMDataModule
from hedgelab.data.source import ActivationSource
from hedgelab.errors import UserError
from hedgelab.identity import deciding
from hedgelab.saes import SAE
from hedgelab.tracking import MLflowTracker
from hedgelab.tracking.params import flatten
from hedgelab.tracking.runs import FoundSAE, RunSummary, artifact, children_with_sae, resolve_run, resolve_sae

TAG = "evaluated"
_SAYS_WHAT_IT_READS = ("model", "layer", "hook", "normalisation")


class Subject:
    """An SAE to be scored.

    Args:
        name: What it is called, different from all others.
        folder: Where it lies.
        run: Its run; None for a folder, which gets a run when there are scores to put into it.
        class_path: Its class, where it is one of the user's own and no run says so.

    Attributes:
        source: What is known of its activations; None for nothing.
        config: The resolved config of its run; empty where there is none.
    """

    def __init__(self, name: str, folder: Path, run: RunSummary | None, class_path: str | None = None) -> None:
        self.name, self.folder, self.run, self._class_path = name, folder, run, class_path
        self.source = ActivationSource.load(folder)
        self.config: Tree = {}
        if run is not None:
            with suppress(UserError):  # a run of older days, or of another tool
                self.config = yaml.safe_load(artifact(run, "config.yaml").read_text()) or {}

    @cached_property
    def sae(self) -> SAE:
        """The SAE, ready to measure."""
        return FoundSAE(self.folder, self.run).load(self._class_path)

    @cached_property
    def run_id(self) -> str:
        """The run that gets its scores; for a folder one is opened now."""
        if self.run is not None:
            return self.run.run_id
        tracker = MLflowTracker("evaluation", self.folder.resolve().name, {"sae_folder": str(self.folder)})
        tracker.finalize("success")
        return str(tracker.run_id)

    @property
    def done(self) -> dict[str, str]:
        """Marks of the suites that were run on it before, by suite."""
        tags = {} if self.run is None else self.run.tags
        return {key.removeprefix(f"{TAG}."): value for key, value in tags.items() if key.startswith(f"{TAG}.")}

    @property
    def params(self) -> dict[str, str]:
        """What decided its numbers, flat."""
        if not self.config:
            return {} if self.run is None else self.run.params
        facts = deciding(self.config)
        return flatten({key: value for key, value in facts.items() if key not in ("code", "inputs")})

    def data(self, said: Tree) -> Tree:
        """Its section ``data``: what its run's config says, or its own source, and what the user says over that.

        Args:
            said: The user's own section ``data``.

        Raises:
            UserError: Nothing says what it reads.
        """
        tree = copy.deepcopy(self.config.get("data") or {})
        said_class = class_of(said, ActivationDataModule) if "class_path" in said else None
        if not tree and self.source is not None and (said_class is None or issubclass(said_class, LLMDataModule)):
            tree = {"class_path": _path(LLMDataModule), "init_args": self._reads(self.source)}
        arguments = {key: value for key, value in said.get("init_args", said).items() if key != "class_path"}
        if "layer" in arguments and "hook" in arguments:
            raise UserError("--data.layer and --data.hook: both say where in the model; give one")
        if "layer" in arguments or "hook" in arguments:
            for key in ("layer", "hook"):
                tree.get("init_args", {}).pop(key, None)
        overlay(tree, {**({"class_path": _path(said_class)} if said_class else {}), "init_args": arguments})
        if "class_path" not in tree:
            raise UserError(
                f"{self.name}: nothing says what activations it reads; set --data.class_path and --data.model or the like"
            )
        if self.source is not None:
            self._tell_conflicts(self.source, arguments)
        cls = class_of(tree, ActivationDataModule)
        if not self.config and cls is not None and issubclass(cls, LLMDataModule):
            self._require_place(tree["init_args"])
        return tree

    def _reads(self, source: ActivationSource) -> Tree:
        known = {
            "model": source.model,
            "layer": source.layer,
            "hook": source.hook if source.layer is None else None,
            "context_length": source.context_length,
            "skip_first": source.skip_first,
        }
        return {key: value for key, value in known.items() if value is not None}

    def _tell_conflicts(self, source: ActivationSource, said: Tree) -> None:
        for key in _SAYS_WHAT_IT_READS:
            own: Any = getattr(source, key)
            if key in said and own is not None and said[key] != own:
                say(f"{self.name}: was made for {key} {own}; measured with {said[key]}, as --data.{key} says")

    def _require_place(self, arguments: Tree) -> None:
        """Raise a UserError unless model and layer or hook are said: the defaults are those of no SAE in particular."""
        unknown = {} if self.source is None else self.source.unknown
        missing = [
            key for key in ("model", "layer") if key not in arguments and not (key == "layer" and "hook" in arguments)
        ]
        for key in missing:
            reason = unknown.get(key, "nothing says what it is")
            option = "--data.layer or --data.hook" if key == "layer" else f"--data.{key}"
            raise UserError(f"{self.name}: data.{key}: not known ({reason}); set {option}")


def say(line: str) -> None:
    """Tell what happens, above any progress bar."""
    tqdm.write(f"evaluate: {line}")


def find(word: str, class_path: str | None = None) -> tuple[list[Subject], RunSummary | None]:
    """The SAEs that a word means, and the run above them if there is one.

    Args:
        word: A run, a run whose parts have SAEs, or a folder with an SAE.
        class_path: Class of an SAE in a folder, where it is one of the user's own.

    Raises:
        UserError: It means none.
    """
    if Path(word).is_dir():
        return [Subject(word, resolve_sae(word).folder, None, class_path)], None
    run = resolve_run(word)
    if "weights_sha256" in run.tags:
        return [_of_run(run)], None
    members = children_with_sae(run)
    if not members:
        raise UserError(
            f"run {run.run_id[:8]} ({run.name}): has no SAE, and none of its parts has; see `hedgelab runs`"
        )
    return [_of_run(member) for member in members], run


def distinct(found: Sequence[Subject]) -> list[Subject]:
    """Each SAE once, under a name of its own."""
    once = list({one.run.run_id if one.run else str(one.folder.resolve()): one for one in found}.values())
    names = [one.name for one in once]
    for one in once:
        if names.count(one.name) > 1 and one.run is not None:
            one.name = f"{one.name} ({one.run.run_id[:8]})"
    return once


def _of_run(run: RunSummary) -> Subject:
    return Subject(run.name, artifact(run, "sae"), run)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
