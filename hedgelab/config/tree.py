"""What the user wrote, config files and command line laid over one another, before any class has seen it.

LightningCLI composes for itself; this plain tree is what mistakes are looked up in, with the key that the user wrote.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from hedgelab.config.names import nearest
from hedgelab.config.plain_yaml import read_value, read_yaml
from hedgelab.errors import UserError

Tree = dict[str, Any]
_FLAGS = ("help", "print_config")


def config_files(words: list[str]) -> list[Path]:
    """The files named by ``--config``, in order."""
    return [Path(value) for key, value in options_of(words) if key in ("config", "c") and value]


def without_configs(words: list[str]) -> list[str]:
    """What the command line says itself, as words again."""
    return [
        f"--{key}" if value is None else f"--{key}={value}"
        for key, value in options_of(words)
        if key not in ("config", "c")
    ]


def only_shows(words: list[str]) -> bool:
    """Whether the words ask for help or for the resolved config, and start nothing."""
    return any(word == "-h" or re.match(r"--help\b|--[\w.]+\.help\b|--print_config\b", word) for word in words)


def opening_comment(files: list[Path]) -> str | None:
    """What the last config file says about itself in its first lines; None if it says nothing."""
    if not files:
        return None
    lines = takewhile(lambda line: line.startswith("#"), files[-1].read_text().splitlines())
    return " ".join(line.lstrip("# ").rstrip() for line in lines) or None


def compose(words: list[str], defaults: Tree | None = None) -> Tree:
    """Everything that the command line says, as one tree: later files and options over earlier ones, all over defaults.

    Raises:
        UserError: A missing or unreadable file, invalid YAML, or a word that is neither option nor value.
    """
    tree: Tree = copy.deepcopy(defaults or {})
    for key, value in options_of(words):
        if key in ("config", "c"):
            if not value:
                raise UserError("--config: expected a file, got nothing")
            overlay(tree, load(Path(value)))
        elif key.split(".")[0] not in _FLAGS:
            _overlay_option(tree, key.split("."), value)
    return tree


def options_of(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """Pairs of dotted key and text; None where an option has no value."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            raise UserError(f"unexpected argument '{word}': options look like --key=value or --key value")
        key, equals, value = word.lstrip("-").partition("=")
        if equals:
            yield key, value
        else:
            yield key, rest.pop(0) if rest and not rest[0].startswith("--") else None


def load(path: Path, key: str = "--config") -> Tree:
    """One config file.

    Args:
        path: The file.
        key: The option that names it, for messages.

    Raises:
        UserError: It is missing, unreadable, invalid YAML, or no mapping.
    """
    try:
        if not path.is_file():
            candidates = {file.name: file for file in path.parent.glob("*.y*ml")} if path.parent.is_dir() else {}
            near = nearest(path.name, candidates)
            hint = f"; did you mean '{candidates[near]}'?" if near else ""
            raise UserError(f"{key}: no such file '{path}'{hint}")
        content = read_yaml(path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{key}: invalid YAML in '{path}'{where}: {error.problem or error.context}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{key}: cannot read '{path}': {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{key}: '{path}' must hold a mapping of keys at its top, got a {type(content).__name__}")
    return content


def overlay(tree: Tree, layer: Tree) -> None:
    """Lay ``layer`` over ``tree``; another class than before starts with no arguments."""
    for key, value in layer.items():
        below = tree.get(key)
        if isinstance(below, str) and isinstance(value, dict) and "class_path" not in value:
            below = tree[key] = {"class_path": below}
        if isinstance(value, dict) and isinstance(below, dict):
            if value.get("class_path", below.get("class_path")) != below.get("class_path"):
                below.clear()
            overlay(below, value)
        else:
            tree[key] = value


def _overlay_option(tree: Tree, path: list[str], text: str | None) -> None:
    """Lay one ``--a.b.c=text`` over ``tree``."""
    try:
        value = read_value(text) if isinstance(text, str) else text
    except yaml.YAMLError:
        value = text
    overlay_value(tree, path, value)


def overlay_value(tree: Tree, path: list[str], value: Any) -> None:
    """Lay a value over ``tree`` at a path of keys: classes are named in full, arguments with or without init_args."""
    *parents, last = [key for key in path if key != "init_args"]
    for key in parents:
        tree = _child(_arguments(tree), key)
    name = last.removesuffix("+")
    if name == "class_path":
        overlay(tree, {name: value} if tree.get(name) == value else {name: value, "init_args": {}})
        return
    tree = _arguments(tree)
    below = tree.get(name)
    if name != last:
        tree[name] = [*(below if isinstance(below, list) else []), *(value if isinstance(value, list) else [value])]
    elif isinstance(value, str) and isinstance(below, dict) and "class_path" in below:
        overlay(tree, {name: {"class_path": value}})
    else:
        tree[name] = value


def _arguments(node: Tree) -> Tree:
    """Where the arguments of a node are written: beside its class path, under init_args; else the node itself."""
    return node.setdefault("init_args", {}) if "class_path" in node else node


def _child(node: Tree, key: str) -> Tree:
    """The node under a key, made if need be; of a list its last item, as jsonargparse has it."""
    child = node.get(key)
    if isinstance(child, list) and child:
        item = child[-1] = {"class_path": child[-1]} if isinstance(child[-1], str) else child[-1]
        return item if isinstance(item, dict) else {}
    if not isinstance(child, dict):
        child = node[key] = {"class_path": child} if isinstance(child, str) else {}
    return child
