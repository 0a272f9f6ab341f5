"""The one runner of all studies: config in, a tracked run, what the study found out.

A study (:class:`hedgelab.protocols.study.Study`) is named by its command, by its class path, or by an entry point of the group
``hedgelab.studies``.
"""

import inspect
import re
import typing
from importlib import import_module
from typing import Any

import yaml

from hedgelab.cli import COMMANDS, registered
from hedgelab.cli.startup import defer_torchmetrics
from hedgelab.config.tree import compose, config_files, only_shows, opening_comment, options_of, with_bare_flags
from hedgelab.errors import UserError, stop_at_once, stopped_by_signal


def run(command: str, words: list[str]) -> int:
    """Run the study that a command, a class path or the name of an entry point names."""
    defer_torchmetrics()
    from hedgelab.protocols.study import Bench
    from hedgelab.tracking import MLflowTracker

    study, config, text = parse(study_class(command), command, words)
    files = config_files(words)
    name = config.name or "+".join(file.stem for file in files) or command
    tracker = MLflowTracker(config.experiment, name, description=opening_comment(files)) if study.tracked else None
    print("\n".join(conduct(study, Bench(config.seed_everything, tracker), text)))
    return 0


def study_class(command: str) -> type[Any]:
    """The class of a study, which a command, an entry point or a class path names."""
    from hedgelab.protocols.study import Study

    path = f"hedgelab.{COMMANDS[command].place}" if command in COMMANDS else registered().get(command, command)
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise UserError(f"{path}: no module '{error.name}'; install its package, or put it on PYTHONPATH") from error
    if not inspect.isclass(found) or not issubclass(found, Study):
        raise UserError(f"{path}: expected a subclass of hedgelab.protocols.study.Study")
    return found


def parse(cls: type[Any], command: str, words: list[str]) -> tuple[Any, Any, str]:
    """A study made as words and config files say, with its config, as objects and as text; what is refused is one line."""
    from jsonargparse import Namespace

    from hedgelab.config.walk import Walk, explain_construction, explain_parsing, resolve
    from hedgelab.protocols.recipe import Recipe
    from hedgelab.tracking.folders import check_folders

    parser, recipes, parameters = make_parser(cls, command)
    words = with_bare_flags(words, [name for name, one in parameters.items() if one.annotation is bool])
    written = compose(words)
    tree = resolve(written)
    if cls.takes_any_config:
        tree = {key: value for key, value in tree.items() if key in {*parameters, *dict(options_of(words))}}
    walk = Walk(tree, parameters, frozenset(f"{name}.d_in" for name, base in recipes.items() if base.__name__ == "SAE"))
    try:
        by_tree = cls.takes_any_config and not only_shows(words)
        config = parser.parse_object(tree) if by_tree else parser.parse_args(words)
        if line := next(iter(walk.missing + walk.impossible), None):
            raise UserError(line)
    except Exception as error:
        line = explain_parsing(error, written, walk)
        raise UserError(f"{line}; see {cls.example}" if cls.example and ": is required" in line else line) from error
    check_folders(config.as_dict(), words, also=cls.writes_to)
    plain = Namespace({key: value for key, value in vars(config).items() if key not in recipes})  # type: ignore[no-untyped-call]
    try:
        values = vars(parser.instantiate(plain))
        for name, base in recipes.items():
            if parameters[name].annotation is base:
                values[name] = None if config[name] is None else Recipe(base, config[name], name)
            else:  # as written: the parser puts defaults in, some of which a class refuses
                parts = tree.get(name) or {}
                values[name] = {key: Recipe(base, section, f"{name}.{key}") for key, section in parts.items()}
        study = cls(**{name: values[name] for name in inspect.signature(cls).parameters})
    except UserError as error:
        raise UserError(explain_construction(error, walk)) from error
    return study, config, parser.dump(config, skip_none=False)


def make_parser(cls: type[Any], command: str) -> tuple[Any, dict[str, type], dict[str, Any]]:
    """A study's options from its signature and docstring: the parser, base classes of recipes, and all keys' types."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    import hedgelab.data.llm
    import hedgelab.data.planting
    import hedgelab.data.tensors
    import hedgelab.data.toy
    import hedgelab.saes
    from hedgelab.config.signatures import Parameter, parameters_of
    from hedgelab.protocols.recipe import Recipe

    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)  # ${…} across config files
    parser = ArgumentParser(
        prog=f"hedgelab {command}", exit_on_error=False, parser_mode="omegaconf+", allow_abbrev=False,
        description=inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:")[0],
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="Config file (YAML); later ones are laid over earlier ones.")
    parameters = parameters_of(cls)
    recipes: dict[str, type] = {}
    for name, one in parameters.items():
        for kind in (one.annotation, *typing.get_args(one.annotation)):
            if typing.get_origin(kind) is not Recipe:
                continue
            (base,) = typing.get_args(kind)
            recipes[name] = base
            if typing.get_origin(one.annotation) is not dict:  # one, or perhaps none
                skip = {"d_in"} if base is hedgelab.saes.SAE else None
                parser.add_subclass_arguments(base, name, required=False, skip=skip, help=_help(cls, name))
                parameters[name] = Parameter(base, one.required)
            else:  # a dict of recipes
                parameters[name] = Parameter(dict[str, dict[str, Any]], one.required)
                parser.add_argument(f"--{name}", type=parameters[name].annotation, help=_help(cls, name))
    parser.add_class_arguments(cls, skip=set(recipes))
    common = {
        "seed_everything": (int, 0, "Seed of everything that is random."),
        "name": (str | None, None, "Name of the run; the config file's by default."),
        "experiment": (str, cls.experiment, "MLflow experiment that the run belongs to."),
    }
    for name, (annotation, default, text) in common.items():
        parser.add_argument(f"--{name}", type=annotation, default=default, help=text)
        parameters[name] = Parameter(annotation)
    return parser, recipes, parameters


def conduct(study: Any, bench: Any, text: str) -> list[str]:
    """Run a study in its bench's run, if any, which an exception ends as FAILED, a signal as KILLED; the lines to print."""
    from hedgelab.tracking.params import searchable
    from hedgelab.tracking.provenance import provenance_tags

    tracker = bench.tracker
    with stop_at_once():
        if tracker is None:
            outcome = study.run(bench)
        else:
            try:
                tracker.log_config(text)
                tracker.log_hyperparams(searchable(yaml.safe_load(text)))
                tracker.log_tags(provenance_tags(1))
                outcome = study.run(bench)
                bench.keep(outcome)
            except BaseException:
                tracker.finalize("killed" if stopped_by_signal() else "failed")
                raise
            tracker.finalize("success" if outcome.failure is None else "failed")
    if outcome.failure is not None:
        raise UserError(outcome.failure)
    if tracker is None:
        return list(outcome.headline)
    first, *others = outcome.headline or ["done"]
    return [f"run {tracker.run_id}: {first}", *(f"  {line}" for line in others), "look at it: hedgelab ui"]


def _help(cls: type[Any], name: str) -> str:
    """What the docstring of a class says about one of its arguments."""
    found = re.search(rf"^\s*{name}: (.*(?:\n {{12,}}.*)*)", cls.__doc__ or "", flags=re.MULTILINE)
    return " ".join(found[1].split()) if found else ""
