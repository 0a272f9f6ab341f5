"""Hyper-parameters as MLflow wants them: flat, named within its alphabet, short."""

import hashlib
import json
import re
from argparse import Namespace
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

MAX_VALUE = 6000  # MLflow's limit for a parameter value
_MAX_KEY = 250
_FORBIDDEN = r"[^\w\-. :/]"
_HOUSEKEEPING = frozenset({"config", "name", "experiment", "ckpt_path", "resume", "record", "progress", "checkpoint"})


@lru_cache(4096)
def clean_key(key: str) -> str:
    """The nearest name that MLflow accepts for a parameter, metric or tag.

    >>> clean_key("train/loss@[0]")
    'train/loss_0_'
    """
    if re.search(_FORBIDDEN, key):
        key = re.sub(r"_+", "_", re.sub(_FORBIDDEN, "_", key))
    if len(key) > _MAX_KEY:
        return f"{key[: _MAX_KEY - 9]}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return key


def flatten(params: Mapping[str, Any] | Namespace, prefix: str = "") -> dict[str, str]:
    """Flat text parameters: dots between nested keys, numbers for items of lists that hold mappings, JSON for the rest.

    >>> flatten({"model": {"k": 3, "levels": [1, 2]}, "callbacks": [{"class_path": "A"}], "name": "x", "seed": None})
    {'model.k': '3', 'model.levels': '[1, 2]', 'callbacks.0.class_path': 'A', 'name': 'x', 'seed': 'null'}
    """
    flat: dict[str, str] = {}
    for key, value in (vars(params) if isinstance(params, Namespace) else params).items():
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, Namespace)) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, (Mapping, Namespace)) and (inner := flatten(value, f"{name}.")):
            flat |= inner
        else:
            flat[clean_key(name)] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def searchable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved config is worth searching and comparing runs by; all of it is in the artifact ``config.yaml``.

    Left out: the run's name and how it was watched, which differ between any two runs, and what is not set.

    >>> searchable({"name": "x", "trainer": {"max_steps": 3, "logger": {"uri": "y"}, "profiler": None}, "checkpoint": {"a": 1}})
    {'trainer': {'max_steps': 3}}
    """
    kept = {key: value for key, value in config.items() if key not in _HOUSEKEEPING and value is not None}
    if "trainer" in kept:
        kept["trainer"] = {key: value for key, value in kept["trainer"].items() if key != "logger"}
    return {key: _without_nothing(value) for key, value in kept.items()}


def _without_nothing(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nothing(one) for key, one in value.items() if one is not None}
    return value
