"""Reading YAML (and JSON, which is YAML) that a person, perhaps a stranger, has written: plain values and nothing else.

PyYAML's own safe loader takes the last of two equal keys, takes ``1e-3`` for text (for want of a point, by YAML 1.1), and
follows aliases that multiply or run in a circle; no library that refuses them is a dependency already.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_MOST_VALUES, _DEEPEST = 1_000_000, 250


class _Loader(yaml.SafeLoader):
    """YAML in which no mapping names a key twice, as the keys are written."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads: text that looks like ``1e-3`` is quoted."""


_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?|\d[\d_]*\.\d[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_value(text: str) -> Any:
    """The value that a text stands for; :class:`yaml.YAMLError` where it is no YAML.

    >>> read_value("[1e-3, '1e-3', 5]")
    [0.001, '1e-3', 5]
    """
    return yaml.load(text, _Loader)


def write_yaml(value: Any) -> str:
    """Plain values as YAML, in their order.

    >>> print(write_yaml({"lr": 0.001, "name": "1e-3"}), end="")
    lr: 0.001
    name: '1e-3'
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path) -> Any:
    """The content of a file.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is no text.
        yaml.YAMLError: It is no YAML, names a key twice, is nested too deep, or grows without bound by its aliases.
    """
    text = path.read_text(encoding="utf-8")
    try:
        content = read_value(text)
    except RecursionError as error:
        raise yaml.YAMLError(f"nested deeper than {_DEEPEST} levels") from error
    except ValueError as error:  # a date that is none, for one
        raise yaml.YAMLError(str(error)) from error
    left, count = [(content, 0)], 0
    while left:  # whatever comes after follows every path of aliases
        value, depth = left.pop()
        count += 1
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"nested deeper than {_DEEPEST} levels, or inside itself")
        if count > _MOST_VALUES:
            raise yaml.YAMLError(f"stands for more than {_MOST_VALUES} values")
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left += [(item, depth + 1) for item in items]
    return content
