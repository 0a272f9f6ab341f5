"""What the user wrote, config files and command line laid over one another, before any class has seen it.

LightningCLI composes for itself; this plain tree is what mistakes are looked up in, with the key that the user wrote.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hedgelab.config.names import nearest
from hedgelab.errors import UserError, one_line

Tree = dict[str, Any]
_MOST_VALUES = 1_000_000


def config_files(words: list[str]) -> list[Path]:
    """The files named by ``--config``, in order."""
    return [Path(value) for key, value in options_of(words) if key in ("config", "c") and value]


def with_bare_flags(words: list[str], flags: Iterable[str]) -> list[str]:
    """The words with ``--flag`` alone written out as ``--flag=true``.

    >>> with_bare_flags(["--verify", "--resume", "last"], ["verify", "resume"])
    ['--verify=true', '--resume', 'last']
    """
    names = {f"--{flag}" for flag in flags}
    pairs = pairwise([*words, "--"])
    return [f"{word}=true" if word in names and after.startswith("-") else word for word, after in pairs]


def only_shows(words: list[str]) -> bool:
    """Whether the words ask for help or for the resolved config, and start nothing."""
    return any(word == "-h" or re.match(r"--help\b|--[\w.]+\.help\b|--print_config\b", word) for word in words)


def opening_comment(files: list[Path]) -> str | None:
    """What the last config file says about itself in its first lines; None if it says nothing."""
    lines = files[-1].read_text().splitlines() if files else []
    return " ".join(line.lstrip("# ").rstrip() for line in takewhile(lambda line: line.startswith("#"), lines)) or None


def compose(words: list[str], defaults: Tree | None = None) -> Tree:
    """Everything that the command line says, as one tree: later files and options over earlier ones, all over defaults."""
    tree: Tree = copy.deepcopy(defaults or {})
    for key, text in options_of(words):
        if key in ("config", "c"):
            if not text:
                raise UserError("--config: expected a file, got nothing")
            overlay(tree, load(Path(text)))
        elif key.split(".")[0] not in ("help", "print_config"):
            overlay_value(tree, key.split("."), value_of(text))
    return tree


def value_of(text: str | None) -> Any:
    """The value that the text of an option stands for as YAML; where it is no YAML, the text.

    >>> value_of("[1e-3, '1e-3', 5]"), value_of("{")
    ([0.001, '1e-3', 5], '{')
    """
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text or ''}"]))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError):
        return text
    return tree["value"]


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
    """One config file, which the option ``key`` names: plain values, in which no mapping names a key twice."""
    try:
        if not path.is_file():
            near = nearest(path.name, (file.name for file in path.parent.glob("*.y*ml")))
            hint = f"; did you mean '{path.with_name(near)}'?" if near else ""
            raise UserError(f"{key}: no such file '{path}'{hint}")
        content: Any = OmegaConf.to_container(OmegaConf.load(path, max_yaml_expanded_nodes=_MOST_VALUES))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{key}: cannot read '{path}': {one_line(str(error))}") from error
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
